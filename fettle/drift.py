"""An early warning without labels: answers that leave at other places, or with other scores, than they did on `test`.

It says that the traffic is not what the operating point was certified on, and not that the promise is broken: that is
for the evidence of `fettle.evidence`, which needs the reference's answers. Windows of answers are compared with the
test rows, each window for itself.

A warning needs an effect and significance. With many answers the smallest difference is significant, and with few any
difference may be chance; and the test takes answers for independent, which repeated texts are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fettle.manifest import OperatingPoint, Outcome

WINDOW = 1000
SCORE_BINS = 20
# The usual rule for the population stability index: below 0.1 stable, above 0.25 another population.
LEAST_PSI = 0.1
MOST_P = 1e-4
# Cochran's rule for chi-square tests: expected counts of five at the least (Biometrics 10, 1954).
LEAST_EXPECTED = 5.0

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Drift:
    """The last full window against the test rows; `scores_*` are None where the family has no scores to compare with.

    `exits_*` are about where answers were given, by step and stage. `*_p` is the p-value of a two-sample chi-square
    test, `*_psi` the population stability index.
    """

    warning: bool
    answers: int
    exits_p: float
    exits_psi: float
    scores_p: float | None
    scores_psi: float | None


@dataclass(slots=True)
class DriftWatch:
    """Collects one point's answers; each full window gives a verdict, which stands until the next."""

    baseline: Outcome
    verdict: Drift | None = None
    _places: Counts | None = None
    _scores: Counts | None = None

    def add(self, answered: Sequence[Sequence[int]], scores: Sequence[int]) -> None:
        """Counts since the last call; those that do not fit the point, by steps and stages, are left out."""
        if [len(step) for step in answered] != [len(step) for step in self.baseline.answered]:
            return
        places, binned = _flat(answered), np.zeros(SCORE_BINS, np.int64)
        if len(scores) == SCORE_BINS:
            binned += np.asarray(scores, np.int64)
        self._places = places if self._places is None else self._places + places
        self._scores = binned if self._scores is None else self._scores + binned
        if self._places.sum() >= WINDOW:
            self.verdict = compare(self.baseline, self._places, self._scores)
            self._places = self._scores = None


def watch_of(point: OperatingPoint) -> DriftWatch | None:
    """None where the point was not tried on `test`, so that there is nothing to compare with."""
    return None if point.test is None else DriftWatch(point.test)


def score_bins(scores: ArrayLike) -> list[int]:
    """How many of the scores in [0, 1] lie in each of 20 equal bins, 1 in the last; NaN is in none."""
    finite = np.asarray(scores, np.float64).ravel()
    finite = finite[np.isfinite(finite)]
    places = np.clip((finite * SCORE_BINS).astype(np.int64), 0, SCORE_BINS - 1)
    counted: list[int] = np.bincount(places, minlength=SCORE_BINS).tolist()
    return counted


def compare(baseline: Outcome, places: Counts, scores: Counts) -> Drift:
    """One window against the test rows: `places` by step and stage in one row, `scores` by bin."""
    known = np.rint(np.concatenate([np.asarray(step) for step in baseline.answered]) * baseline.rows).astype(np.int64)
    exits_p, exits_psi = chi_square(known, places), stability_index(known, places)
    scores_p = scores_psi = None
    seen = np.asarray(baseline.scores, np.int64)
    if seen.sum() and scores.sum():
        scores_p, scores_psi = chi_square(seen, scores), stability_index(seen, scores)
    warning = _warns(exits_p, exits_psi) or _warns(scores_p, scores_psi)
    return Drift(warning, int(places.sum()), exits_p, exits_psi, scores_p, scores_psi)


def chi_square(left: Counts, right: Counts) -> float:
    """p-value of Pearson's two-sample test that both were drawn from one distribution over the bins.

    Neighbouring bins are pooled until each expects five of the smaller sample; 1 where less than two are left.
    """
    left, right = _pooled(left, right)
    if len(left) < 2:
        return 1.0
    both = left + right
    total = both.sum()
    statistic = sum(
        float((np.square(sample - both * sample.sum() / total) / (both * sample.sum() / total)).sum())
        for sample in (left, right)
    )
    # As long to import as all that a router needs for this module.
    from scipy.special import chdtrc

    return float(chdtrc(len(both) - 1, statistic))


def stability_index(left: Counts, right: Counts) -> float:
    """Population stability index: the sum over the bins of (q - p) ln(q / p), p and q the shares of the two samples.

    Half a count is added to each bin, so that an empty one counts much and not infinitely. Bins are pooled as in
    `chi_square`.
    """
    left, right = _pooled(left, right)
    if len(left) < 2:
        return 0.0
    p, q = ((sample + 0.5) / (sample + 0.5).sum() for sample in (left, right))
    return float(((q - p) * np.log(q / p)).sum())


def _pooled(left: Counts, right: Counts) -> tuple[Counts, Counts]:
    smaller, total = min(left.sum(), right.sum()), left.sum() + right.sum()
    if not smaller:
        return left[:0], right[:0]
    groups: list[tuple[int, int]] = []
    open_left = open_right = 0
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        open_left, open_right = open_left + a, open_right + b
        if (open_left + open_right) * smaller / total >= LEAST_EXPECTED:
            groups.append((open_left, open_right))
            open_left = open_right = 0
    if groups:
        last_left, last_right = groups.pop()
        groups.append((last_left + open_left, last_right + open_right))
    pooled = np.array(groups, np.int64).reshape(-1, 2)
    return pooled[:, 0], pooled[:, 1]


def _warns(p: float | None, psi: float | None) -> bool:
    return p is not None and psi is not None and p <= MOST_P and psi >= LEAST_PSI


def _flat(answered: Sequence[Sequence[int]]) -> Counts:
    return np.array([count for step in answered for count in step], np.int64)
