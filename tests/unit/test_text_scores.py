"""Scores of texts: features and fits against other implementations, and what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fettle.findings import TextScore
from fettle.text_scores import (
    FEATURES,
    Tally,
    all_features,
    fit,
    fit_weights,
    never_rises,
    score_of,
    scores_of,
    tally,
)

logprobs = st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=40)
# Coarse, so that there are ties.
rows = st.lists(st.tuples(st.integers(-12, 0).map(lambda n: n / 4), st.booleans()), min_size=1, max_size=60)


def column(raw: np.ndarray) -> np.ndarray:
    """Features of which only the sum says something."""
    features = np.zeros((len(raw), len(FEATURES)))
    features[:, FEATURES.index("sum")] = raw
    return features


@given(logprobs)
def test_features_are_numpys(values: list[float]):
    array = np.array(values)
    expected = [
        array.sum(),
        array.min(),
        np.quantile(array, 0.1),
        np.median(array),
        array.mean(),
        math.log(len(array)),
    ]
    assert all_features(tally(values)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_end_is_one_more_factor_where_it_is_known():
    assert tally([-1.0]).count == 1
    assert tally([-1.0], 0.5).get("sum") == pytest.approx(-1 + math.log(0.5))
    assert tally([-1.0], 0.0).get("lowest") == -math.inf


def test_values_are_those_that_a_trace_keeps():
    assert tally([-0.1]).get("sum") == float(np.float32(-0.1))
    assert tally([], 0.3).get("sum") == float(np.float32(math.log(float(np.float32(0.3)))))


@pytest.mark.parametrize("values", [[], [math.nan], [-1.0, math.nan, -2.0], [math.nan, -3.0]])
def test_without_all_log_probabilities_there_is_no_score(values: list[float]):
    found = tally(values)
    assert all(math.isnan(value) for value in all_features(found))
    one = TextScore(weights={"lowest": 1.0}, raw=[-1.0], agreed=[0.7], rows=1)
    assert math.isnan(score_of(one, found))
    assert np.isnan(scores_of(one, np.array([all_features(found)]))).all()


@given(st.lists(logprobs, min_size=1, max_size=10), st.integers(0, 2**32 - 1))
def test_one_text_has_the_score_that_it_has_among_others(texts: list[list[float]], seed: int):
    rng = np.random.default_rng(seed)
    chosen = rng.choice(FEATURES, int(rng.integers(1, 6)), replace=False).tolist()
    score = TextScore(
        weights={feature: float(rng.normal()) for feature in chosen},
        raw=np.sort(rng.normal(0, 10, 5)).tolist(),
        agreed=np.sort(rng.random(5)).tolist(),
        rows=1,
    )
    tallies = [tally(text) for text in texts]
    expected = [score_of(score, found) for found in tallies]
    assert scores_of(score, np.array([all_features(found) for found in tallies])).tolist() == expected


def test_infinite_log_probabilities_score_lowest():
    score = TextScore(weights={"sum": 1.0}, raw=[-1.0, 0.0], agreed=[0.2, 1.0], rows=1)
    assert score_of(score, tally([-math.inf])) == 0.2


@given(logprobs, st.sampled_from([{"sum": 1.0}, {"lowest": 2.0}, {"sum": 0.5, "lowest": 1.0}]))
def test_some_scores_never_rise(values: list[float], weights: dict):
    score = TextScore(weights=weights, raw=[-40.0, -3.0, 0.0], agreed=[0.0, 0.1, 1.0], rows=1)
    assert never_rises(score)
    found, seen = Tally(), []
    for value in values:
        found.add(value)
        seen.append(score_of(score, found))
    assert seen == sorted(seen, reverse=True)


def test_others_may_rise():
    for weights in ({"mean": 1.0}, {"sum": 1.0, "length": 0.1}, {"sum": -1.0}, {"tenth": 1.0}):
        assert not never_rises(TextScore(weights=weights, raw=[0.0], agreed=[0.5], rows=1))


def pooled(raw: list[float], truth: list[float], mass: list[float]) -> list[tuple[float, float, float]]:
    """Pool adjacent violators, as in the textbook: (mean of raw, mean of truth, mass) of each block."""
    blocks: list[list[float]] = []
    for place, value, weight in zip(raw, truth, mass, strict=True):
        blocks.append([place, value, weight])
        while len(blocks) > 1 and blocks[-2][1] >= blocks[-1][1]:
            _, v2, w2 = blocks.pop()
            _, v1, w1 = blocks.pop()
            blocks.append([0.0, (v1 * w1 + v2 * w2) / (w1 + w2), w1 + w2])
    return [(block[0], block[1], block[2]) for block in blocks]


@given(rows)
def test_the_fit_is_that_of_pooled_adjacent_violators(pairs: list[tuple[float, bool]]):
    raw, truth = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    score = fit(column(raw), truth, {"sum": 1.0})
    places = sorted(set(raw.tolist()))
    mass = [float((raw == place).sum()) for place in places]
    shares = [float(truth[raw == place].mean()) for place in places]
    shares[-1] *= mass[-1] / (mass[-1] + 0.5)
    mass[-1] += 0.5
    blocks = pooled(places, shares, mass)
    values = score.agreed[: len(blocks)]
    assert values == pytest.approx([block[1] for block in blocks])
    assert score.rows == len(pairs)
    # Behind the last block's middle there is one more knot at most, at the best that was seen.
    assert list(zip(score.raw, score.agreed, strict=True))[len(blocks) :] in ([], [(places[-1], 1.0)])


@given(rows)
def test_a_better_raw_score_never_counts_for_less(pairs: list[tuple[float, bool]]):
    raw = np.array([pair[0] for pair in pairs])
    score = fit(column(raw), [pair[1] for pair in pairs], {"sum": 1.0})
    line = scores_of(score, column(np.linspace(-5, 2, 300)))
    assert (np.diff(line) >= 0).all()
    assert line.min() >= 0
    assert line.max() <= 1


def test_the_fitted_score_is_the_probability_of_agreement():
    rng = np.random.default_rng(0)
    raw = np.log(rng.uniform(0.01, 1, 20_000))
    truth = rng.random(20_000) < np.exp(raw) ** 0.5
    score = fit(column(raw), truth, {"sum": 1.0})
    fresh = np.log(np.linspace(0.05, 0.95, 19))
    assert scores_of(score, column(fresh)) == pytest.approx(np.exp(fresh) ** 0.5, abs=0.06)


def test_rows_of_the_best_block_still_differ():
    raw = np.linspace(-1, 0, 101)
    score = fit(column(raw), np.ones(101, bool), {"sum": 1.0})
    top = scores_of(score, column(raw[60:]))
    assert (np.diff(top) > 0).all()
    # All agreed, and yet a sample of 101 shows no certainty.
    assert score.agreed[0] == pytest.approx(101 / 101.5)


def test_rows_without_features_are_left_out_and_with_none_at_all_nothing_is_scored():
    features = column(np.array([-1.0, np.nan, -2.0]))
    assert fit(features, [True, False, False], {"sum": 1.0}).rows == 2
    nothing = fit(features[1:2], [True], {"sum": 1.0})
    assert scores_of(nothing, column(np.array([-3.0, 0.0]))).tolist() == [0.0, 0.0]


def test_weights_find_the_direction_that_tells():
    rng = np.random.default_rng(1)
    features = rng.normal(0, [3.0, 0.5, 1.0, 1.0, 2.0, 1.0], (20_000, 6))
    truth = rng.random(20_000) < 1 / (1 + np.exp(-(features[:, 1] * 4 - features[:, 4])))
    weights = fit_weights(features, truth, ("lowest", "mean", "length"))
    assert weights["lowest"] / weights["mean"] == pytest.approx(-4, rel=0.1)
    assert abs(weights["length"]) < 0.1
    assert weights["mean"] == pytest.approx(-1, rel=0.15)


def test_weights_where_there_is_nothing_to_learn_from():
    constant = np.full((50, 6), -1.0)
    assert fit_weights(constant, np.arange(50) % 2 == 0, ("lowest", "mean")) == {"sum": 1.0}
    varied = np.random.default_rng(2).normal(size=(50, 6))
    assert fit_weights(varied, np.ones(50, bool), ("lowest", "mean")) == {"sum": 1.0}
    assert fit_weights(np.full((3, 6), np.nan), np.ones(3, bool), ("lowest", "mean")) == {"sum": 1.0}
    varied[:, FEATURES.index("mean")] = 7.0
    assert set(fit_weights(varied, np.arange(50) % 2 == 0, ("lowest", "mean"))) == {"lowest"}


def test_a_score_survives_the_manifest_to_the_last_bit():
    rng = np.random.default_rng(3)
    raw = np.log(rng.random(500))
    score = fit(column(raw), rng.random(500) < np.exp(raw), {"sum": 0.1 + 0.2})
    again = TextScore.model_validate_json(score.model_dump_json())
    assert again == score
    assert scores_of(again, column(raw)).tolist() == scores_of(score, column(raw)).tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        {"raw": [0.0, 0.0]},
        {"raw": [0.0, 1.0, 2.0]},
        {"agreed": [0.9, 0.1]},
        {"agreed": [0.1, 1.1]},
        {"weights": {}},
        {"weights": {"height": 1.0}},
    ],
)
def test_a_score_that_is_none_is_refused(wrong: dict):
    good = {"weights": {"sum": 1.0}, "raw": [0.0, 1.0], "agreed": [0.1, 0.9], "rows": 3}
    TextScore.model_validate(good)
    with pytest.raises(ValidationError):
        TextScore.model_validate(good | wrong)
