"""What a caller tolerates, and what is promised in return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fettle.errors import UsageError

EXACT: Literal["exact"] = "exact"

Tolerance = float | Literal["exact"] | None


@dataclass(frozen=True, slots=True)
class Bound:
    """What is certified: at most `alpha` of the answers differ from the reference's, at confidence 1 - `delta`.

    `upper_bound` is the tighter figure that the same calibration rows give.
    """

    alpha: float
    delta: float
    upper_bound: float


def share(tolerance: float | str) -> float:
    """A tolerance as a share in [0, 1]; "exact" is 0.

    Raises:
        UsageError: it is none.
    """
    if tolerance == EXACT:
        return 0.0
    try:
        value = float(tolerance)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 <= value <= 1:
        raise UsageError(
            f"max_disagreement must be a share from 0 to 1, such as 0.01, or exact; not {tolerance!r}",
            param="max_disagreement",
        )
    return value
