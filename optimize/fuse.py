"""Rewrites an exported graph into the operators that ONNX Runtime's CPU provider runs fastest.

Two rewrites, chosen by measurement (benchmarks/LOG.md, "fusions"): attention reads [batch, length, hidden] as the
linear layers leave it, without the four transposes around it; and GELU is ONNX Runtime's own, which is a quarter
faster than the standard operator's kernel. Where a pattern does not match, the graph stays as it is and the notes
say so. Attention and GELU themselves come as single operators from the exporter.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from pydantic import JsonValue

from fettle.errors import PassError
from fettle.manifest import TokenizerSpec
from fettle.rows import Rows
from optimize.export import check_batches, largest_difference, run_graph, save_graph

HEADS_FIRST = [0, 2, 1, 3]
MICROSOFT = "com.microsoft"
TOLERANCE = 1e-4
COUNTED = ("Attention", "Gelu", "LayerNormalization", "MatMul", "Gemm")


def fuse(path_in: Path, path_out: Path, sample: Rows, spec: TokenizerSpec) -> dict[str, JsonValue]:
    """Write the fused graph to `path_out`.

    Returns how many nodes each rewrite touched, how many it left alone, and the largest difference on `sample`.

    Raises:
        PassError: the fused graph answers `sample` otherwise than the unfused one, beyond `TOLERANCE`.
    """
    model = onnx.load(path_in)
    _fold_transposed(model)
    graph = Graph(model)
    attentions = sum(node.op_type == "Attention" for node in model.graph.node)
    joined = sum(_join_attention(graph, node) for node in list(model.graph.node) if node.op_type == "Attention")
    gelus = sum(_own_gelu(node) for node in model.graph.node)
    if gelus:
        import_domain(model, MICROSOFT)
    drop_unused(model)
    # Shapes of tensors that no longer exist, or exist with another rank.
    del model.graph.value_info[:]
    save_graph(model, path_out)
    batches = check_batches(sample, spec)
    difference = largest_difference(run_graph(path_out, batches), run_graph(path_in, batches))
    if difference > TOLERANCE:
        raise PassError(f"the fused graph's values differ by {difference:.2g}, more than the tolerance {TOLERANCE:g}")
    left = {"attention_unfused": attentions - joined} if attentions != joined else {}
    counts = Counter(node.op_type for node in model.graph.node)
    return {
        "attention_fused": joined,
        "gelu_fused": gelus,
        **left,
        "max_difference": difference,
        "nodes": {name: counts[name] for name in COUNTED if counts[name]},
    }


class Graph:
    """Who makes and who reads each tensor of a graph, and the small constants. Not updated by rewrites."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.maker = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {item.name for item in model.graph.output}
        self.weights = {item.name: item for item in model.graph.initializer}
        self.shapes = {item.name: item.type.tensor_type.shape.dim for item in model.graph.value_info}

    def made_by(self, name: str, kind: str) -> onnx.NodeProto | None:
        node = self.maker.get(name)
        return node if node is not None and node.op_type == kind else None

    def only_reader(self, name: str, kind: str) -> onnx.NodeProto | None:
        readers = self.readers[name]
        alone = len(readers) == 1 and name not in self.outputs
        return readers[0] if alone and readers[0].op_type == kind else None

    def width(self, name: str) -> int | None:
        """The last dimension of a tensor, where the exporter knew it."""
        shape = self.shapes.get(name)
        return shape[-1].dim_value or None if shape else None

    def last_target(self, shape: str) -> int | None:
        """The constant at the end of a Reshape's target, however the exporter wrote it."""
        node = self.made_by(shape, "Concat")
        last = node.input[-1] if node is not None else shape
        if last not in self.weights:
            return None
        values = numpy_helper.to_array(self.weights[last])
        return int(values[-1]) if values.size and values[-1] > 0 else None


def _join_attention(graph: Graph, node: onnx.NodeProto) -> bool:
    """`Attention` over [batch, heads, length, size] made by Reshape and Transpose: take their inputs instead.

    All three of query, key and value have to match, and the way back (Transpose, Reshape); rotary embeddings, which
    sit in between, do not.
    """
    if len(node.input) > 4 and any(node.input[4:]):
        return False
    sources = [_before_heads(graph, name) for name in node.input[:3]]
    back = graph.only_reader(node.output[0], "Transpose")
    if any(source is None for source in sources) or back is None or not _heads_first(back):
        return False
    flat = graph.only_reader(back.output[0], "Reshape")
    shapes = {(graph.width(name), size) for name, size in filter(None, sources)}
    if flat is None or len(shapes) != 1:
        return False
    width, size = shapes.pop()
    if width is None or width % size:
        return False
    heads = width // size
    for index, source in enumerate(filter(None, sources)):
        node.input[index] = source[0]
    node.attribute.extend([helper.make_attribute("q_num_heads", heads), helper.make_attribute("kv_num_heads", heads)])
    node.output[0] = flat.output[0]
    graph.graph.node.remove(back)
    graph.graph.node.remove(flat)
    return True


def _before_heads(graph: Graph, name: str) -> tuple[str, int] | None:
    """The [batch, length, hidden] tensor behind a [batch, heads, length, size] one, and `size`."""
    transpose = graph.made_by(name, "Transpose")
    if transpose is None or not _heads_first(transpose):
        return None
    reshape = graph.made_by(transpose.input[0], "Reshape")
    size = graph.last_target(reshape.input[1]) if reshape is not None else None
    return (reshape.input[0], size) if reshape is not None and size is not None else None


def _heads_first(transpose: onnx.NodeProto) -> bool:
    return any(item.name == "perm" and list(item.ints) == HEADS_FIRST for item in transpose.attribute)


def _fold_transposed(model: onnx.ModelProto) -> None:
    """Transposed weights as weights. The exporter folds them itself, but not where several layers share one."""
    graph = model.graph
    weights = {item.name: item for item in graph.initializer}
    made: dict[tuple[str, tuple[int, ...]], str] = {}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type != "Transpose" or node.input[0] not in weights:
            kept.append(node)
            continue
        array = numpy_helper.to_array(weights[node.input[0]])
        order = next((tuple(item.ints) for item in node.attribute if item.name == "perm"), None)
        order = order or tuple(reversed(range(array.ndim)))
        key = (node.input[0], order)
        if key not in made:
            made[key] = f"{node.input[0]}_transposed_{len(made)}"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array.transpose(order)), made[key]))
        renamed[node.output[0]] = made[key]
    if not renamed:
        return
    for node in kept:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)


def _own_gelu(node: onnx.NodeProto) -> bool:
    if node.op_type != "Gelu" or node.domain:
        return False
    if any(item.name == "approximate" and item.s == b"tanh" for item in node.attribute):
        return False
    node.domain = MICROSOFT
    del node.attribute[:]
    return True


def import_domain(model: onnx.ModelProto, domain: str) -> None:
    if all(item.domain != domain for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, 1))


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove nodes and weights that nothing reads any more. Nodes are in topological order, so one pass does."""
    needed = {item.name for item in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    weights = [item for item in model.graph.initializer if item.name in needed]
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
