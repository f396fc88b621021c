"""How sure a generated answer is: from the log-probabilities of its tokens to the chance that the reference agrees.

A few features of the tokens, weighted and summed, go through a line that rises from knot to knot (`TextScore` in the
manifest). The line is an isotonic fit, so a better raw score never counts for less. Router and `optimize` score with
these functions alike; what comes of a score is `fettle.stopping`'s and the operating point's.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from typing import Final, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fettle.findings import TextFeature as Feature
from fettle.findings import TextScore

Array = NDArray[np.float64]

FEATURES: Final[tuple[Feature, ...]] = get_args(Feature)
# These never rise as a text grows, so what they are now is the most that they can come to.
FALLING: Final = frozenset({"sum", "lowest"})
# Keeps the weights of features that say the same finite; in units of a feature's standard deviation.
RIDGE = 1e-3


class Tally:
    """The features of a text so far; `add` each token's natural log-probability as it comes.

    `sum` and `mean` over the tokens, `lowest`, `tenth` (the quantile at 0.1), `median`, and `length`, the logarithm of
    how many there are. NaN as soon as one token has no log-probability, and where there is no token yet. Values are
    taken in float32, in which traces keep them, so that a replay decides alike.
    """

    __slots__ = ("_sorted", "count", "lowest", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.lowest = math.inf
        self._sorted: list[float] = []

    def add(self, logprob: float) -> None:
        value = float(np.float32(logprob))
        self.count += 1
        self.total += value
        # NaN compares as false, so it has to be carried over by hand.
        if value < self.lowest or math.isnan(value):
            self.lowest = value
        insort(self._sorted, value)

    def get(self, feature: str) -> float:
        if not self.count or math.isnan(self.total):
            return math.nan
        match feature:
            case "sum":
                return self.total
            case "lowest":
                return self.lowest
            case "tenth":
                return self._quantile(0.1)
            case "median":
                return self._quantile(0.5)
            case "mean":
                return self.total / self.count
            case _:
                return math.log(self.count)

    def _quantile(self, share: float) -> float:
        """Between the two nearest in rank, as numpy's default."""
        place = share * (self.count - 1)
        below = int(place)
        low = self._sorted[below]
        if below + 1 == self.count:
            return low
        return low + (place - below) * (self._sorted[below + 1] - low)


def tally(logprobs: Iterable[float], end: float = math.nan) -> Tally:
    """The features of a whole text. `end`: how probable ending was where it ended, one more factor; NaN if unknown."""
    found = Tally()
    for logprob in logprobs:
        found.add(logprob)
    ending = float(np.float32(end))
    if not math.isnan(ending):
        found.add(math.log(ending) if ending > 0 else -math.inf)
    return found


def all_features(found: Tally) -> list[float]:
    """In the order of `FEATURES`."""
    return [found.get(feature) for feature in FEATURES]


def score_of(score: TextScore, found: Tally) -> float:
    """The score in [0, 1]; NaN where a feature is."""
    raw = 0.0
    for feature, weight in score.weights.items():
        raw += weight * found.get(feature)
    return float(_along(score, raw))


def scores_of(score: TextScore, features: Array) -> Array:
    """The same for features float64 [rows, FEATURES]; to the last bit, since thresholds are chosen from these."""
    return _along(score, _raw(score, features))


def never_rises(score: TextScore) -> bool:
    """Whether the score of a text so far is the most that the whole text's can come to."""
    return all(feature in FALLING and weight >= 0 for feature, weight in score.weights.items())


def fit(features: Array, agreed: ArrayLike, weights: dict[Feature, float]) -> TextScore:
    """The isotonic fit for given weights, over rows whose features are not NaN.

    Least squares under the constraint that it never falls, by pooling adjacent violators (Ayer et al., "An empirical
    distribution function for sampling with incomplete information", 1955). Between the middles of two pooled blocks the
    line rises, so that rows of one block still differ, and beyond the last middle it rises to 1. Half a disagreement is
    added at the top, since no sample shows certainty.

    Args:
        features: float64 [rows, FEATURES].
        agreed: bool [rows], whether the reference gives the same answer.
    """
    plain = TextScore(weights=dict(weights), raw=[0.0], agreed=[0.0], rows=1)
    raw = _raw(plain, features)
    fine = np.isfinite(raw)
    raw, truth = raw[fine], np.asarray(agreed, np.float64)[fine]
    if not len(raw):
        return plain
    places, which, counts = np.unique(raw, return_inverse=True, return_counts=True)
    sums = np.bincount(which, weights=truth)
    mass = counts.astype(np.float64)
    mass[-1] += 0.5
    # Who fits imports it, and not every service.
    from scipy.optimize import isotonic_regression

    pooled = isotonic_regression(sums / mass, weights=mass)
    knots, values = [], []
    for first, last in zip(pooled.blocks[:-1], pooled.blocks[1:], strict=True):
        inside = slice(first, last)
        knots.append(float(np.average(places[inside], weights=counts[inside])))
        values.append(float(min(1.0, max(0.0, pooled.x[first]))))
    if places[-1] > knots[-1]:
        knots.append(float(places[-1]))
        values.append(1.0)
    rising = [index for index, knot in enumerate(knots) if index == 0 or knot > knots[index - 1]]
    return TextScore(
        weights=dict(weights),
        raw=[knots[index] for index in rising],
        agreed=[values[index] for index in rising],
        rows=len(raw),
    )


def fit_weights(features: Array, agreed: ArrayLike, among: Sequence[Feature]) -> dict[Feature, float]:
    """Weights under which these features best predict agreement: logistic regression, a little ridged.

    Features that do not vary get no weight; with nothing to learn from, the sum of log-probabilities alone.
    """
    columns = [FEATURES.index(feature) for feature in among]
    fine = np.isfinite(features[:, columns]).all(axis=1)
    chosen, truth = features[fine][:, columns], np.asarray(agreed, np.float64)[fine]
    spread = chosen.std(axis=0) if len(chosen) else np.zeros(len(columns))
    if not spread.any() or truth.min() == truth.max():
        return {"sum": 1.0}
    varies = spread > 0
    scaled = (chosen[:, varies] - chosen[:, varies].mean(axis=0)) / spread[varies]
    signs = np.where(truth > 0, 1.0, -1.0)

    def loss(parameters: Array) -> tuple[float, Array]:
        margins = signs * (scaled @ parameters[1:] + parameters[0])
        pulls = -signs * np.exp(-np.logaddexp(0.0, margins)) / len(signs)
        slopes = np.concatenate([[pulls.sum()], pulls @ scaled + RIDGE * parameters[1:]])
        return float(np.logaddexp(0.0, -margins).mean() + RIDGE / 2 * (parameters[1:] ** 2).sum()), slopes

    from scipy.optimize import minimize

    found = minimize(loss, np.zeros(1 + int(varies.sum())), jac=True, method="L-BFGS-B").x[1:] / spread[varies]
    names = [feature for feature, moves in zip(among, varies, strict=True) if moves]
    return dict(zip(names, found.tolist(), strict=True))


def _raw(score: TextScore, features: Array) -> Array:
    raw: Array = np.zeros(len(features))
    for feature, weight in score.weights.items():
        raw = raw + weight * features[:, FEATURES.index(feature)]
    return raw


def _along(score: TextScore, raw: float | Array) -> Array:
    # With one knot, interp has a value for NaN too.
    line: Array = np.where(np.isnan(raw), np.nan, np.interp(raw, score.raw, score.agreed))
    return line
