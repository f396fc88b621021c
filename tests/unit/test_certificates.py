"""The exact tests against independent arithmetic, and the promise itself over simulated calibrations."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.certificates import simulate_sequence
from fettle.certificates import certify, fixed_sequence, hoeffding_bentkus, holds, p_value, rows_needed, upper_bound
from fettle.errors import UsageError

shares = st.floats(0.001, 0.5)
counts = st.tuples(st.integers(0, 400), st.integers(1, 400)).map(lambda pair: (min(pair), max(pair)))


def exact_tail(errors: int, rows: int, alpha: Fraction) -> float:
    """P(Bin(rows, alpha) <= errors) in rational numbers."""
    return float(sum(math.comb(rows, k) * alpha**k * (1 - alpha) ** (rows - k) for k in range(errors + 1)))


@pytest.mark.parametrize(("errors", "rows", "alpha"), [(0, 1, 0.5), (3, 50, 0.125), (38, 400, 0.0625), (50, 50, 0.25)])
def test_the_p_value_is_the_binomial_tail(errors: int, rows: int, alpha: float) -> None:
    assert p_value(errors, rows, alpha) == pytest.approx(exact_tail(errors, rows, Fraction(alpha)), rel=1e-10)


@given(counts, shares)
def test_the_bound_is_clopper_and_pearsons(pair: tuple[int, int], delta: float) -> None:
    errors, rows = pair
    # The two-sided interval at 1 - 2 delta has the one-sided bound at its upper end.
    expected = stats.binomtest(errors, rows).proportion_ci(1 - 2 * delta, "exact").high if delta < 0.5 else None
    if expected is not None:
        assert upper_bound(errors, rows, delta) == pytest.approx(expected, rel=1e-6)


@given(counts, shares, shares)
def test_test_and_bound_say_the_same(pair: tuple[int, int], alpha: float, delta: float) -> None:
    errors, rows = pair
    p, bound = p_value(errors, rows, alpha), upper_bound(errors, rows, delta)
    if abs(p - delta) > 1e-9:
        assert (p <= delta) == (bound <= alpha)


def test_the_figures_of_the_design() -> None:
    found = certify(38, 5011, 0.01, 0.05)
    assert holds(found)
    assert found.upper_bound < 0.01
    assert not holds(certify(39, 5011, 0.01, 0.05))


def test_every_row_wrong() -> None:
    assert p_value(7, 7, 0.01) == 1.0
    assert upper_bound(7, 7, 0.05) == 1.0
    assert not holds(certify(7, 7, 0.01, 0.05))


def test_no_row_wrong() -> None:
    assert p_value(0, 59, 0.05) == pytest.approx(0.95**59)
    assert upper_bound(0, 59, 0.05) == pytest.approx(1 - 0.05 ** (1 / 59))


@pytest.mark.parametrize(("alpha", "rows"), [(0.005, 598), (0.01, 299), (0.02, 149), (0.05, 59)])
def test_rows_needed_at_the_usual_levels(alpha: float, rows: int) -> None:
    assert rows_needed(alpha, 0.05) == rows


@given(shares, shares)
def test_one_row_fewer_is_too_few(alpha: float, delta: float) -> None:
    rows = rows_needed(alpha, delta)
    assert p_value(0, rows, alpha) <= delta
    assert rows == 1 or p_value(0, rows - 1, alpha) > delta


def test_rows_needed_where_the_quotient_is_whole() -> None:
    assert rows_needed(0.5, 0.125) == 3
    assert rows_needed(0.5, 0.5) == 1


def test_a_path_ends_at_its_first_failure() -> None:
    # 0 and 20 of 5,000 pass at 1 %; 60 fails; the 10 behind it is not looked at.
    assert fixed_sequence([0, 20, 60, 10], 5000, 0.01, 0.05) == 2
    assert fixed_sequence([60, 0, 0], 5000, 0.01, 0.05) == 0
    assert fixed_sequence([], 5000, 0.01, 0.05) == 0
    assert fixed_sequence([0, 1], 5000, 0.01, 0.05) == 2


@pytest.mark.parametrize(
    ("errors", "rows", "alpha"), [(-1, 5, 0.1), (6, 5, 0.1), (0, 0, 0.1), (1, 5, 0.0), (1, 5, 1.0)]
)
def test_nonsense_is_refused(errors: int, rows: int, alpha: float) -> None:
    with pytest.raises(UsageError):
        p_value(errors, rows, alpha)


@given(st.integers(1, 300), st.floats(0, 1), shares)
def test_hoeffding_bentkus_is_the_smaller_of_its_two(rows: int, mean: float, alpha: float) -> None:
    found = hoeffding_bentkus(mean, rows, alpha)
    low = min(mean, alpha)
    entropy = stats.entropy([low, 1 - low], [alpha, 1 - alpha])
    bentkus = math.e * stats.binom.cdf(math.ceil(rows * mean - 1e-9), rows, alpha)
    assert found == pytest.approx(min(1.0, math.exp(-rows * entropy), bentkus), rel=1e-6, abs=1e-12)


def test_hoeffding_bentkus_is_no_less_careful_than_the_exact_test() -> None:
    for errors in range(0, 60, 5):
        assert hoeffding_bentkus(errors / 1000, 1000, 0.05) >= p_value(errors, 1000, 0.05)


def test_hoeffding_bentkus_holds_for_losses_between_0_and_1() -> None:
    rng = np.random.default_rng(0)
    means = rng.beta(0.5, 4.5, (1000, 500)).mean(axis=1)  # the true mean is 0.1
    broken = np.mean([hoeffding_bentkus(float(mean), 500, 0.1) <= 0.05 for mean in means])
    assert broken <= 0.05


def test_a_loss_outside_0_and_1_is_refused() -> None:
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        hoeffding_bentkus(1.5, 10, 0.1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_the_promise_is_kept_and_the_naive_rule_breaks_it(alpha: float, seed: int) -> None:
    runs, delta = 1000, 0.05
    risks = np.linspace(0.4, 1.4, 11) * alpha + 1e-6  # the level itself is just missed by the seventh
    tally = simulate_sequence(risks, 5000, alpha, delta, runs, seed)
    # Three standard deviations of a share of 5 % in 1,000 runs.
    assert tally.broken / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    assert tally.naive_broken / runs > 0.3
    assert tally.certified > 0.9 * runs


def test_a_path_that_is_all_too_bad_is_almost_never_certified() -> None:
    tally = simulate_sequence(np.array([0.0101, 0.011, 0.012]), 5000, 0.01, 0.05, 1000, 3)
    assert tally.certified <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95)
    assert tally.broken == tally.certified
