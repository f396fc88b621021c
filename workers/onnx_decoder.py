"""The ONNX Runtime text generator: `model.onnx` over slots of keys and values that never move for a step.

The graph, `rows` sequences of `tokens` new tokens each, row r having `seqlens_k[r] + 1` tokens once they are added:

    input_ids              int64 [rows, tokens]
    seqlens_k              int32 [rows]
    total_sequence_length  int32 []: the most tokens of a row, `max(seqlens_k) + 1`
    logit_rows             int64 [wanted]: which of the rows * tokens positions, counted through, need logits
    past_key_i, past_value_i        float [rows, kv_heads, context, head_dim], i from 0 to layers - 1
    -> logits              float32 [wanted, vocabulary]
    -> present_key_i, present_value_i  the same memory as the past: new keys and values are written into it

Several rows take one new token each, whatever their lengths; several new tokens are for one row, at any position. On
CPU a row's logits are the same bits whoever shares the call, and a prompt's whatever pieces it is fed in, unless a
piece is a single token: the sums of attention are made in another order then.
Runs on the CPU or CUDA provider, in float32 or what else the graph's keys and values are. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fettle.errors import EngineError, FamilyError
from fettle.manifest import DecoderSpec, VariantManifest
from workers.decoder import Floats, Ids
from workers.engine import EngineOptions
from workers.huge_pages import use_huge_pages
from workers.key_values import DeviceMemory, HostMemory, KeyValues
from workers.onnx_encoder import MODEL_FILE, ORT_ERRORS, open_session

KINDS: dict[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# Of a prompt in one call on CPU: more falls out of the caches, and attention makes a row of scores for each.
CALL_TOKENS = 128
WARM_UP_TOKENS = 32
WARM_UP_SLOTS = 8
# Smaller graphs stay in the caches, where pages matter less than the time it takes to move them.
LARGE_BYTES = 32 << 20


class GraphRunner:
    """One graph, with room for nothing until `allocate`."""

    def __init__(self, path: Path, spec: DecoderSpec, options: EngineOptions) -> None:
        """Load the graph.

        Raises:
            UsageError: CUDA was asked for and is not there.
            FamilyError: ONNX Runtime cannot load the graph, or it is no decoder.
        """
        self._session: ort.InferenceSession | None = open_session(path, options, spin=True)
        if options.device == "cpu" and _weight_bytes(path) >= LARGE_BYTES:
            use_huge_pages()
        self._spec = spec
        kind, self._vocabulary = _kind_and_vocabulary(self._session, path)
        size = np.dtype(kind).itemsize
        memory = HostMemory(size) if options.device == "cpu" else DeviceMemory(kind)
        self._call_tokens = CALL_TOKENS if options.device == "cpu" else spec.context
        self._kind = kind
        self._device = memory.device
        self._cache = KeyValues(spec, memory, size)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}

    @property
    def slots(self) -> int:
        return self._cache.slots

    @property
    def context(self) -> int:
        return self._cache.context

    @property
    def bytes_per_token(self) -> int:
        return self._cache.bytes_per_token

    def warm_up(self) -> None:
        """Leaves the room as it was; what lies in its first slots is overwritten."""
        slots, context = self.slots, self.context
        if not slots:
            self.allocate(WARM_UP_SLOTS, min(2 * WARM_UP_TOKENS, self._spec.context))
        tokens = min(WARM_UP_TOKENS, self.context - 1)
        self.feed(0, np.zeros(tokens, np.int32), 0, 1)
        for rows in (1, min(WARM_UP_SLOTS, self.slots)):
            self.decode(np.zeros(rows, np.int32), np.full(rows, tokens, np.int32))
        if not slots:
            self.allocate(slots, context)

    def allocate(self, slots: int, context: int) -> None:
        if context > self._spec.context:
            raise EngineError(f"a slot of {context} tokens was asked for; this model's context is {self._spec.context}")
        self._bindings.clear()
        self._cache.resize(slots, context)

    def feed(self, slot: int, ids: Ids, start: int, logits: int) -> Floats:
        self._check(slot + 1, start + len(ids))
        calls = -(-len(ids) // self._call_tokens)
        ends = [len(ids) * (call + 1) // calls for call in range(calls)]
        found = []
        for at, end in zip([0, *ends], ends, strict=False):
            wanted = np.arange(max(0, len(ids) - logits - at), end - at)
            # ONNX Runtime's reductions give no rows a wrong shape, so one at least is asked for.
            asked = wanted if len(wanted) else np.array([end - at - 1])
            rows = self._run(slot, ids[None, at:end], np.array([start + end - 1], np.int32), asked)
            found.append(rows[: len(wanted)])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def decode(self, ids: Ids, lengths: Ids) -> Floats:
        rows = len(ids)
        self._check(rows, int(lengths.max(initial=0)) + 1)
        return self._run(0, ids.reshape(rows, 1), lengths, np.arange(rows))

    def copy(self, source: int, target: int, length: int) -> None:
        self._check(max(source, target) + 1, length)
        self._cache.copy(source, target, length)

    def close(self) -> None:
        self._bindings.clear()
        self._cache.free()
        self._session = None

    def _check(self, slots: int, tokens: int) -> None:
        """ONNX Runtime is given bare addresses, so nothing else would notice."""
        if slots > self.slots or tokens > self.context:
            raise EngineError(
                f"{slots} slots of {tokens} tokens are needed, and {self.slots} of {self.context} are allocated"
            )

    def _run(self, slot: int, ids: Ids, last: Ids, wanted: NDArray[np.int64]) -> Floats:
        """`last` int32 [rows]: the position of each row's last new token."""
        if self._session is None:
            raise EngineError("the engine is closed")
        logits = np.empty((len(wanted), self._vocabulary), np.float32)
        binding = self._binding(self._session, slot, len(ids))
        binding.bind_cpu_input("input_ids", ids.astype(np.int64))
        binding.bind_cpu_input("seqlens_k", last.astype(np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(last.max() + 1, np.int32))
        binding.bind_cpu_input("logit_rows", wanted)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            rows, tokens = ids.shape
            raise EngineError(f"ONNX Runtime failed on {rows} rows of {tokens} new tokens") from error
        return logits

    def _binding(self, session: ort.InferenceSession, slot: int, rows: int) -> ort.IOBinding:
        """Keys and values of `rows` slots from `slot` on, bound once and used until the room changes."""
        known = self._bindings.get((slot, rows))
        if known is not None:
            return known
        binding = session.io_binding()
        shape = self._cache.shape(rows)
        for name in self._cache.names:
            where = (self._device, 0, self._kind, shape, self._cache.address(name, slot))
            binding.bind_input(f"past_{name}", *where)
            binding.bind_output(f"present_{name}", *where)
        self._bindings[slot, rows] = binding
        return binding


class OnnxDecoder(GraphRunner):
    """The graph of a variant."""

    def __init__(self, directory: Path, manifest: VariantManifest, options: EngineOptions) -> None:
        """Raises as GraphRunner does, and FamilyError for a manifest that describes no text generator."""
        if manifest.decoder is None:
            raise FamilyError(f"variant {manifest.id!r} has no `decoder` in its manifest, so it generates no text")
        super().__init__(directory / MODEL_FILE, manifest.decoder, options)
        self.manifest = manifest


def _weight_bytes(path: Path) -> int:
    """Of a graph, and of the second file that graphs beyond 2 GB keep their weights in."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())


def _kind_and_vocabulary(session: ort.InferenceSession, path: Path) -> tuple[type[np.floating], int]:
    inputs = {item.name: item for item in session.get_inputs()}
    outputs = {item.name: item for item in session.get_outputs()}
    first, logits = inputs.get("past_key_0"), outputs.get("logits")
    if first is None or logits is None or first.type not in KINDS:
        raise FamilyError(f"{path} is no decoder graph that Fettle made; run `fettle optimize` again")
    return KINDS[first.type], int(logits.shape[-1])
