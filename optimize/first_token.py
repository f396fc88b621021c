"""Where an answer reads only the first token, the last layer computes only the first token. Lossless.

A layer's keys and values are needed for every token, but the query, the attention output, the feed-forward network and
the norms only for the tokens that somebody reads: 10 of the layer's 12 parts of work otherwise serve nobody. The
rewrite starts at each Gather that takes token 0 of a [batch, length, hidden] tensor and moves it up through operators
that treat every token alike, into the query of the attention, and stops where all tokens are needed anyhow.

What is also read in full (an exit's layer, which the layers above go on from) keeps its path: the narrow one is then a
duplicate at the cost of one token. Attention that is not one operator over [batch, length, hidden] stays whole, and so
does what lies above it; the feed-forward network below it, which is most of the work, does not.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from pydantic import JsonValue

from fettle.errors import PassError, first_line
from fettle.manifest import TokenizerSpec
from fettle.rows import Rows
from optimize.export import check_batches, largest_difference, run_graph, save_graph
from optimize.fuse import Graph, drop_unused
from workers.onnx_encoder import ORT_ERRORS

TOLERANCE = 1e-5
# Between numbers that differ by rounding, a quantized graph may choose neighbouring codes.
QUANTIZED_TOLERANCE = 5e-2
ALIKE = {"Gelu", "Tanh", "Erf", "Relu", "Sigmoid", "Softplus", "HardSwish", "Mish", "Sqrt", "Cast", "Identity"}
ALIKE |= {"Abs", "Ceil", "Clip", "Floor", "Neg", "Reciprocal", "Round"}
PAIRED = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"}
QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}
NORMS = {"LayerNormalization", "RMSNormalization"}
MASK = 3


def first_token(path_in: Path, path_out: Path, sample: Rows, spec: TokenizerSpec) -> dict[str, JsonValue]:
    """Write the rewritten float graph to `path_out`; the graph as it was where nothing can be saved.

    Returns for how many answers the work was cut (`trimmed`), how many operators and attentions see only the first
    token now, and the largest difference on `sample`; where the graph stays as it is, 0 and the reason.
    """
    model = onnx.load(path_in)
    graph = Graph(model)
    roots = [node for node in model.graph.node if _takes_first(graph, node)]
    paths = [path for index, root in enumerate(roots) if (path := _Narrowing(graph, root, f"first_{index}")).nodes]
    if not paths:
        save_graph(model, path_out)
        return {"trimmed": 0, "reason": "no answer reads the first token through operators that treat tokens alike"}
    _rewrite(model, paths)
    save_graph(model, path_out)
    try:
        difference = difference_of(path_out, path_in, sample, spec)
    except PassError as error:
        return _undone(path_in, path_out, error.message)
    return {
        "trimmed": len(paths),
        "operators": sum(len(path.nodes) for path in paths),
        "attentions": sum(node.op_type == "Attention" for path in paths for node in path.nodes),
        "max_difference": difference,
    }


def difference_of(
    rewritten: Path, original: Path, sample: Rows, spec: TokenizerSpec, rounding: Set[str] = QUANTIZERS
) -> float:
    """The largest difference that a rewrite without loss makes to the answers on `sample`.

    Operators of `rounding` may choose neighbouring codes.

    Raises:
        PassError: ONNX Runtime refuses the rewritten graph, or it differs by more than rounding can explain.
    """
    batches = check_batches(sample, spec)
    try:
        difference = largest_difference(run_graph(rewritten, batches), run_graph(original, batches))
    except ORT_ERRORS as error:
        raise PassError(f"ONNX Runtime refuses the rewritten graph: {first_line(error)}") from error
    kinds = {node.op_type for node in onnx.load(rewritten, load_external_data=False).graph.node}
    if difference > (QUANTIZED_TOLERANCE if kinds & rounding else TOLERANCE):
        raise PassError(f"the rewritten graph's values differ by {difference:.2g}")
    return difference


def _undone(path_in: Path, path_out: Path, reason: str) -> dict[str, JsonValue]:
    save_graph(onnx.load(path_in), path_out)
    return {"trimmed": 0, "reason": reason}


def _takes_first(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type != "Gather" or attribute(node, "axis", 0) != 1 or node.input[1] not in graph.weights:
        return False
    index = numpy_helper.to_array(graph.weights[node.input[1]])
    return index.ndim == 0 and int(index) == 0


class _Narrowing:
    """What the answer behind one Gather needs for the first token only: `nodes`, in the graph's order.

    Each answer has a path of its own, sharing nothing with other answers' paths, so that the graph can be cut between
    them.
    """

    def __init__(self, graph: Graph, root: onnx.NodeProto, suffix: str) -> None:
        self.root = root
        self._suffix = suffix
        self._graph = graph
        self.nodes = self._found()
        self._made = {name for node in self.nodes for name in node.output}
        self._sliced: list[str] = []

    def _found(self) -> list[onnx.NodeProto]:
        """Nodes in reverse order, so that all readers of a tensor have said how much of it they need."""
        found = []
        first, full = {self.root.input[0]}, set[str]()
        for node in reversed(self._graph.graph.node):
            if not (first | full).intersection(node.output):
                continue
            narrow = [] if full.intersection(node.output) else _narrow_inputs(self._graph, node)
            first.update(node.input[place] for place in narrow)
            full.update(name for place, name in enumerate(node.input) if place not in narrow)
            if narrow:
                found.append(node)
        return found[::-1]

    def built(self) -> list[onnx.NodeProto]:
        """The narrow path, ending in what the Gather now reads."""
        made: list[onnx.NodeProto] = []
        for node in self.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{node.output[0]}_{self._suffix}"
            narrow = _narrow_inputs(self._graph, node)
            for place, name in enumerate(node.input):
                if place in narrow:
                    copy.input[place] = self._narrowed(name, made)
                elif node.op_type == "Attention" and place == MASK and name:
                    copy.input[place] = self._slice(name, "query_axis", made)
            for place, name in enumerate(node.output):
                copy.output[place] = f"{name}_{self._suffix}" if name else ""
            made.append(copy)
        self.root.input[0] = self._narrowed(self.root.input[0], made)
        return made

    def _narrowed(self, name: str, made: list[onnx.NodeProto]) -> str:
        return f"{name}_{self._suffix}" if name in self._made else self._slice(name, "token_axis", made)

    def _slice(self, name: str, axis: str, made: list[onnx.NodeProto]) -> str:
        result = f"{name}_{self._suffix}"
        if name not in self._sliced:
            self._sliced.append(name)
            inputs = [name, "first_token_start", "first_token_end", f"first_token_{axis}"]
            made.append(helper.make_node("Slice", inputs, [result], name=result))
        return result


def _narrow_inputs(graph: Graph, node: onnx.NodeProto) -> list[int]:
    """Which inputs may be cut to the first token when only that token of the output is wanted; none if not at all."""
    kind = node.op_type
    if kind in ALIKE or (kind in NORMS and attribute(node, "axis", -1) in (-1, 2)):
        return [0]
    if kind in ("ReduceMax", "ReduceMin") and _reduces_features(graph, node):
        return [0]
    if kind in QUANTIZERS:
        # Scales and zero points are one for all tokens, or one for each.
        return [place for place, name in enumerate(node.input) if name and not _same_for_all_tokens(graph, name)]
    if kind == "MatMulIntegerToFloat":
        return [0] if all(not name or name in graph.weights for name in node.input[1:]) else []
    if kind == "ConstantOfShape" and graph.made_by(node.input[0], "Shape"):
        # A zero point for each token: with fewer tokens the shape is smaller.
        return [0]
    if kind == "Shape" and not node.attribute and _feeds_only(graph, node, "ConstantOfShape"):
        return [0]
    if kind == "Split" and attribute(node, "axis", 0) in (-1, 2):
        return [0]
    if kind == "MatMul" and node.input[1] in graph.weights and len(graph.weights[node.input[1]].dims) == 2:
        return [0]
    if kind == "Attention" and attribute(node, "q_num_heads", 0) and not attribute(node, "is_causal", 0):
        return [] if any(node.input[MASK + 1 :]) else [0]
    if kind in PAIRED:
        tokens = [place for place, name in enumerate(node.input) if not _same_for_all_tokens(graph, name)]
        return [] if any(graph.made_by(node.input[place], "Constant") for place in tokens) else tokens
    return []


def _reduces_features(graph: Graph, node: onnx.NodeProto) -> bool:
    """Over the last axis alone, which stays as one of size 1."""
    axes = graph.weights.get(node.input[1]) if len(node.input) > 1 else None
    return axes is not None and numpy_helper.to_array(axes).tolist() == [-1] and attribute(node, "keepdims", 1) == 1


def _feeds_only(graph: Graph, node: onnx.NodeProto, kind: str) -> bool:
    return all(reader.op_type == kind for reader in graph.readers[node.output[0]])


def _same_for_all_tokens(graph: Graph, name: str) -> bool:
    if name not in graph.weights:
        return False
    shape = graph.weights[name].dims
    return len(shape) < 2 or shape[-2] == 1


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((item.i for item in node.attribute if item.name == name), default)


def _rewrite(model: onnx.ModelProto, paths: list[_Narrowing]) -> None:
    constants = {"start": 0, "end": 1, "token_axis": 1, "query_axis": -2}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), f"first_token_{name}") for name, value in constants.items()
    )
    before = {id(path.root): path for path in paths}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        path = before.get(id(node))
        nodes.extend(path.built() if path is not None else [])
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    drop_unused(model)
    del model.graph.value_info[:]
