"""Weights to 4 or 8 bits by blocks: a scale for every so many inputs of each output channel, as MatMulNBits has them.

Codes of 4 bits are -8 to 7 around 0; only half-quadratic rounding gives each block a zero point of its own. Scales may
be negative, so that the larger side of a block has the extra step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.rounding import LIMIT, Floats, feed_errors_on

LOW, HIGH = -8, 7
STEPS = HIGH - LOW
# Scales that are tried, in units of the one that reaches a block's largest weight.
TRIED = np.linspace(0.6, 1.1, 26, dtype=np.float32)
# Of the half-quadratic rounding: the norm of the errors, what couples the two halves, and its growth.
NORM, COUPLING, GROWTH, ITERATIONS = 0.7, 10.0, 1.01, 20
NEVER_ZERO = 1e-8


@dataclass(frozen=True)
class Blocks:
    """(`codes` int8 [inputs, outputs] - `zeros`) * `scales`, both [blocks, outputs]: float32, and int8 or None for 0.

    Each row of them serves `size` inputs, the last one those that are left.
    """

    codes: NDArray[np.int8]
    scales: Floats
    size: int
    zeros: NDArray[np.int8] | None = None
    bits: int = 4

    def values(self) -> Floats:
        codes = self.codes.astype(np.float32)
        if self.zeros is not None:
            codes -= spread(self.zeros.astype(np.float32), self.size, len(codes))
        return codes * spread(self.scales, self.size, len(codes))


def round_blocks(weight: Floats, size: int) -> Blocks:
    """To the nearest step, of scales that reach each block's largest weight."""
    return _nearest(weight, peak_scales(weight, size), size)


def round_blocks_to_8_bits(weight: Floats, size: int) -> Blocks:
    peaks = np.abs(_blocks(weight, size)).max(axis=1)
    scales = np.where(peaks == 0, 1, peaks / LIMIT).astype(np.float32)
    codes = np.clip(np.round(weight / spread(scales, size, len(weight))), -LIMIT, LIMIT)
    return Blocks(codes.astype(np.int8), scales, size, bits=8)


def round_blocks_fitted(weight: Floats, size: int, importance: Floats | None = None) -> Blocks:
    """To the nearest step, of the scales that cost least in squares; an input's count `importance` [inputs] times."""
    return _nearest(weight, fitted_scales(weight, size, importance), size)


def round_blocks_with_feedback(weight: Floats, gram: Floats, size: int) -> Blocks:
    """As `rounding.round_with_feedback` does (GPTQ), on scales fitted to the data behind `gram` [inputs, inputs]."""
    scales = fitted_scales(weight, size, np.asarray(np.diag(gram), np.float32))
    codes = feed_errors_on(weight, gram, spread(scales, size, len(weight)), LOW, HIGH)
    return Blocks(codes, scales, size)


def round_blocks_half_quadratic(weight: Floats, size: int) -> Blocks:
    """Without data: zero points that leave few large errors (HQQ, Badri and Shaji 2023), rounded to whole steps, since
    the kernels with int8 sums take no others."""
    blocks = _blocks(weight, size)
    low = blocks.min(axis=1, keepdims=True)
    steps = STEPS / np.maximum(blocks.max(axis=1, keepdims=True) - low, NEVER_ZERO)
    zeros, coupling, least = LOW - low * steps, COUPLING, np.inf
    for _ in range(ITERATIONS):
        codes = np.clip(np.round(blocks * steps + zeros), LOW, HIGH)
        errors = blocks - (codes - zeros) / steps
        if np.abs(errors).mean() >= least:
            break
        least = float(np.abs(errors).mean())
        size_of = np.maximum(np.abs(errors), NEVER_ZERO)
        kept = np.sign(errors) * np.maximum(size_of - size_of ** (NORM - 1) / coupling, 0)
        zeros = np.mean(codes - (blocks - kept) * steps, axis=1, keepdims=True)
        coupling *= GROWTH
    zeros = np.clip(np.round(zeros), LOW, HIGH)
    codes = np.clip(np.round(blocks * steps + zeros), LOW, HIGH)
    flat = codes.reshape(-1, weight.shape[1])[: len(weight)]
    return Blocks(flat.astype(np.int8), (1 / steps[:, 0]).astype(np.float32), size, zeros[:, 0].astype(np.int8))


def peak_scales(weight: Floats, size: int) -> Floats:
    """float32 [blocks, outputs], of the sign that puts a block's largest weight on -8; 1 for a block of zeros."""
    blocks = _blocks(weight, size)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(largest == 0, 1, largest / LOW).astype(np.float32)


def fitted_scales(weight: Floats, size: int, importance: Floats | None = None) -> Floats:
    """Of `TRIED` times the peak's scale, in either sign, the one that costs a block least."""
    blocks, peaks = _blocks(weight, size), peak_scales(weight, size)
    counts = np.ones(len(weight), np.float32) if importance is None else importance
    shares = _blocks(counts[:, None], size)
    best, least = peaks.copy(), np.full(peaks.shape, np.inf, np.float32)
    for factor in (*TRIED, *-TRIED):
        scales = peaks * factor
        rounded = np.clip(np.round(blocks / scales[:, None]), LOW, HIGH) * scales[:, None]
        costs = np.sum((rounded - blocks) ** 2 * shares, axis=1)
        better = costs < least
        best[better], least[better] = scales[better], costs[better]
    return best


def spread(each: Floats, size: int, inputs: int) -> Floats:
    """[inputs, outputs] of [blocks, outputs]."""
    return np.repeat(each, size, axis=0)[:inputs]


def packed(blocks: Blocks) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8] | None]:
    """MatMulNBits's constants: codes uint8 [outputs, blocks, bytes], of 4 bits the earlier input in the lower half;
    scales float32 [outputs * blocks]; zero points uint8 [outputs * ceil(blocks / 2)], None for its default."""
    middle = 1 << (blocks.bits - 1)
    each = _blocks(blocks.codes, blocks.size).astype(np.int16) + middle
    codes = np.ascontiguousarray(each.transpose(2, 0, 1).astype(np.uint8))
    scales = np.ascontiguousarray(blocks.scales.T).reshape(-1)
    if blocks.bits == 8:
        return codes, scales, None
    zeros = None
    if blocks.zeros is not None:
        whole = (blocks.zeros.T + middle).astype(np.uint8)
        zeros = _halves(np.pad(whole, ((0, 0), (0, whole.shape[1] % 2)))).reshape(-1)
    return _halves(codes), scales, zeros


def _nearest(weight: Floats, scales: Floats, size: int) -> Blocks:
    codes = np.clip(np.round(weight / spread(scales, size, len(weight))), LOW, HIGH)
    return Blocks(codes.astype(np.int8), scales, size)


def _blocks(array: NDArray[Any], size: int) -> NDArray[Any]:
    """[blocks, size, outputs], filled up with zeros."""
    missing = -len(array) % size
    return np.pad(array, ((0, missing), (0, 0))).reshape(-1, size, array.shape[1])


def _halves(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(codes[..., 0::2] | codes[..., 1::2] << 4)
