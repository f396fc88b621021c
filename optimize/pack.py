"""Padding-free execution: what treats every token alike runs over the tokens of all rows, one after the other.

A batch of unequal rows [rows, longest, hidden] becomes [1, tokens, hidden] for everything but attention, which puts its
query, key and value back into rows for itself. Where the tokens stand follows from the attention mask, inside the
graph, so inputs and answers stay as they were; hidden states between stages (`optimize.stages`) stay packed. Known from
ByteTransformer (Zhai et al., 2023) and ModernBERT's unpadding; here as a rewrite of any graph, since ONNX Runtime has
packed attention on CUDA alone.

Which tensors have one entry a token is not guessed from names: the graph is run on two batches of different sizes, and
the shapes say it. An operator that is not known to treat tokens alike gets rows, as it did before.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from pydantic import JsonValue

from fettle.errors import PassError, first_line
from fettle.manifest import TokenizerSpec
from fettle.rows import Rows
from optimize.export import save_graph
from optimize.first_token import ALIKE, NORMS, PAIRED, QUANTIZERS, attribute, difference_of
from optimize.fuse import Graph, drop_unused
from workers.onnx_encoder import ORT_ERRORS, session_options

# In the graph's own metadata: its nodes before they were packed, for variants that are made from this one.
PADDED = "fettle.padded_nodes"
MASK = "attention_mask"
# Two batches, rows and tokens, that no size of a model is likely to be mistaken for.
PROBES = ((3, 7), (2, 5))
PRODUCTS = {"MatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "DynamicQuantizeMatMul"}
# One scale for all tokens of a call: padding no longer has a part in it.
DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
REDUCED = {"ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum"}

Shape = tuple[int, ...]


def pack(path_in: Path, path_out: Path, sample: Rows, spec: TokenizerSpec) -> dict[str, JsonValue]:
    """Write the packed graph to `path_out`; the graph as it was where that cannot be done.

    Returns how many operators run over `packed` tokens and the largest difference on `sample`; where the graph stays as
    it is, 0 and the reason.
    """
    model = onnx.load(path_in)
    try:
        packing = _Packing(model, [_shapes(model, probe, path_out) for probe in PROBES])
    except ORT_ERRORS as error:
        return _undone(path_in, path_out, f"ONNX Runtime does not tell the shapes: {first_line(error)}")
    if not packing.chosen:
        return _undone(path_in, path_out, "no product of a weight with one entry a token")
    if not packing.hands_out_packed():
        return _undone(path_in, path_out, "hidden states between its stages would stay padded")
    before = _joined_nodes(model)
    packing.rewrite()
    helper.set_model_props(model, {**_properties(model), PADDED: before})
    save_graph(model, path_out)
    try:
        difference = difference_of(path_out, path_in, sample, spec, QUANTIZERS | DYNAMIC)
    except PassError as error:
        return _undone(path_in, path_out, error.message)
    kinds = Counter(node.op_type for node in model.graph.node)
    return {"packed": len(packing.chosen), "gathers": kinds["Gather"], "max_difference": difference}


def unpack(path: Path) -> None:
    """Undo `pack` in place, so that passes see the graph they know; one that is not packed stays as it is."""
    if PADDED not in _properties(onnx.load(path, load_external_data=False)):
        return
    model = onnx.load(path)
    properties = _properties(model)
    padded = properties.pop(PADDED)
    del model.graph.node[:]
    model.graph.node.extend(onnx.GraphProto.FromString(base64.b64decode(padded)).node)
    drop_unused(model)
    del model.metadata_props[:]
    helper.set_model_props(model, properties)
    save_graph(model, path)


def _undone(path_in: Path, path_out: Path, reason: str) -> dict[str, JsonValue]:
    save_graph(onnx.load(path_in), path_out)
    return {"packed": 0, "reason": reason}


def _joined_nodes(model: onnx.ModelProto) -> str:
    nodes = onnx.GraphProto()
    nodes.node.extend(model.graph.node)
    return base64.b64encode(nodes.SerializeToString()).decode()


def _properties(model: onnx.ModelProto) -> dict[str, str]:
    return {item.key: item.value for item in model.metadata_props}


class _Packing:
    """What of a graph runs over packed tokens: `chosen`, by the nodes' ids."""

    def __init__(self, model: onnx.ModelProto, shapes: Sequence[Mapping[str, Shape]]) -> None:
        """`shapes` of all tensors for each of `PROBES`."""
        self._model = model
        self._graph = Graph(model)
        self._shape, other = shapes
        self._tokens = {name for name in self._shape if _has_one_a_token(self._shape[name], other[name])}
        self._fixed = {name for name in self._shape if self._shape[name] == other[name]} | self._graph.weights.keys()
        self._counted: set[str] = set()
        alike = {id(node) for node in model.graph.node if self._treats_tokens_alike(node)}
        self.chosen = self._worth_it(alike)
        # What a tensor is called packed; of these, what is there in no other way, and then its name in rows.
        self._names: dict[str, str] = {}
        self._only: set[str] = set()
        self._rows: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._widths: set[int] = set()

    def hands_out_packed(self) -> bool:
        """Whether hidden states that go on to another stage are packed, if there are any."""
        made = {name for node in self._model.graph.node if id(node) in self.chosen for name in node.output}
        return all(item.name in made for item in self._model.graph.output if item.name in self._tokens)

    def _treats_tokens_alike(self, node: onnx.NodeProto) -> bool:
        """Whether each token of what it makes follows from the same token of what it reads, and from constants."""
        kind = node.op_type
        if kind == "Shape" and not node.attribute and node.input[0] in self._tokens:
            # A constant for each token is made by the shape of another tensor (`optimize.quantize_rows`).
            self._counted.update(node.output)
            return True
        if kind == "ConstantOfShape" and node.input[0] in self._counted:
            return True
        reads = [name for name in node.input if name and name in self._tokens]
        others = [name for name in node.input if name and name not in self._tokens]
        if not reads or node.output[0] not in self._tokens:
            return False
        if kind in PRODUCTS | DYNAMIC:
            return reads == [node.input[0]] and all(name in self._fixed for name in others)
        if not all(name in self._tokens for name in node.output if name):
            return False
        if not all(self._is_for_any_token(name) for name in others):
            return False
        if kind in NORMS or kind in ("Softmax", "LogSoftmax", "Concat", "Split"):
            return attribute(node, "axis", 0 if kind == "Split" else -1) in (-1, 2)
        if kind in REDUCED:
            # What is reduced has still one entry a token, so it was over the features, and they stay as one.
            return attribute(node, "keepdims", 1) == 1
        return kind in ALIKE | PAIRED | QUANTIZERS

    def _is_for_any_token(self, name: str) -> bool:
        """Whether it can be combined with any number of tokens."""
        shape = self._graph.weights[name].dims if name in self._graph.weights else self._shape[name]
        return name in self._fixed and all(size == 1 for size in shape[:-1])

    def _worth_it(self, alike: set[int]) -> set[int]:
        """Of these what leads to a product, or comes after one; the rest, as what makes the mask, stays in rows.

        So does what reads something of the rest as well, as pooling reads the mask: padded places are nothing there.
        """
        needed: set[str] = set()
        chosen: set[int] = set()
        for node in reversed(self._model.graph.node):
            if id(node) in alike and (node.op_type in PRODUCTS or needed.intersection(node.output)):
                chosen.add(id(node))
                needed.update(name for name in node.input if name in self._tokens | self._counted)
        packed: set[str] = set()
        for node in self._model.graph.node:
            reads = self._tokens.intersection(node.input)
            if id(node) in chosen or (id(node) in alike and reads and reads <= packed):
                chosen.add(id(node))
                packed.update(node.output)
        return chosen

    def rewrite(self) -> None:
        nodes = self._nodes
        nodes.extend(_places())
        for node in self._model.graph.node:
            if id(node) in self.chosen:
                self._in_packed(node)
            elif not self._takes_first(node):
                self._in_rows(node)
        for output in self._model.graph.output:
            if output.name in self._names:
                self._hand_out(output)
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        graph = self._model.graph
        del graph.node[:]
        graph.node.extend(kept)
        del graph.value_info[:]
        constants = {"all": [-1], "axis": [0], "begin": [0], "end": [1], "second": [1], "zero": 0, "one": 1}
        constants |= {f"flat_{width}": [-1, width] for width in self._widths}
        graph.initializer.extend(
            numpy_helper.from_array(np.array(value, np.int64), f"pack_{name}") for name, value in constants.items()
        )

    def _in_packed(self, node: onnx.NodeProto) -> None:
        """It reads packed tensors; those that come in rows are packed for it."""
        for place, name in enumerate(node.input):
            if name in self._tokens and name not in self._names:
                self._names[name] = f"{name}_packed"
                self._gather(name, "pack_from", f"{name}_packed", self._shape[name])
            node.input[place] = self._names.get(name, name)
        for place, name in enumerate(node.output):
            if name in self._tokens | self._counted:
                node.output[place] = self._names[name] = f"{name}_packed"
                self._only.add(name)
        self._nodes.append(node)

    def _in_rows(self, node: onnx.NodeProto) -> None:
        for place, name in enumerate(node.input):
            if name in self._only:
                if name not in self._rows:
                    self._rows[name] = f"{name}_rows"
                    self._gather(self._names[name], "pack_to", f"{name}_rows", self._shape[name])
                node.input[place] = self._rows[name]
        self._nodes.append(node)

    def _gather(self, source: str, places: str, result: str, shape: Shape) -> None:
        """[any, any, width] as [tokens, width], of which these places are taken."""
        self._widths.add(shape[-1])
        flat = f"{result}_flat"
        self._nodes.append(helper.make_node("Reshape", [source, f"pack_flat_{shape[-1]}"], [flat], name=flat))
        self._nodes.append(helper.make_node("Gather", [flat, places], [result], name=result, axis=0))

    def _takes_first(self, node: onnx.NodeProto) -> bool:
        """The first token of each row, as `optimize.first_token` and classifiers take it, straight from the packed."""
        if not node.input or node.input[0] not in self._only:
            return False
        single = node.op_type == "Gather" and attribute(node, "axis", 0) == 1 and self._number(node.input[1]) == 0
        sliced = node.op_type == "Slice" and [self._number(name) for name in node.input[1:]] == [0, 1, 1]
        if not single and not sliced:
            return False
        firsts = f"{node.output[0]}_firsts"
        places = "pack_first_row" if single else "pack_first"
        packed = self._names[node.input[0]]
        self._nodes.append(helper.make_node("Gather", [packed, places], [firsts], name=firsts, axis=1))
        self._nodes.append(helper.make_node("Squeeze", [firsts, "pack_axis"], list(node.output), name=node.name))
        return True

    def _number(self, name: str) -> int | None:
        """The one number in a constant, alone or in a list."""
        item = self._graph.weights.get(name)
        if item is None or len(item.dims) > 1:
            return None
        values = numpy_helper.to_array(item)
        return int(values.item()) if values.size == 1 else None

    def _hand_out(self, output: onnx.ValueInfoProto) -> None:
        """Hidden states between stages go on as they are; an answer never is one entry a token (`optimize.export`)."""
        packed = self._names[output.name]
        for node in self._nodes:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == packed:
                        names[place] = output.name
        self._names[output.name] = output.name
        shape = output.type.tensor_type.shape
        shape.dim[0].Clear()
        shape.dim[0].dim_value = 1
        shape.dim[1].Clear()
        shape.dim[1].dim_param = "tokens"


def _places() -> list[onnx.NodeProto]:
    """Where each token stands in rows (`pack_from`), where each place of a row stands packed (`pack_to`), firsts.

    int64 [1, tokens], [rows, longest], [rows, 1] and [rows]. A padded place is filled with the token before it, which
    the mask hides.
    """
    return [
        helper.make_node("Reshape", [MASK, "pack_all"], ["pack_mask"], name="pack_mask"),
        helper.make_node("NonZero", ["pack_mask"], ["pack_from"], name="pack_from"),
        helper.make_node("CumSum", ["pack_mask", "pack_zero"], ["pack_count"], name="pack_count"),
        helper.make_node("Sub", ["pack_count", "pack_one"], ["pack_last"], name="pack_last"),
        helper.make_node("Max", ["pack_last", "pack_zero"], ["pack_place"], name="pack_place"),
        helper.make_node("Shape", [MASK], ["pack_shape"], name="pack_shape"),
        helper.make_node("Reshape", ["pack_place", "pack_shape"], ["pack_to"], name="pack_to"),
        helper.make_node("Slice", ["pack_to", "pack_begin", "pack_end", "pack_second"], ["pack_first"], name="pack_f"),
        helper.make_node("Reshape", ["pack_first", "pack_all"], ["pack_first_row"], name="pack_first_row"),
    ]


def _shapes(model: onnx.ModelProto, probe: tuple[int, int], scratch: Path) -> dict[str, Shape]:
    """Of every tensor that the graph computes or reads, for a batch of so many rows and tokens without padding."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    known = {item.name for item in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name and name not in known]
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    save_graph(told, scratch)
    options = session_options(1)
    # Fused, or folded, it would not have all these tensors.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(scratch), options, providers=["CPUExecutionProvider"])
    feed = {item.name: np.ones(probe, np.int64) for item in session.get_inputs()}
    found = session.run(None, feed)
    shapes = {item.name: np.shape(value) for item, value in zip(session.get_outputs(), found, strict=True)}
    return shapes | {name: value.shape for name, value in feed.items()}


def _has_one_a_token(first: Shape, second: Shape) -> bool:
    """[rows, tokens, width] of `PROBES`."""
    return len(first) == 3 and (first[:2], second[:2]) == PROBES and first[2] == second[2]
