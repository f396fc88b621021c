"""The decisions that are no queue's: which variants are worth having, and whether a score suffices."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fettle.policy import frontier, passes


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


def test_a_score_passes_where_it_reaches_its_threshold_in_float32():
    third = np.float32(1 / 3)
    assert passes([third, 0.2, np.nan, 1.0], [1 / 3, 0.3, 0.0, 2.0]).tolist() == [True, False, False, False]
