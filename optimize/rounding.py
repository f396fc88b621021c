"""Weights to int8, one scale for each output channel: to the nearest step, or with each error passed on to the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

BLOCK = 128
DAMPING = 0.01
LIMIT = 127
# Where the processor adds pairs of u8 x s8 products in 16 bits: 2 * 255 * 63 fits.
REDUCED_LIMIT = 63


@dataclass(frozen=True)
class Rounded:
    """`codes` int8 [inputs, outputs] times `scales` float32 [outputs]."""

    codes: NDArray[np.int8]
    scales: Floats

    def values(self) -> Floats:
        return self.codes.astype(np.float32) * self.scales


def channel_scales(weight: Floats, limit: int = LIMIT) -> Floats:
    """float32 [outputs]; 1 for a channel of zeros."""
    peaks = np.abs(weight).max(axis=0)
    return np.asarray(np.where(peaks > 0, peaks, limit) / limit, np.float32)


def round_nearest(weight: Floats, limit: int = LIMIT) -> Rounded:
    scales = channel_scales(weight, limit)
    return Rounded(np.clip(np.round(weight / scales), -limit, limit).astype(np.int8), scales)


def round_with_feedback(weight: Floats, gram: Floats, limit: int = LIMIT) -> Rounded:
    """Round input by input, each time correcting the inputs still to come for the error that was made.

    Minimises the layer's output error on the data behind `gram` [inputs, inputs], the sum of x x^T over its tokens
    (GPTQ, Frantar et al. 2022, arXiv:2210.17323, with the largest diagonal first).
    """
    scales = channel_scales(weight, limit)
    return Rounded(feed_errors_on(weight, gram, np.broadcast_to(scales, weight.shape), -limit, limit), scales)


def feed_errors_on(weight: Floats, gram: Floats, scales: Floats, low: int, high: int) -> NDArray[np.int8]:
    """`round_with_feedback`'s codes from `low` to `high`, of steps that are known: `scales` [inputs, outputs]."""
    order = np.argsort(-np.diag(gram), kind="stable")
    rest = weight[order].astype(np.float64)
    upper = _inverse_root(gram[np.ix_(order, order)])
    codes = np.empty_like(rest)
    inputs = len(order)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = np.empty((end - start, rest.shape[1]))
        for index in range(start, end):
            steps = scales[order[index]]
            codes[index] = np.clip(np.round(rest[index] / steps), low, high)
            error = (rest[index] - codes[index] * steps) / upper[index, index]
            rest[index + 1 : end] -= np.outer(upper[index, index + 1 : end], error)
            errors[index - start] = error
        # What lies beyond the block is corrected once for the whole block, as one product.
        rest[end:] -= upper[start:end, end:].T @ errors
    back = np.argsort(order)
    return codes[back].astype(np.int8)


def _inverse_root(gram: Floats) -> NDArray[np.float64]:
    """The upper U with U^T U = (gram + damping)^-1."""
    damped = gram.astype(np.float64)
    damped[np.diag_indices_from(damped)] += max(DAMPING * float(np.mean(np.diag(damped))), 1e-8)
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T, np.float64)
