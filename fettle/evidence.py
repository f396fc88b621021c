"""Evidence that may be looked at all the time: that an operating point breaks its promise, and that it keeps it.

Both are e-processes over pairs of answers, the point's and the reference's: the capital of a gambler who bets against
a hypothesis and starts with 1. While the hypothesis is true, the capital ever reaches 1/delta with probability delta at
most (Ville, "Etude critique de la notion de collectif", 1939), however often and whenever anybody looks. A binomial
p-value has no such guarantee: who looks after every pair will see one below 5 % sooner or later.

The bets are those of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (Journal of the
Royal Statistical Society B 86, 2024): the capital is multiplied by 1 + nu (L - alpha) at each pair, L = 1 where the
answers differ and 0 where they agree. With nu = (a1 - alpha) / (alpha (1 - alpha)) this is the likelihood ratio of a
coin of a1 to one of alpha: a1/alpha for a difference, (1 - a1)/(1 - alpha) for none. So the capital depends on how many
pairs there were and how many differed, and not on their order. An average of such capitals is one again.

Pure functions of counts; who keeps the counts is `fettle.quality`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fettle.errors import UsageError

# The true risks that are bet on, as multiples of alpha: to raise the alarm, and to certify.
ABOVE = (1.5, 2.0, 4.0)
BELOW = (0.2, 0.5, 0.8)


def log_evidence(errors: ArrayLike, rows: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """The natural logarithm of the evidence that the risk exceeds `alpha`, after `errors` in `rows` pairs.

    Averaged over the risks 1.5, 2 and 4 alpha; halfway from alpha to 1 where a multiple is beyond that, so that it
    holds for every alpha below 1. Arrays broadcast.

    Raises:
        UsageError: alpha is not between 0 and 1.
    """
    _check(alpha)
    return _log_mixture(errors, rows, alpha, _above(alpha))


def alarms(errors: int, rows: int, alpha: float, delta: float) -> bool:
    """Whether the evidence has reached 1/delta; for a point that keeps its promise, ever, with probability delta."""
    return bool(log_evidence(errors, rows, alpha) >= -math.log(delta))


def expected_samples(risk: float, alpha: float, delta: float) -> float:
    """How many pairs it takes to the alarm on average where the true disagreement is `risk`; infinite up to alpha.

    Each pair adds g = risk ln(a1/alpha) + (1 - risk) ln((1 - a1)/(1 - alpha)) to the log of the capital that bets on
    a1, on average. The average over three is at least a third of the best one's, so the alarm comes when the best has
    ln(1/delta) + ln 3; by Wald's equation (Annals of Mathematical Statistics 15, 1944) after that over g pairs. Left
    out is by how much the last pair oversteps the line, ln(a1/alpha) / g at most.
    """
    _check(alpha)
    _check(risk)
    bets = _above(alpha)
    growth = float(np.max(risk * np.log(bets / alpha) + (1 - risk) * np.log((1 - bets) / (1 - alpha))))
    return (-math.log(delta) + math.log(len(bets))) / growth if growth > 0 else math.inf


def log_evidence_below(errors: ArrayLike, rows: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """The natural logarithm of the evidence that the risk is below `alpha`, after `errors` in `rows` pairs.

    Averaged over the risks 0.2, 0.5 and 0.8 alpha. It grows with alpha for given counts: what rejects one alpha
    rejects every larger one. Hence the whole of `bound_at_any_time` is wrong with probability delta at most, for all
    levels that are tried and all moments at which they are.
    """
    _check(alpha)
    return _log_mixture(errors, rows, alpha, alpha * np.array(BELOW))


def bound_at_any_time(errors: int, rows: int, delta: float) -> float:
    """The risk that is exceeded with probability delta at most, whenever and however often it is asked for.

    The smallest alpha below which the risk is, by evidence of 1/delta; 1 where there is none. Wider than the bound of
    Clopper and Pearson (`fettle.certificates.upper_bound`), which holds for a number of rows that was fixed beforehand.
    """
    if errors >= rows:
        return 1.0
    target = -math.log(delta)

    def missing(alpha: float) -> float:
        return float(log_evidence_below(errors, rows, alpha)) - target

    lowest, highest = 1e-12, 1 - 1e-12
    if missing(highest) < 0:
        return 1.0
    found: float = _root(missing, lowest, highest, xtol=1e-12)
    return found


def pairs_needed(errors: int, rows: int, alpha: float, delta: float) -> int | None:
    """How many pairs it takes until the risk is shown to be below `alpha`, if errors go on at their present share.

    None where no number would do: the share is too near to alpha, or above it.
    """
    share = errors / rows if rows else 0.0
    target = -math.log(delta)
    bets = alpha * np.array(BELOW)
    growth = share * np.log(BELOW) + (1 - share) * np.log((1 - bets) / (1 - alpha))
    if growth.max() <= 0:
        return None

    def missing(count: float) -> float:
        return float(log_evidence_below(share * count, count, alpha)) - target

    # The evidence is convex in the count and starts below the line, so it crosses it once.
    enough = (target + math.log(len(BELOW))) / float(growth.max()) + 1
    return math.ceil(_root(missing, 0.0, enough, xtol=0.01))


def _root(of: Callable[[float], float], low: float, high: float, xtol: float, rtol: float = 1e-9) -> float:
    # Imported when it is needed: of all that a service imports, this would take longest, and no service needs it.
    from scipy.optimize import brentq

    found: float = brentq(of, low, high, xtol=xtol, rtol=rtol)
    return found


def _above(alpha: float) -> NDArray[np.float64]:
    return np.minimum(alpha * np.array(ABOVE), (1 + alpha) / 2)


def _log_mixture(errors: ArrayLike, rows: ArrayLike, alpha: float, bets: NDArray[np.float64]) -> NDArray[np.float64]:
    wrong = np.asarray(errors, np.float64)
    right = np.asarray(rows, np.float64) - wrong
    capitals = np.stack([wrong * math.log(a1 / alpha) + right * math.log((1 - a1) / (1 - alpha)) for a1 in bets])
    found: NDArray[np.float64] = np.logaddexp.reduce(capitals, axis=0) - math.log(len(bets))
    return found


def _check(share: float) -> None:
    if not 0 < share < 1:
        raise UsageError(f"{share} is no share between 0 and 1; give a level such as 0.01")
