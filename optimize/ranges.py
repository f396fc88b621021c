"""What flows through a graph on the user's own texts, and the ranges that follow from it.

Rows run alone, so that no padding is counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fettle.errors import DataError, PassError
from fettle.manifest import TokenizerSpec
from fettle.rows import Rows
from optimize.export import fits_one_file, input_names, save_graph
from optimize.linear_layers import STEPS, Linear, PerRow, Scheme, Static, equalised
from optimize.rounding import Floats, round_nearest
from workers.onnx_encoder import ORT_ERRORS, session_options

Method = Literal["minmax", "percentile", "error"]
Feed = dict[str, NDArray[Any]]

TOKENS_OF_A_ROW = 16
LARGEST_SAMPLE = 1024
# Statistics of more tensors than fit are gathered in several passes over the rows.
MEMORY_BYTES = 512 << 20
PERCENTILE = 99.99
CLIPS = (0.95, 0.9, 0.8, 0.7)
EXPONENTS = (0.5, 0.65, 0.8, 0.9, 1.0)
NEVER_ZERO = 1e-6
PROVIDERS = ["CPUExecutionProvider"]


@dataclass
class Observed:
    """One tensor: a sample of its tokens float32 [some, width], and of all `tokens` the sum of x x^T and the peak."""

    sample: Floats
    gram: Floats | None
    peak: float
    tokens: int


@dataclass
class _Tally:
    gram: Floats | None = None
    peak: float = 0.0
    tokens: int = 0
    taken: list[Floats] = field(default_factory=list)
    waiting: list[Floats] = field(default_factory=list)

    def count(self, tokens: Floats, random: np.random.Generator, *, gram: bool, first: bool) -> None:
        self.peak = max(self.peak, float(np.abs(tokens).max()))
        self.tokens += len(tokens)
        taken = random.permutation(len(tokens))[:TOKENS_OF_A_ROW]
        self.taken.append(tokens[np.union1d(taken, 0) if first else taken])
        if gram:
            self.waiting.append(tokens)
            if sum(map(len, self.waiting)) >= LARGEST_SAMPLE:
                self.multiply()

    def multiply(self) -> None:
        """Take the waiting tokens into the sum, many at once, since each product reads and writes all of it."""
        if self.waiting:
            tokens = np.concatenate(self.waiting)
            product = tokens.T @ tokens
            self.gram = product if self.gram is None else self.gram + product
            self.waiting.clear()


def observe(
    model: onnx.ModelProto, widths: dict[str, int], rows: Rows, spec: TokenizerSpec, *, grams: bool
) -> Iterator[tuple[str, Observed]]:
    """Run `rows` through the graph and yield what was seen of each tensor; `widths` gives their last dimensions.

    Raises:
        DataError: there are no rows.
        PassError: ONNX Runtime does not run the graph.
    """
    if not len(rows):
        raise DataError("calibration needs at least one row; give a data file with texts")
    yield from observe_feeds(model, widths, lambda: single_rows(rows, spec), grams=grams)


def observe_feeds(
    model: onnx.ModelProto,
    widths: dict[str, int],
    feeds: Callable[[], Iterator[Feed]],
    *,
    grams: bool,
    first: bool = False,
) -> Iterator[tuple[str, Observed]]:
    """The same of any graph: `feeds` gives its inputs, call by call, as often as it is asked.

    Args:
        first: samples hold the first token of every call.
    """
    for names in _portions(widths, grams):
        session = _session_with(model, names)
        tallies = {name: _Tally() for name in names}
        random = np.random.default_rng(0)
        for feed in feeds():
            for name, value in zip(names, _run(session, names, feed), strict=True):
                tallies[name].count(value.reshape(-1, value.shape[-1]), random, gram=grams, first=first)
        for name, tally in tallies.items():
            tally.multiply()
            taken = np.concatenate(tally.taken)
            kept = random.permutation(len(taken))[:LARGEST_SAMPLE]
            yield name, Observed(taken[kept], tally.gram, tally.peak, tally.tokens)


def single_rows(rows: Rows, spec: TokenizerSpec) -> Iterator[Feed]:
    """Graph inputs, one row at a time."""
    ends = np.cumsum(rows.lengths)
    for index, end in enumerate(ends):
        inside = slice(int(end - rows.lengths[index]), int(end))
        types = None if rows.type_ids is None else rows.type_ids[inside]
        row = Rows(rows.ids[inside], rows.lengths[index : index + 1], types)
        yield dict(zip(input_names(spec), row.padded(spec.pad_id), strict=False))


def outputs_of(model: onnx.ModelProto, rows: Rows, spec: TokenizerSpec) -> Floats:
    """All of the graph's answers, float32 [rows, sum of their widths]; hidden states between stages are none."""
    session = _session_with(model, [])
    names = [item.name for item in session.get_outputs() if item.type == "tensor(float)" and len(item.shape) == 2]
    return np.concatenate([np.concatenate(_run(session, names, feed), axis=1) for feed in single_rows(rows, spec)])


def static_range(sample: Floats, linears: list[Linear], method: Method) -> Static:
    """One range for a tensor, without equalisation: its extremes, a percentile, or what costs the layers least."""
    if method == "percentile":
        low, high = np.percentile(sample, [100 - PERCENTILE, PERCENTILE])
        return Static(float(low), float(high))
    whole = Static(float(sample.min()), float(sample.max()))
    return whole if method == "minmax" else _clipped(sample, _joined(linears), whole)


def equalising_range(sample: Floats, linears: list[Linear]) -> Static:
    """The channels' factors and the range that cost the layers least.

    Factors are peak^e / weight peak^(1 - e), with the exponent e chosen here (SmoothQuant, Xiao et al. 2023,
    arXiv:2211.10438); then the range is clipped if that helps.
    """
    weight = _joined(linears)
    peaks = np.maximum(np.abs(sample).max(axis=0), NEVER_ZERO)
    reach = np.maximum(np.abs(weight).max(axis=1), NEVER_ZERO)
    candidates = []
    for exponent in EXPONENTS:
        factors = peaks**exponent / reach ** (1 - exponent)
        factors = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
        even = sample / factors
        candidates.append(Static(float(even.min()), float(even.max()), factors))
    best = min(candidates, key=lambda scheme: output_error(sample, weight, scheme))
    return _clipped(sample, weight, best)


def output_error(sample: Floats, weight: Floats, scheme: Scheme) -> float:
    """Mean squared error of `sample @ weight` under a scheme, in units of its mean square."""
    exact = sample @ weight
    rounded = round_nearest(equalised(weight, scheme)).values()
    error = float(np.mean((_rounded(sample, scheme) @ rounded - exact) ** 2))
    return error / max(float(np.mean(exact**2)), NEVER_ZERO**2)


def joined_error(sample: Floats, linears: list[Linear], scheme: Scheme) -> float:
    """`output_error` of the layers that read one tensor, taken together."""
    return output_error(sample, _joined(linears), scheme)


def _rounded(sample: Floats, scheme: Scheme) -> Floats:
    if isinstance(scheme, Static):
        even = sample if scheme.factors is None else sample / scheme.factors
        scale, zero = scheme.scale, scheme.zero
        return np.asarray((np.clip(np.round(even / scale) + zero, 0, STEPS) - zero) * scale, np.float32)
    assert isinstance(scheme, PerRow)
    scales = np.maximum(np.abs(sample).max(axis=1, keepdims=True), NEVER_ZERO) / (STEPS // 2)
    return np.asarray(np.round(sample / scales) * scales, np.float32)


def _clipped(sample: Floats, weight: Floats, whole: Static) -> Static:
    narrower = [Static(whole.low * clip, whole.high * clip, whole.factors) for clip in CLIPS]
    return min([whole, *narrower], key=lambda scheme: output_error(sample, weight, scheme))


def _joined(linears: list[Linear]) -> Floats:
    return np.concatenate([linear.weight for linear in linears], axis=1)


def _portions(widths: dict[str, int], grams: bool) -> Iterator[list[str]]:
    portion: list[str] = []
    used = 0
    for name, width in widths.items():
        size = 4 * width * (3 * LARGEST_SAMPLE + (width if grams else 0))
        if portion and used + size > MEMORY_BYTES:
            yield portion
            portion, used = [], 0
        portion.append(name)
        used += size
    if portion:
        yield portion


def _session_with(model: onnx.ModelProto, names: list[str]) -> ort.InferenceSession:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    there = {item.name for item in probe.graph.output}
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in there
    )
    try:
        if fits_one_file(probe):
            return ort.InferenceSession(probe.SerializeToString(), session_options(1), providers=PROVIDERS)
        with tempfile.TemporaryDirectory() as folder:
            save_graph(probe, Path(folder) / "probe.onnx")
            return ort.InferenceSession(Path(folder) / "probe.onnx", session_options(1), providers=PROVIDERS)
    except ORT_ERRORS as error:
        raise PassError(f"ONNX Runtime does not load the graph to be quantized: {str(error)[:200]}") from error


def _run(session: ort.InferenceSession, names: list[str], feed: Feed) -> list[Floats]:
    try:
        values: list[Floats] = session.run(names, feed)
    except ORT_ERRORS as error:
        raise PassError(f"ONNX Runtime failed on a calibration row: {str(error)[:200]}") from error
    return values
