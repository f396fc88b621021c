"""The keys and values of a decoder's slots: one block of memory for each layer, on the host or on a CUDA device.

A block is [slots, kv_heads, context, head_dim]. ONNX Runtime is given addresses in it, so that a step copies nothing.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from fettle.errors import EngineError
from fettle.manifest import DecoderSpec

# Of a cache line, which is also the widest vector.
ALIGNMENT = 64


class Block(Protocol):
    address: int


class Memory(Protocol):
    """Where blocks lie. `device` is its name at ONNX Runtime."""

    device: str

    def block(self, elements: int) -> Block: ...

    def move(self, source: int, target: int, elements: int) -> None:
        """Copy between addresses that do not overlap."""
        ...


class KeyValues:
    """`slots` x `context` tokens of room, nothing at first. Names are the graph's, without `past_` and `present_`."""

    def __init__(self, spec: DecoderSpec, memory: Memory, element_bytes: int) -> None:
        self.slots = 0
        self.context = 0
        self.names = [f"{kind}_{layer}" for layer in range(spec.layers) for kind in ("key", "value")]
        self.bytes_per_token = spec.kv_floats_per_token * element_bytes
        self._spec = spec
        self._memory = memory
        self._element_bytes = element_bytes
        self._blocks: dict[str, Block] = {}

    def resize(self, slots: int, context: int) -> None:
        """What both the old and the new shape hold is kept. One layer at a time has its memory twice.

        Raises:
            EngineError: there is not so much memory; nothing is kept then.
        """
        try:
            for name in self.names:
                self._blocks[name] = self._resized(name, slots, context)
        except (MemoryError, RuntimeError) as error:
            self.free()
            raise EngineError(f"no memory for {slots} slots of {context} tokens") from error
        self.slots, self.context = slots, context

    def copy(self, source: int, target: int, length: int) -> None:
        """Give the target slot the source's first `length` positions."""
        if source == target or not length:
            return
        for name in self.names:
            for head in range(self._spec.kv_heads):
                old, new = (self._address(name, slot, head) for slot in (source, target))
                self._memory.move(old, new, length * self._spec.head_dim)

    def shape(self, rows: int) -> list[int]:
        return [rows, self._spec.kv_heads, self.context, self._spec.head_dim]

    def address(self, name: str, slot: int) -> int:
        return self._address(name, slot, 0)

    def free(self) -> None:
        self._blocks.clear()
        self.slots = self.context = 0

    def _resized(self, name: str, slots: int, context: int) -> Block:
        heads, size = self._spec.kv_heads, self._spec.head_dim
        block = self._memory.block(slots * heads * context * size)
        kept = min(context, self.context)
        for row in range(min(slots, self.slots) * heads if kept else 0):
            old = self._blocks[name].address + self._bytes(row * self.context)
            self._memory.move(old, block.address + self._bytes(row * context), kept * size)
        return block

    def _address(self, name: str, slot: int, head: int) -> int:
        return self._blocks[name].address + self._bytes((slot * self._spec.kv_heads + head) * self.context)

    def _bytes(self, positions: int) -> int:
        return positions * self._spec.head_dim * self._element_bytes


class HostBlock:
    """Zeros, which the system provides page by page when they are first written."""

    def __init__(self, size: int) -> None:
        self._held = np.zeros(size + ALIGNMENT, np.uint8)
        self.address = -(-self._held.ctypes.data // ALIGNMENT) * ALIGNMENT


class HostMemory:
    device = "cpu"

    def __init__(self, element_bytes: int) -> None:
        self._element_bytes = element_bytes

    def block(self, elements: int) -> HostBlock:
        return HostBlock(elements * self._element_bytes)

    def move(self, source: int, target: int, elements: int) -> None:
        ctypes.memmove(target, source, elements * self._element_bytes)


class DeviceBlock:
    def __init__(self, elements: int, kind: Any) -> None:
        self._held = ort.OrtValue.ortvalue_from_shape_and_type([elements], kind, "cuda")
        self.address = self._held.data_ptr()


class DeviceMemory:
    """CUDA memory. It is copied by a graph of one node, since ONNX Runtime has no other way between two addresses."""

    device = "cuda"

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._copier = ort.InferenceSession(_identity(kind), providers=["CUDAExecutionProvider"])

    def block(self, elements: int) -> DeviceBlock:
        return DeviceBlock(elements, self._kind)

    def move(self, source: int, target: int, elements: int) -> None:
        binding = self._copier.io_binding()
        binding.bind_input("source", self.device, 0, self._kind, [elements], source)
        binding.bind_output("target", self.device, 0, self._kind, [elements], target)
        self._copier.run_with_iobinding(binding)


def _identity(kind: Any) -> bytes:
    from onnx import helper

    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    ends = [helper.make_tensor_value_info(name, element, ["elements"]) for name in ("source", "target")]
    node = helper.make_node("Identity", ["source"], ["target"])
    graph = helper.make_graph([node], "copy", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content
