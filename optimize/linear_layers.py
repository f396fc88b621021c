"""The linear layers of an ONNX graph with constant weights: found, and rewritten to int8 products.

Activations become uint8, weights int8 with one scale for each output channel, sums int32. Two ways to scale the
activations, neither of which looks at the other rows of a batch:

- `Static`: one range for the tensor, known beforehand; the channels may be equalised by a multiplication first.
- `PerRow`: each token has a scale of its own, found at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from optimize.fuse import MICROSOFT, Graph, drop_unused, import_domain
from optimize.rounding import Floats, Rounded

STEPS = 255
ZERO = 128
# Nothing that GELU gives lies below; its minimum is -0.16997.
GELU_FLOOR = 0.17
SMALLEST = 1e-20


@dataclass(frozen=True)
class Linear:
    """`output` = `source` [..., inputs] @ `weight` [inputs, outputs] + `bias` [outputs], as one node or two."""

    product: onnx.NodeProto
    addition: onnx.NodeProto | None
    source: str
    output: str
    name: str
    weight: Floats
    bias: Floats | None


@dataclass(frozen=True)
class Static:
    """Values from `low` to `high` keep their distances; `factors` [inputs] divide the channels beforehand."""

    low: float
    high: float
    factors: Floats | None = None

    @property
    def scale(self) -> float:
        return max(max(self.high, 0.0) - min(self.low, 0.0), SMALLEST) / STEPS

    @property
    def zero(self) -> int:
        return int(np.clip(round(-min(self.low, 0.0) / self.scale), 0, STEPS))


@dataclass(frozen=True)
class PerRow:
    """Symmetric around 0; or, with `floor` > 0, from `-floor` up, which nothing lies below, to the row's largest value.

    With a floor a step is `floor / n` for a whole n, so that 0 is a step and the floor's share of every product is the
    same constant. Steps cannot grow past `floor`: beyond 254 floors values saturate.
    """

    floor: float = 0.0


Scheme: TypeAlias = Static | PerRow


def find_linears(model: onnx.ModelProto) -> list[Linear]:
    """MatMul and Gemm with a constant matrix, in graph order; a constant bias added to a MatMul belongs to it."""
    graph = Graph(model)
    found = (_linear(graph, node) for node in model.graph.node if node.op_type in ("MatMul", "Gemm"))
    return [linear for linear in found if linear is not None]


def by_source(linears: list[Linear]) -> dict[str, list[Linear]]:
    """Layers that read the same tensor, such as query, key and value: it is quantized once for all of them."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.source, []).append(linear)
    return groups


def shared_weights(linears: list[Linear]) -> set[str]:
    """Names of weights that several layers use, as in ALBERT."""
    names = [linear.name for linear in linears]
    return {name for name in names if names.count(name) > 1}


def equalised(weight: Floats, scheme: Scheme) -> Floats:
    """The weight that the layer has once its input's channels are divided by the scheme's factors."""
    factors = scheme.factors if isinstance(scheme, Static) else None
    return weight if factors is None else weight * factors[:, None]


def write_int8(
    model: onnx.ModelProto,
    linears: list[Linear],
    schemes: dict[str, Scheme],
    weights: dict[str, Rounded],
    alike: Mapping[str, str] | None = None,
) -> int:
    """Rewrite in place every layer whose source has a scheme; `weights` by the product's first output.

    Args:
        alike: sources with the same value here have the same number of rows, which saves nodes.

    Returns how many layers were rewritten.
    """
    writer = _Writer(model, schemes, alike or {})
    chosen = {linear.product.output[0]: linear for linear in linears if linear.source in schemes}
    dropped = {linear.addition.output[0] for linear in chosen.values() if linear.addition is not None}
    for node in model.graph.node:
        linear = chosen.get(node.output[0])
        if linear is not None:
            writer.layer(linear, weights[node.output[0]])
        elif node.output[0] not in dropped:
            writer.nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(writer.nodes)
    import_domain(model, MICROSOFT)
    drop_unused(model)
    del model.graph.value_info[:]
    return len(chosen)


class _Writer:
    def __init__(self, model: onnx.ModelProto, schemes: dict[str, Scheme], alike: Mapping[str, str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._alike = alike
        self._zeros: dict[str, str] = {}
        self._graph = model.graph
        self._schemes = schemes
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        # By source: the uint8 tensor, and each row's scale where rows have their own.
        self._quantized: dict[str, tuple[str, str | None]] = {}

    def layer(self, linear: Linear, weight: Rounded) -> None:
        if linear.source not in self._quantized:
            self._quantized[linear.source] = self._quantize(linear)
        codes, row_scale = self._quantized[linear.source]
        scheme = self._schemes[linear.source]
        matrix, scales = self._constant(weight.codes), self._constant(weight.scales)
        if isinstance(scheme, Static):
            zero, bias = self._constant(np.uint8(scheme.zero)), self._bias(linear.bias)
            inputs = [codes, matrix, self._constant(np.float32(scheme.scale)), scales, zero, "", bias]
            self._add("MatMulIntegerToFloat", inputs, linear.output, domain=MICROSOFT)
            return
        # With a floor the codes count from it; what it contributes to a product is taken off the bias.
        zero = "" if scheme.floor else self._constant(np.uint8(ZERO))
        inputs = [codes, matrix, self._constant(np.float32(1)), scales, zero]
        sums = self._add("MatMulIntegerToFloat", inputs, domain=MICROSOFT)
        bias = self._bias(_less_floor(linear.bias, weight, scheme.floor))
        assert row_scale is not None
        if bias:
            self._add("Add", [self._add("Mul", [sums, row_scale]), bias], linear.output)
        else:
            self._add("Mul", [sums, row_scale], linear.output)

    def _quantize(self, linear: Linear) -> tuple[str, str | None]:
        scheme = self._schemes[linear.source]
        if isinstance(scheme, PerRow):
            scale, zero = self._row_scale(linear.source, scheme.floor)
            width = linear.weight.shape[0]
            # One block for each row; the per-axis form would need another shape and is no faster.
            return self._add("QuantizeLinear", [linear.source, scale, zero], axis=-1, block_size=width), scale
        source = linear.source
        if scheme.factors is not None:
            source = self._add("Mul", [source, self._constant((1 / scheme.factors).astype(np.float32))])
        limits = [self._constant(np.float32(scheme.scale)), self._constant(np.uint8(scheme.zero))]
        return self._add("QuantizeLinear", [source, *limits]), None

    def _row_scale(self, source: str, floor: float) -> tuple[str, str]:
        """Names of the rows' scales, float32 [..., 1], and of their zero points, uint8 [..., 1]."""
        last = self._constant(np.array([-1]))
        high = self._add("ReduceMax", [source, last], keepdims=1)
        if floor:
            span = self._add("Add", [high, self._constant(np.float32(floor))])
            steps = self._add("Floor", [self._add("Div", [self._constant(np.float32(STEPS * floor)), span])])
            steps = self._add("Max", [steps, self._constant(np.float32(1))])
            scale = self._add("Div", [self._constant(np.float32(floor)), steps])
            return scale, self._add("Cast", [steps], to=TensorProto.UINT8)
        low = self._add("Neg", [self._add("ReduceMin", [source, last], keepdims=1)])
        peak = self._add("Max", [high, low, self._constant(np.float32(SMALLEST))])
        scale = self._add("Mul", [peak, self._constant(np.float32(1 / (ZERO - 1)))])
        key = self._alike.get(source, source)
        if key not in self._zeros:
            zero = numpy_helper.from_array(np.array([ZERO], np.uint8))
            self._zeros[key] = self._add("ConstantOfShape", [self._add("Shape", [scale])], value=zero)
        return scale, self._zeros[key]

    def _bias(self, bias: Floats | None) -> str:
        return "" if bias is None else self._constant(bias.astype(np.float32))

    def _constant(self, value: NDArray[Any] | np.generic) -> str:
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = name = f"int8_constant_{len(self._constants)}"
            self._graph.initializer.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def _add(self, kind: str, inputs: list[str], output: str = "", *, domain: str = "", **settings: Any) -> str:
        name = f"int8_{len(self.nodes)}"
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.nodes.append(helper.make_node(kind, inputs, [output or name], name=name, domain=domain, **settings))
        return output or name


def _less_floor(bias: Floats | None, weight: Rounded, floor: float) -> Floats | None:
    if not floor:
        return bias
    share = floor * weight.codes.sum(axis=0, dtype=np.int64) * weight.scales
    return np.asarray((0.0 if bias is None else bias) - share, np.float32)


def _linear(graph: Graph, node: onnx.NodeProto) -> Linear | None:
    source, name = node.input[0], node.input[1]
    if name not in graph.weights or source in graph.weights:
        return None
    weight = numpy_helper.to_array(graph.weights[name])
    if weight.ndim != 2 or weight.dtype != np.float32:
        return None
    if node.op_type == "MatMul":
        addition, bias = _added_bias(graph, node, weight.shape[1])
        output = node.output[0] if addition is None else addition.output[0]
        return Linear(node, addition, source, output, name, weight, bias)
    settings = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if settings.get("transA", 0) or settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0:
        return None
    weight = weight.T if settings.get("transB", 0) else weight
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = _constant_of(graph, node.input[2], weight.shape[1])
        if bias is None:
            return None
    return Linear(node, None, source, node.output[0], name, weight, bias)


def _added_bias(graph: Graph, node: onnx.NodeProto, width: int) -> tuple[onnx.NodeProto | None, Floats | None]:
    addition = graph.only_reader(node.output[0], "Add")
    if addition is None:
        return None, None
    other = addition.input[1] if addition.input[0] == node.output[0] else addition.input[0]
    bias = _constant_of(graph, other, width)
    return (None, None) if bias is None else (addition, bias)


def _constant_of(graph: Graph, name: str, width: int) -> Floats | None:
    if name not in graph.weights or list(graph.weights[name].dims) != [width]:
        return None
    return np.asarray(numpy_helper.to_array(graph.weights[name]), np.float32)
