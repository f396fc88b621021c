"""Writes the parts of a causal language model as an ONNX graph, on ONNX Runtime's GroupQueryAttention.

The graph's inputs and outputs are in `workers/onnx_decoder.py`, which runs it. Every linear layer is a MatMul with
its weight [inputs, outputs] as a constant, which the quantizing passes rewrite: query, key and value are one, and so
are the two halves of the gated unit. Its name says what it is: `layers.3.qkv`, `.out`, `.gate_up`, `.down`, `head`.
Where the head's weights are the embedding table, it is a Gemm on the transposed table, which is stored once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from optimize.decoder_graph_parts import Attention, Layer, Linear, Mlp, Norm, Parts
from optimize.fuse import MICROSOFT

# Of the standard operators in the graph; GroupQueryAttention and its like are ONNX Runtime's own.
OPSET = 23
IR_VERSION = 10
TABLE = "embedding"


def write_graph(parts: Parts) -> onnx.ModelProto:
    writer = _Writer(parts)
    writer.begin()
    for index, layer in enumerate(parts.layers()):
        writer.layer(index, layer)
    writer.end()
    return writer.model


class _Writer:
    """Nodes and constants in graph order; `_hidden` is the hidden state so far."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._constants: set[str] = set()
        self._hidden = ""
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        # Filled where it is, since protobuf copies what is put into it: weights would be there several times.
        graph = onnx.GraphProto(name="decoder")
        self.model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fettle")
        self._graph = self.model.graph

    def begin(self) -> None:
        self._declare()
        table = self._constant(TABLE, self._parts.table)
        self._hidden = self._add("Gather", [table, "input_ids"], "embedded")
        if self._parts.table_scale != 1.0:
            scale = self._constant("embedding_scale", np.float32(self._parts.table_scale))
            self._hidden = self._add("Mul", [self._hidden, scale], "embedded_scaled")
        for name, rotary in self._parts.rotaries().items():
            self._constant(f"{name}.cos", rotary.cos)
            self._constant(f"{name}.sin", rotary.sin)

    def layer(self, index: int, layer: Layer) -> None:
        name = f"layers.{index}"
        attended = self._attention(
            name, index, layer.attention, self._norm(f"{name}.before", self._hidden, layer.before_attention)
        )
        if index == self._parts.spec.layers - 1:
            # Of the other positions nobody reads more than the keys and values, which are stored by now.
            attended = self._wanted(f"{name}.wanted", attended, layer.attention.out.weight.shape[0])
            self._hidden = self._wanted("wanted", self._hidden, layer.attention.out.weight.shape[1])
        output = self._linear(f"{name}.out", attended, layer.attention.out)
        self._block(f"{name}.attended", output, layer.after_attention)
        mixed = self._mlp(name, layer.mlp, self._norm(f"{name}.between", self._hidden, layer.before_mlp))
        self._block(f"{name}.mixed", mixed, layer.after_mlp)

    def end(self) -> None:
        hidden = self._norm("norm", self._hidden, self._parts.norm)
        head = self._parts.head
        if head is None:
            logits = self._add("Gemm", [hidden, TABLE], "head", transB=1)
        else:
            logits = self._linear("head", hidden, head)
        softcap = self._parts.logit_softcap
        if softcap:
            size = self._constant("logit_softcap", np.float32(softcap))
            inner = self._add("Tanh", [self._add("Div", [logits, size], "head.scaled")], "head.tanh")
            self._add("Mul", [inner, size], "head.capped")
        self._graph.node[-1].output[0] = "logits"

    def _declare(self) -> None:
        spec = self._parts.spec
        buffer: list[str | int | None] = ["rows", spec.kv_heads, "context", spec.head_dim]
        names = [f"{kind}_{layer}" for layer in range(spec.layers) for kind in ("key", "value")]
        describe = helper.make_tensor_value_info
        self._graph.input.extend(
            [
                describe("input_ids", TensorProto.INT64, ["rows", "tokens"]),
                describe("seqlens_k", TensorProto.INT32, ["rows"]),
                describe("total_sequence_length", TensorProto.INT32, []),
                describe("logit_rows", TensorProto.INT64, ["wanted"]),
                *(describe(f"past_{name}", TensorProto.FLOAT, buffer) for name in names),
            ]
        )
        self._graph.output.append(describe("logits", TensorProto.FLOAT, ["wanted", len(self._parts.table)]))
        self._graph.output.extend(describe(f"present_{name}", TensorProto.FLOAT, buffer) for name in names)

    # Blocks.

    def _attention(self, name: str, index: int, attention: Attention, source: str) -> str:
        joined = self._linear(f"{name}.qkv", source, attention.qkv)
        if attention.query_norm is None or attention.key_norm is None:
            inputs = [joined, "", ""]
        else:
            inputs = self._normed_heads(name, attention, attention.query_norm, attention.key_norm, joined)
        inputs += [f"past_key_{index}", f"past_value_{index}", "seqlens_k", "total_sequence_length"]
        turned = attention.rotary is not None
        inputs += [f"{attention.rotary}.cos", f"{attention.rotary}.sin"] if turned else ["", ""]
        sink = self._constant(f"no_sink.{attention.heads}", np.full(attention.heads, -np.inf, np.float32))
        inputs += ["", "", sink]
        # A scale other than 1 keeps the kernel of a single row from being used.
        settings: dict[str, Any] = {"scale": 1.0, "do_rotary": int(turned)}
        if attention.softcap:
            settings["softcap"] = attention.softcap
        if attention.window is not None:
            settings["local_window_size"] = attention.window
        return self._add(
            "GroupQueryAttention",
            inputs,
            f"{name}.attention",
            f"present_key_{index}",
            f"present_value_{index}",
            domain=MICROSOFT,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            **settings,
        )

    def _normed_heads(self, name: str, attention: Attention, query: Norm, key: Norm, joined: str) -> list[str]:
        """Query, key and value apart, the first two normed head by head."""
        size = attention.head_dim
        widths = [attention.heads * size, attention.kv_heads * size, attention.kv_heads * size]
        parts = self._split(f"{name}.heads", joined, widths)
        normed = [
            self._normed_by_head(f"{name}.{part}", source, norm, size)
            for part, source, norm in (("query", parts[0], query), ("key", parts[1], key))
        ]
        return [*normed, parts[2]]

    def _normed_by_head(self, name: str, source: str, norm: Norm, size: int) -> str:
        apart = self._constant("by_head", np.array([0, 0, -1, size], np.int64))
        joined = self._constant("heads_joined", np.array([0, 0, -1], np.int64))
        heads = self._add("Reshape", [source, apart], f"{name}.apart")
        return self._add("Reshape", [self._norm(f"{name}.normed", heads, norm), joined], f"{name}.joined")

    def _mlp(self, name: str, mlp: Mlp, source: str) -> str:
        joined = self._linear(f"{name}.gate_up", source, mlp.gate_up)
        width = mlp.down.weight.shape[0]
        gate, up = self._split(f"{name}.gate", joined, [width, width])
        product = self._add("Mul", [self._activation(f"{name}.activation", mlp.activation, gate), up], f"{name}.gated")
        return self._linear(f"{name}.down", product, mlp.down)

    def _activation(self, name: str, kind: str, source: str) -> str:
        match kind:
            case "silu":
                return self._add("QuickGelu", [source], name, domain=MICROSOFT, alpha=1.0)
            case "gelu_tanh":
                return self._add("FastGelu", [source], name, domain=MICROSOFT)
        return self._add("Gelu", [source], name, domain=MICROSOFT)

    def _wanted(self, name: str, source: str, width: int) -> str:
        """[wanted, width] of [rows, tokens, width]."""
        shape = self._constant(f"{name}.shape", np.array([-1, width], np.int64))
        return self._add("Gather", [self._add("Reshape", [source, shape], f"{name}.flat"), "logit_rows"], name)

    def _block(self, name: str, output: str, after: Norm | None) -> None:
        """The hidden state with a block's output."""
        output = output if after is None else self._norm(f"{name}.normed", output, after)
        self._hidden = self._add("Add", [self._hidden, output], name)

    # Single operators.

    def _linear(self, name: str, source: str, linear: Linear) -> str:
        output = self._add("MatMul", [source, self._constant(f"{name}.weight", linear.weight)], name)
        if linear.bias is None:
            return output
        return self._add("Add", [output, self._constant(f"{name}.bias", linear.bias)], f"{name}.biased")

    def _norm(self, name: str, source: str, norm: Norm) -> str:
        gain = self._constant(f"{name}.gain", norm.gain)
        return self._add("RMSNormalization", [source, gain], name, axis=-1, epsilon=norm.epsilon)

    def _split(self, name: str, source: str, widths: list[int]) -> list[str]:
        sizes = self._constant(f"split.{'.'.join(map(str, widths))}", np.array(widths, np.int64))
        outputs = [f"{name}.{part}" for part in range(len(widths))]
        self._add("Split", [source, sizes], *outputs, axis=-1)
        return outputs

    def _constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        if name not in self._constants:
            self._constants.add(name)
            self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, kind: str, inputs: list[str], output: str, *more: str, domain: str = "", **settings: Any) -> str:
        """Returns the first output's name, which is also the node's."""
        node = helper.make_node(kind, inputs, [output, *more], name=output, domain=domain, **settings)
        self._graph.node.append(node)
        return output
