"""The early warning: silent on the traffic that a point was tried on, loud on another."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fettle.drift import (
    MOST_P,
    SCORE_BINS,
    WINDOW,
    DriftWatch,
    chi_square,
    compare,
    score_bins,
    stability_index,
    watch_of,
)
from fettle.manifest import Outcome
from tests.unit.test_points import STEP, point

SHARES = np.array([0.61, 0.2, 0.165, 0.025])
SHAPE = (3, 1)


def outcome(rng: np.random.Generator, rows: int = 3434, *, scores: bool = True) -> Outcome:
    places = rng.multinomial(rows, SHARES) / rows
    return Outcome(
        rows=rows,
        errors=10,
        disagreement=10 / rows,
        answered=nested(places),
        cpu_ms_per_row=1.0,
        reference_cpu_ms_per_row=3.0,
        scores=score_bins(draw_scores(rng, rows)) if scores else [],
    )


def nested(places) -> list[list]:
    return [list(part) for part in np.split(np.asarray(places), [SHAPE[0]])]


def draw_scores(rng: np.random.Generator, count: int, a: float = 4.0) -> np.ndarray:
    return rng.beta(a, 1.2, count).astype(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_no_warning_in_many_windows_of_the_same_traffic(rng: np.random.Generator) -> None:
    for _ in range(10):
        watch = DriftWatch(outcome(rng))
        verdicts = set()
        for _ in range(20 * 4):
            watch.add(nested(rng.multinomial(WINDOW // 4, SHARES)), score_bins(draw_scores(rng, WINDOW // 4)))
            if watch.verdict is not None:
                verdicts.add(watch.verdict)
        assert len(verdicts) == 20
        assert not any(verdict.warning for verdict in verdicts)


def test_rows_that_leave_elsewhere_are_a_warning(rng: np.random.Generator) -> None:
    watch = DriftWatch(outcome(rng))
    watch.add(nested(rng.multinomial(WINDOW, [0.4, 0.3, 0.2, 0.1])), score_bins(draw_scores(rng, WINDOW)))
    assert watch.verdict is not None
    assert watch.verdict.warning
    assert watch.verdict.exits_p <= MOST_P
    assert watch.verdict.exits_psi >= 0.1
    assert watch.verdict.scores_p is not None
    assert watch.verdict.scores_p > MOST_P


def test_other_scores_are_a_warning(rng: np.random.Generator) -> None:
    watch = DriftWatch(outcome(rng))
    watch.add(nested(rng.multinomial(WINDOW, SHARES)), score_bins(draw_scores(rng, WINDOW, a=2.0)))
    assert watch.verdict is not None
    assert watch.verdict.warning
    assert watch.verdict.scores_psi is not None
    assert watch.verdict.scores_psi >= 0.1
    assert watch.verdict.exits_psi < 0.1


def test_a_small_difference_in_many_answers_is_no_warning(rng: np.random.Generator) -> None:
    known = outcome(rng, 100_000)
    found = compare(known, rng.multinomial(100_000, [0.59, 0.215, 0.165, 0.03]), np.zeros(SCORE_BINS, np.int64))
    assert found.exits_p < MOST_P
    assert not found.warning


def test_the_verdict_stands_until_the_next_window_is_full(rng: np.random.Generator) -> None:
    watch = DriftWatch(outcome(rng))
    watch.add(nested(rng.multinomial(WINDOW - 1, SHARES)), score_bins(draw_scores(rng, WINDOW - 1)))
    assert watch.verdict is None
    watch.add(nested([1, 0, 0, 0]), score_bins([0.9]))
    first = watch.verdict
    assert first is not None
    assert first.answers == WINDOW
    watch.add(nested([999, 0, 0, 0]), [0] * SCORE_BINS)
    assert watch.verdict is first
    watch.add(nested([1, 0, 0, 0]), [0] * SCORE_BINS)
    assert watch.verdict is not first
    assert watch.verdict is not None
    assert watch.verdict.warning


def test_without_scores_the_places_are_compared_alone(rng: np.random.Generator) -> None:
    watch = DriftWatch(outcome(rng, scores=False))
    watch.add(nested(rng.multinomial(WINDOW, SHARES)), score_bins(draw_scores(rng, WINDOW)))
    assert watch.verdict is not None
    assert (watch.verdict.scores_p, watch.verdict.scores_psi) == (None, None)
    watch = DriftWatch(outcome(rng))
    watch.add(nested(rng.multinomial(WINDOW, SHARES)), [])
    assert watch.verdict is not None
    assert watch.verdict.scores_p is None


def test_what_does_not_fit_the_point_is_left_out(rng: np.random.Generator) -> None:
    watch = DriftWatch(outcome(rng))
    watch.add([[WINDOW]], [0] * SCORE_BINS)
    assert watch.verdict is None


def test_a_point_with_one_place_and_no_scores_never_warns() -> None:
    known = Outcome(
        rows=50, errors=0, disagreement=0, answered=[[1.0]], cpu_ms_per_row=1.0, reference_cpu_ms_per_row=1.0
    )
    tried = point(STEP).model_copy(update={"test": known})
    watch = watch_of(tried)
    assert watch is not None
    watch.add([[5000]], [0] * SCORE_BINS)
    assert watch.verdict is not None
    assert (watch.verdict.warning, watch.verdict.exits_p, watch.verdict.exits_psi) == (False, 1.0, 0.0)
    assert watch_of(point(STEP)) is None


def test_the_test_is_pearsons() -> None:
    left, right = np.array([100, 200, 300]), np.array([60, 70, 80])
    assert chi_square(left, right) == pytest.approx(stats.chi2_contingency([left, right], correction=False).pvalue)


def test_p_values_are_uniform_enough_under_the_same_distribution(rng: np.random.Generator) -> None:
    shares = rng.dirichlet(np.full(SCORE_BINS, 0.3))
    found = [chi_square(rng.multinomial(2000, shares), rng.multinomial(1000, shares)) for _ in range(1000)]
    assert 0.03 <= np.mean(np.array(found) <= 0.05) <= 0.07


def test_sparse_bins_are_pooled() -> None:
    # One stray answer in an empty bin is no evidence of anything.
    left, right = np.array([1000, 0, 1000, 0]), np.array([500, 1, 500, 0])
    assert chi_square(left, right) > 0.9
    assert stability_index(left, right) < 0.01


def test_a_bin_that_was_empty_counts_much_and_not_infinitely() -> None:
    assert 0.5 < stability_index(np.array([1000, 0]), np.array([700, 300])) < 10


def test_scores_by_bin() -> None:
    assert score_bins(np.array([0.0, 0.049, 0.05, 0.999, 1.0, np.nan, 1.0000001], np.float32)) == [
        2,
        1,
        *[0] * 16,
        0,
        3,
    ]
    assert score_bins([]) == [0] * SCORE_BINS
    assert sum(score_bins(np.full(7, np.nan, np.float32))) == 0
