"""The router's decisions, as pure functions: no clock, no server, no model. Times are in seconds unless named `_ms`.

What fills a batch, whether a request is admitted, when to come back, what a row costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class BatchBounds:
    """`rows` and padded `tokens` that one engine call may hold, and the age from which a row is overdue."""

    rows: int
    tokens: int
    max_age_s: float


def choose_batch(lengths: Sequence[int], ages: Sequence[float], bounds: BatchBounds) -> list[int]:
    """Which of the waiting rows go into the next batch, as indices; oldest first on input.

    The oldest row leads. Overdue rows follow in order of age, whatever their length; then come the rows nearest
    to the leader in length, since a batch costs its longest row times its rows. The oldest row is in every batch,
    so no row waits for more batches than there are rows before it.

    Args:
        lengths: tokens of each waiting row.
        ages: seconds that each has waited, not increasing.
    """
    if not lengths:
        return []
    chosen = [0]
    longest = lengths[0]
    overdue = [i for i in range(1, len(lengths)) if ages[i] >= bounds.max_age_s]
    fresh = range(1 + len(overdue), len(lengths))
    nearest = sorted(fresh, key=lambda i: abs(lengths[i] - lengths[0]))
    for index in [*overdue, *nearest]:
        if len(chosen) == bounds.rows:
            break
        widened = max(longest, lengths[index])
        if widened * (len(chosen) + 1) <= bounds.tokens:
            chosen.append(index)
            longest = widened
    return chosen


def admits(backlog_s: float, limit_s: float) -> bool:
    """Whether a request may enter: as long as the work before it drains within the limit.

    The request's own work does not count, so that one that is larger than the limit can be answered by an idle
    system; what waits is thus bounded by the limit and one request.
    """
    return backlog_s < limit_s


def retry_after_s(backlog_s: float, limit_s: float) -> int:
    """Whole seconds until the backlog will be half of the limit; at least one."""
    return max(1, math.ceil(backlog_s - limit_s / 2))


def drain_s(work_ms: float, pace: float, replicas: float) -> float:
    """Predicted time until `work_ms` of table cost is done, on replicas that run `pace` times as long as the table."""
    return work_ms / 1000 * pace / replicas


def corrected_pace(pace: float, predicted_ms: float, observed_ms: float, weight: float = 0.1) -> float:
    """Exponential average of observed over predicted time, bounded so that one outlier cannot close the door."""
    if predicted_ms <= 0:
        return pace
    ratio = min(max(observed_ms / predicted_ms, 0.1), 10.0)
    return pace + weight * (ratio - pace)


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of `(cost, disagreement)` points that no other point beats in one and equals in the other."""

    def dominated(name: str) -> bool:
        cost, loss = points[name]
        return any(
            other_cost <= cost and other_loss <= loss and (other_cost, other_loss) != (cost, loss)
            for other_cost, other_loss in points.values()
        )

    return [name for name in points if not dominated(name)]


def passes(scores: ArrayLike, thresholds: ArrayLike) -> NDArray[np.bool_]:
    """Whether each score reaches its threshold, compared in float32 wherever it is decided; NaN reaches none."""
    return np.asarray(scores, np.float32) >= np.asarray(thresholds, np.float32)
