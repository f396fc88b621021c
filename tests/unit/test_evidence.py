"""Evidence at any time: against the definition, and its promises in simulations with fixed seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.certificates import upper_bound
from fettle.errors import UsageError
from fettle.evidence import (
    ABOVE,
    BELOW,
    alarms,
    bound_at_any_time,
    expected_samples,
    log_evidence,
    log_evidence_below,
    pairs_needed,
)

LONG = 50_000
alphas = st.floats(0.001, 0.5)
losses = st.lists(st.booleans(), max_size=60)
counts = st.tuples(st.integers(0, 3000), st.integers(1, 3000)).map(lambda pair: (min(pair), max(pair)))


def bets(alpha: float) -> list[float]:
    return [min(multiple * alpha, (1 + alpha) / 2) for multiple in ABOVE]


def by_definition(differences: list[bool], alpha: float, risks: list[float]) -> float:
    """E <- E (1 + nu (L - alpha)) for each bet, pair by pair, then averaged."""
    capitals = []
    for a1 in risks:
        nu = (a1 - alpha) / (alpha * (1 - alpha))
        capitals.append(math.prod(1 + nu * (differs - alpha) for differs in differences))
    return sum(capitals) / len(capitals)


def error_times(risk: float, runs: int, seed: int, long: int = LONG) -> np.ndarray:
    """When errors come, counted in pairs from 1: int [runs, many], all of the first `long` pairs and some beyond."""
    most = int(long * risk + 8 * math.sqrt(long * risk) + 20)
    times = np.random.default_rng(seed).geometric(risk, (runs, most)).cumsum(axis=1)
    assert (times[:, -1] > long).all()
    return times


def allowed(share: float, runs: int) -> float:
    """Three standard deviations above: what a share may be found to be in so many runs."""
    return share + 3 * math.sqrt(share * (1 - share) / runs)


def alarm_times(risk: float, alpha: float, delta: float, runs: int, seed: int, long: int = LONG) -> np.ndarray:
    """After how many pairs each run alarms; infinite where it does not within `long`. Only errors can raise it."""
    times = error_times(risk, runs, seed, long)
    errors = np.arange(1, times.shape[1] + 1)
    over = (log_evidence(errors, times, alpha) >= -math.log(delta)) & (times <= long)
    return np.where(over.any(axis=1), times[np.arange(runs), over.argmax(axis=1)], np.inf)


# That a point breaks its promise.


@given(losses, alphas)
def test_the_evidence_is_the_products_of_the_design(differences: list[bool], alpha: float) -> None:
    found = float(log_evidence(sum(differences), len(differences), alpha))
    assert found == pytest.approx(math.log(by_definition(differences, alpha, bets(alpha))), abs=1e-9)


@given(losses, alphas, st.randoms())
def test_the_order_does_not_matter(differences: list[bool], alpha: float, random) -> None:
    shuffled = random.sample(differences, len(differences))
    assert by_definition(differences, alpha, bets(alpha)) == pytest.approx(
        by_definition(shuffled, alpha, bets(alpha)), rel=1e-9
    )


@given(st.floats(0.001, 0.999), st.floats(0, 1))
def test_no_bet_gains_on_average_while_the_promise_is_kept(alpha: float, share: float) -> None:
    risk = share * alpha
    gain = risk * math.exp(log_evidence(1, 1, alpha)) + (1 - risk) * math.exp(log_evidence(0, 1, alpha))
    assert gain <= 1 + 1e-9
    assert all(alpha < a1 < 1 for a1 in bets(alpha))


@given(counts, alphas)
def test_more_errors_are_more_evidence_and_more_agreement_is_less(pair: tuple[int, int], alpha: float) -> None:
    errors, rows = pair
    assert log_evidence(errors + 1, rows + 1, alpha) > log_evidence(errors, rows, alpha)
    assert log_evidence(errors, rows + 1, alpha) < log_evidence(errors, rows, alpha)


def test_the_evidence_of_nothing_is_1() -> None:
    assert log_evidence(0, 0, 0.01) == pytest.approx(0.0)
    assert not alarms(0, 0, 0.01, 0.5)


def test_many_pairs_overflow_nothing() -> None:
    assert log_evidence(10**6, 10**6, 0.01) == pytest.approx(10**6 * math.log(4), rel=1e-3)
    assert alarms(10**9, 10**9, 0.01, 0.01)
    assert not alarms(0, 10**9, 0.01, 0.01)


@pytest.mark.parametrize("delta", [0.01, 0.05])
@pytest.mark.parametrize("alpha", [0.005, 0.01, 0.05])
@pytest.mark.parametrize("part", [1.0, 0.9])
def test_a_promise_that_is_kept_alarms_with_probability_delta_at_most(alpha: float, part: float, delta: float) -> None:
    alarmed = np.isfinite(alarm_times(part * alpha, alpha, delta, 2000, seed=round(1000 * alpha)))
    assert alarmed.mean() <= delta


def test_large_levels_keep_their_promise_too() -> None:
    alarmed = np.isfinite(alarm_times(0.5, 0.5, 0.05, 2000, seed=6, long=2000))
    assert alarmed.mean() <= allowed(0.05, 2000)


@pytest.mark.parametrize(("risk", "alpha"), [(0.059, 0.01), (0.02, 0.01), (0.03, 0.005), (0.1, 0.05)])
def test_a_promise_that_is_broken_alarms_as_soon_as_the_theory_says(risk: float, alpha: float) -> None:
    times = alarm_times(risk, alpha, 0.01, 1000, seed=1)
    expected = expected_samples(risk, alpha, 0.01)
    assert expected / 2 <= np.median(times) <= 2 * expected
    assert expected / 2 <= times.mean() <= 2 * expected


def test_the_figures_of_the_issue() -> None:
    # One answer in twenty corrupted on top of 0.9 %: (ln 100 + ln 3) / (0.059 ln 4 + 0.941 ln (0.96 / 0.99)).
    assert expected_samples(0.059, 0.01, 0.01) == pytest.approx(107.9, abs=0.1)


@pytest.mark.parametrize("risk", [0.001, 0.01])
def test_a_promise_that_is_kept_is_not_expected_to_alarm(risk: float) -> None:
    assert expected_samples(risk, 0.01, 0.01) == math.inf


# That a point keeps its promise.


@given(losses, alphas)
def test_the_evidence_below_is_a_product_too(differences: list[bool], alpha: float) -> None:
    found = float(log_evidence_below(sum(differences), len(differences), alpha))
    expected = by_definition(differences, alpha, [part * alpha for part in BELOW])
    assert found == pytest.approx(math.log(expected), abs=1e-9)


@given(counts, alphas, st.floats(1.01, 1.9))
def test_what_rejects_a_level_rejects_every_larger_one(pair: tuple[int, int], alpha: float, factor: float) -> None:
    errors, rows = pair
    larger = min(0.99, alpha * factor)
    assert log_evidence_below(errors, rows, larger) >= log_evidence_below(errors, rows, alpha) - 1e-9


@given(counts, st.floats(0.001, 0.3))
def test_the_bound_is_where_the_evidence_is_just_enough(pair: tuple[int, int], delta: float) -> None:
    errors, rows = pair
    bound = bound_at_any_time(errors, rows, delta)
    assert bound >= upper_bound(errors, rows, delta) - 1e-9, "no better than for a number of rows that was fixed"
    if bound < 1:
        assert log_evidence_below(errors, rows, bound) == pytest.approx(-math.log(delta), abs=1e-4)


def test_nothing_is_known_without_rows_or_with_errors_alone() -> None:
    assert bound_at_any_time(0, 0, 0.05) == 1.0
    assert bound_at_any_time(7, 7, 0.05) == 1.0


@pytest.mark.parametrize(("errors", "rows", "alpha"), [(0, 0, 0.01), (2, 800, 0.01), (30, 1000, 0.05), (0, 10, 0.5)])
def test_so_many_pairs_are_just_enough(errors: int, rows: int, alpha: float) -> None:
    needed = pairs_needed(errors, rows, alpha, 0.05)
    assert needed is not None
    share = errors / rows if rows else 0.0
    assert log_evidence_below(share * needed, needed, alpha) >= -math.log(0.05) - 1e-3
    assert log_evidence_below(share * (needed - 2), needed - 2, alpha) < -math.log(0.05)


def test_above_the_level_no_number_is_enough() -> None:
    assert pairs_needed(20, 1000, 0.01, 0.05) is None
    assert pairs_needed(10, 10, 0.01, 0.05) is None


def certified_ever(risk: float, alpha: float, delta: float, runs: int, seed: int) -> np.ndarray:
    """Whether somebody who looks after every pair ever sees enough. It is most just before an error."""
    times = error_times(risk, runs, seed)
    before = np.minimum(times - 1, LONG)
    errors = np.minimum(np.arange(times.shape[1]), (times <= LONG).sum(axis=1)[:, None])
    return (log_evidence_below(errors, before, alpha) >= -math.log(delta)).any(axis=1)


@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_looking_after_every_pair_certifies_what_is_not_true_with_probability_delta_at_most(alpha: float) -> None:
    assert certified_ever(alpha, alpha, 0.05, 2000, seed=2).mean() <= allowed(0.05, 2000)
    assert certified_ever(1.05 * alpha, alpha, 0.05, 500, seed=3).mean() <= 0.05


def test_a_promise_that_is_kept_well_is_certified() -> None:
    assert certified_ever(0.006, 0.01, 0.05, 200, seed=4).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_a_level_outside_0_and_1_is_refused(alpha: float) -> None:
    for evidence in (log_evidence, log_evidence_below):
        with pytest.raises(UsageError, match="no share between 0 and 1"):
            evidence(1, 10, alpha)
