"""The router's decisions: their invariants on arbitrary queues, and the figures of a few by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.policy import (
    BatchBounds,
    admits,
    choose_batch,
    corrected_pace,
    drain_s,
    frontier,
    retry_after_s,
)

MAX_AGE_S = 0.1

lengths_of_rows = st.integers(1, 128)
bounds_of_batches = st.builds(
    BatchBounds, rows=st.integers(1, 12), tokens=st.integers(1, 600), max_age_s=st.just(MAX_AGE_S)
)
# Oldest first, as the batcher keeps them.
queues = st.lists(st.tuples(lengths_of_rows, st.floats(0, 0.3)), min_size=1, max_size=40).map(
    lambda rows: sorted(rows, key=lambda row: -row[1])
)
amounts = st.floats(0, 1e6)


def choose(queue: list[tuple[int, float]], bounds: BatchBounds) -> list[int]:
    return choose_batch([length for length, _ in queue], [age for _, age in queue], bounds)


def padded_tokens(lengths: list[int]) -> int:
    return max(lengths) * len(lengths)


def test_an_empty_queue_makes_an_empty_batch():
    assert choose_batch([], [], BatchBounds(rows=4, tokens=64, max_age_s=0.1)) == []


@given(queues, bounds_of_batches)
def test_the_oldest_row_is_in_every_batch(queue, bounds):
    assert choose(queue, bounds)[0] == 0


@given(queues, bounds_of_batches)
def test_a_batch_names_waiting_rows_and_none_twice(queue, bounds):
    chosen = choose(queue, bounds)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(range(len(queue)))


@given(queues, bounds_of_batches)
def test_a_batch_keeps_its_bounds_unless_it_is_one_long_row(queue, bounds):
    chosen = choose(queue, bounds)
    assert len(chosen) <= bounds.rows
    assert len(chosen) == 1 or padded_tokens([queue[i][0] for i in chosen]) <= bounds.tokens


@given(queues, bounds_of_batches)
def test_overdue_rows_go_first_and_by_age(queue, bounds):
    """No fresh row is in the batch in the place of an overdue one that would have fitted."""
    chosen = choose(queue, bounds)
    overdue = [i for i in range(1, len(queue)) if queue[i][1] >= MAX_AGE_S]
    taken = [i for i in chosen[1:] if i in overdue]
    assert taken == sorted(taken)
    assert chosen[1 : 1 + len(taken)] == taken
    passed_over = [i for i in overdue if i not in chosen]
    if passed_over and len(chosen) < bounds.rows:
        before = [0, *(i for i in taken if i < passed_over[0])]
        assert padded_tokens([queue[i][0] for i in [*before, passed_over[0]]]) > bounds.tokens


@given(queues, bounds_of_batches)
def test_a_batch_is_as_full_as_its_bounds_allow(queue, bounds):
    chosen = choose(queue, bounds)
    if len(chosen) < bounds.rows:
        for index in set(range(len(queue))) - set(chosen):
            assert padded_tokens([queue[i][0] for i in [*chosen, index]]) > bounds.tokens


@given(st.lists(lengths_of_rows, min_size=2, max_size=40), st.integers(2, 12))
def test_fresh_rows_are_those_nearest_to_the_leader(lengths, rows):
    bounds = BatchBounds(rows=rows, tokens=10**9, max_age_s=MAX_AGE_S)
    chosen = choose_batch(lengths, [0.0] * len(lengths), bounds)
    left = set(range(len(lengths))) - set(chosen)
    farthest = max(abs(lengths[i] - lengths[0]) for i in chosen)
    assert all(abs(lengths[i] - lengths[0]) >= farthest for i in left)


@given(
    arrivals=st.lists(st.lists(lengths_of_rows, max_size=15), min_size=1, max_size=15),
    bounds=bounds_of_batches,
    tick=st.sampled_from([0.0, 0.03, 0.2]),
)
def test_every_row_leaves_within_as_many_batches_as_rows_were_before_it(arrivals, bounds, tick):
    """Arrivals between the batches, some of them always a better fit than the row that waits: nobody starves."""
    queue: list[tuple[float, int, int]] = []  # arrived, length, batches that may pass until it must have left
    now, arriving = 0.0, list(arrivals)
    while queue or arriving:
        for length in arriving.pop(0) if arriving else []:
            queue.append((now, length, len(queue)))
        now += tick
        chosen = set(choose([(length, now - arrived) for arrived, length, _ in queue], bounds))
        assert all(left > 0 or index in chosen for index, (_, _, left) in enumerate(queue))
        queue = [(arrived, length, left - 1) for i, (arrived, length, left) in enumerate(queue) if i not in chosen]


@given(amounts, st.floats(0.001, 1e6))
def test_what_is_refused_is_told_when_to_come_back(backlog, limit):
    wait = retry_after_s(backlog, limit)
    assert wait >= 1
    if not admits(backlog, limit):
        assert admits(backlog - wait, limit)


def test_admission_looks_at_the_work_before_a_request_only():
    assert admits(0.0, 0.001)
    assert admits(0.99, 1.0)
    assert not admits(1.0, 1.0)


def test_the_backlog_drains_by_pace_and_replicas():
    assert drain_s(3000, pace=1.0, replicas=1) == 3.0
    assert drain_s(3000, pace=2.0, replicas=4) == 1.5


@given(st.floats(0.1, 10), st.floats(0, 1e9), st.floats(0, 1e9))
def test_the_pace_stays_within_its_bounds(pace, predicted, observed):
    assert 0.1 - 1e-9 <= corrected_pace(pace, predicted, observed) <= 10 + 1e-9


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_pace_converges_to_what_is_observed(pace, truth):
    for _ in range(200):
        pace = corrected_pace(pace, 100.0, 100.0 * truth)
    assert pace == pytest.approx(truth, rel=1e-3)


def test_one_outlier_moves_the_pace_little():
    assert corrected_pace(1.0, 1.0, 1e9) <= 2.0
    assert corrected_pace(1.0, 0.0, 5.0) == 1.0


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_the_frontier_beats_all_that_it_leaves_out(points):
    kept = frontier(points)

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    assert kept == [name for name in points if name in kept]
    for name in points:
        beaten = any(beats(points[better], points[name]) for better in kept)
        assert (name in kept) != beaten


def test_the_frontier_of_a_family_by_hand():
    points = {"fp32": (10.0, 0.0), "bf16": (5.0, 0.0), "int8": (2.0, 0.02), "bad": (3.0, 0.05)}
    assert frontier(points) == ["bf16", "int8"]
