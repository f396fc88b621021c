"""From an output row to an answer, and from two answers to a disagreement. Pure functions over arrays.

Optimize measures with these and the router replies with these, so that what was measured is what is served.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fettle.errors import UsageError
from fettle.manifest import Head, Task, TaskKind

Floats = NDArray[np.float32]

EMBEDDING_COSINE_FLOOR = 0.98
REGRESSION_TOLERANCE = 0.05


def probabilities(values: Floats, task: Task) -> Floats:
    """Logits float32 [rows, width] to scores: softmax, sigmoid for each label, or the numbers themselves."""
    if task.head is Head.SINGLE_LABEL:
        shifted = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)
    if task.head is Head.MULTI_LABEL:
        # By tanh, since exp(-x) overflows for large negative logits.
        return np.asarray((np.tanh(values / 2) + 1) / 2, np.float32)
    return values


def confidence(values: Floats, task: Task, temperature: float | Floats = 1.0) -> Floats:
    """The score that decides whether an answer is taken: float32 [rows], in [0, 1], NaN where the values are NaN.

    `temperature` divides the logits; one for all rows, or float32 [rows, 1].

    Top-2 margin of the softmax for single labels; for several labels, that of the label nearest to 0.5.

    Raises:
        UsageError: the task has no score (numbers and vectors have none).
    """
    divisor: Floats = np.asarray(temperature, np.float32)
    if task.head is Head.SINGLE_LABEL and task.width > 1:
        top = np.partition(probabilities(values / divisor, task), -2, axis=1)
        margin: Floats = top[:, -1] - top[:, -2]
        return margin
    if task.head is Head.MULTI_LABEL:
        nearest: Floats = np.abs(np.tanh(values / (2 * divisor))).min(axis=1)
        return nearest
    raise UsageError(f"answers of kind {task.head or task.kind} have no confidence to exit or escalate by")


def cosine(left: Floats, right: Floats) -> Floats:
    """Row by row cosine similarity of two [rows, width] arrays; 0 where either is zero."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    result: Floats = np.divide(np.einsum("ij,ij->i", left, right), norms, out=np.zeros_like(norms), where=norms > 0)
    return result


def disagreements(
    values: Floats, reference: Floats, task: Task, cosine_floor: float = EMBEDDING_COSINE_FLOOR
) -> NDArray[np.bool_]:
    """Which rows are answered otherwise than by the reference: bool [rows]. NaN never agrees."""
    changed: NDArray[np.bool_] = _changed(values, reference, task, cosine_floor)
    return changed | ~np.isfinite(values).all(axis=1)


def _changed(values: Floats, reference: Floats, task: Task, cosine_floor: float) -> Any:
    if task.kind is TaskKind.EMBED:
        return cosine(values, reference) < cosine_floor
    match task.head:
        case Head.MULTI_LABEL:
            return ((values > 0) != (reference > 0)).any(axis=1)
        case Head.REGRESSION:
            # Relative to how far apart the reference's own answers lie.
            scale = max(float(reference.std()), 1e-6)
            return (np.abs(values - reference) > REGRESSION_TOLERANCE * scale).any(axis=1)
        case _:
            return values.argmax(axis=1) != reference.argmax(axis=1)


def loss_in_words(task: Task, cosine_floor: float = EMBEDDING_COSINE_FLOOR) -> str:
    if task.kind is TaskKind.EMBED:
        return f"cosine to the reference's vector below {cosine_floor:g}"
    match task.head:
        case Head.MULTI_LABEL:
            return "any label on the other side of 0.5"
        case Head.REGRESSION:
            return f"off by more than {REGRESSION_TOLERANCE} standard deviations of the reference's answers"
        case _:
            return "another label first"


def truncated_vectors(vectors: Floats, dimensions: int | None) -> Floats:
    """The first `dimensions` values of each vector, normalised again (Matryoshka); all of them if None."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    return normalized(vectors[:, :dimensions])


def normalized(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Floats = vectors / np.maximum(lengths, 1e-12)
    return result
