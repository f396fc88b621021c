from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax

from fettle.answers import cosine, disagreements, loss_in_words, normalized, probabilities, truncated_vectors
from fettle.manifest import Head, Task, TaskKind
from tests.fakes import classify_task, embed_task

SINGLE = classify_task()
MULTI = classify_task().model_copy(update={"head": Head.MULTI_LABEL})
NUMBER = Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, labels=["score"], width=1)
VECTOR = embed_task(2)


def floats(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


logits = st.lists(st.lists(st.floats(-1000, 1000, width=32), min_size=3, max_size=3), min_size=1, max_size=5)


@given(logits)
def test_softmax_is_stable_and_right(rows: list[list[float]]) -> None:
    values = floats(*rows)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        scores = probabilities(values, SINGLE)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, softmax(values.astype(np.float64), axis=1), atol=1e-6)


@given(logits)
def test_sigmoid_is_stable_and_right(rows: list[list[float]]) -> None:
    values = floats(*rows)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        scores = probabilities(values, MULTI)
    np.testing.assert_allclose(scores, expit(values.astype(np.float64)), atol=1e-6)


def test_extreme_logits_give_exact_ends() -> None:
    assert probabilities(floats([1000, -1000, 0]), SINGLE).tolist() == [[1.0, 0.0, 0.0]]
    assert probabilities(floats([1000, -1000, 0]), MULTI).tolist() == [[1.0, 0.0, 0.5]]


def test_a_regression_is_the_number_itself() -> None:
    assert probabilities(floats([3.5]), NUMBER).tolist() == [[3.5]]


def test_another_label_first_disagrees() -> None:
    reference = floats([1, 2, 3], [3, 2, 1], [0, 5, 0])
    values = floats([1, 2, 2.5], [2, 3, 1], [0, 0.1, 0])
    assert disagreements(values, reference, SINGLE).tolist() == [False, True, False]


def test_ties_are_broken_alike() -> None:
    assert not disagreements(floats([2, 2, 0]), floats([5, 5, 0]), SINGLE).any()
    assert disagreements(floats([2, 2, 0]), floats([4, 5, 0]), SINGLE).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("task", [SINGLE, MULTI, NUMBER, VECTOR])
def test_what_is_not_finite_never_agrees(task: Task, bad: float) -> None:
    reference = np.ones((3, task.width), np.float32)
    values = reference.copy()
    values[1, 0] = bad
    with np.errstate(invalid="ignore"):
        assert disagreements(values, reference, task).tolist() == [False, True, False]


def test_nan_does_not_agree_even_with_nan() -> None:
    nothing = np.full((1, 3), np.nan, np.float32)
    assert disagreements(nothing, nothing, SINGLE).all()


def test_any_label_across_one_half_disagrees() -> None:
    reference = floats([1, -1, 1], [1, -1, 1])
    values = floats([0.1, -9, 8], [0.1, 0.1, 8])
    assert disagreements(values, reference, MULTI).tolist() == [False, True]


def test_regression_is_relative_to_the_spread_of_the_reference() -> None:
    reference = floats([0], [100])  # standard deviation 50, so 2.5 are tolerated
    assert disagreements(floats([2], [97]), reference, NUMBER).tolist() == [False, True]


def test_vectors_disagree_below_the_cosine_floor() -> None:
    reference = floats([1, 0], [1, 0], [1, 0])
    values = floats([3, 0.1], [1, 0.3], [0, 0])
    assert disagreements(values, reference, VECTOR).tolist() == [False, True, True]


def test_cosine_of_a_zero_vector_is_zero() -> None:
    np.testing.assert_allclose(cosine(floats([0, 0], [1, 1]), floats([1, 0], [-2, -2])), [0, -1], atol=1e-6)


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_a_model_never_disagrees_with_itself(rows: list[list[float]]) -> None:
    values = floats(*rows)
    for task in (SINGLE, MULTI):
        assert not disagreements(values, values, task).any()


def test_shortened_vectors_have_length_one() -> None:
    vectors = normalized(np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32))
    short = truncated_vectors(vectors, 3)
    assert short.shape == (4, 3)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cosine(short, vectors[:, :3]), 1, atol=1e-6)
    assert truncated_vectors(vectors, None) is vectors
    assert truncated_vectors(vectors, 8) is vectors


def test_normalizing_a_zero_vector_leaves_it() -> None:
    assert normalized(floats([0, 0])).tolist() == [[0.0, 0.0]]


def test_every_task_says_what_counts_as_a_disagreement() -> None:
    assert len({loss_in_words(task) for task in (SINGLE, MULTI, NUMBER, VECTOR)}) == 4
