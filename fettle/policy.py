"""The decisions that are no queue's and no load's: whether a score suffices, and which variants are worth having.

Pure functions. What fills a batch is `fettle.scheduling`, which point answers at what load `fettle.gears`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
