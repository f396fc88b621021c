from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue, ValidationError

from fettle.errors import EngineError
from fettle.manifest import PassRecord, VariantManifest
from fettle.rows import Row, Rows, engine_calls, in_batches
from tests.fakes import classify_task, tokenizer_spec
from workers.fake import FakeEngine, expected


def row(*ids: int, types: list[int] | None = None) -> Row:
    return Row(np.array(ids, np.int32), None if types is None else np.array(types, np.int8))


def fake_engine(**parameters: JsonValue) -> FakeEngine:
    return FakeEngine(
        VariantManifest(
            id="fake",
            runtime="fake",
            precision="fp32",
            recipe=[PassRecord(name="fake", parameters=parameters, seconds=0)],
            tokenizer=tokenizer_spec(),
            task=classify_task(),
            files=[],
        )
    )


def test_joining_keeps_order_and_lengths() -> None:
    rows = Rows.of([row(1, 2, 3), row(4)])
    assert rows.ids.tolist() == [1, 2, 3, 4]
    assert rows.lengths.tolist() == [3, 1]
    assert (len(rows), rows.tokens, rows.longest) == (2, 4, 3)
    assert rows.type_ids is None


def test_segments_of_one_row_give_the_others_zeros() -> None:
    rows = Rows.of([row(1, 2), row(3, 4, types=[0, 1])])
    assert rows.type_ids is not None
    assert rows.type_ids.tolist() == [0, 0, 0, 1]


def test_padding_is_on_the_right_with_a_mask() -> None:
    ids, mask, types = Rows.of([row(5, 6, 7, types=[0, 1, 1]), row(8)]).padded(pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert types.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert ids.dtype == mask.dtype == types.dtype == np.int64


lengths_and_bounds = st.tuples(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 8), st.integers(1, 200))


@given(lengths_and_bounds)
def test_batches_cover_every_row_once_in_order_and_within_bounds(case: tuple[list[int], int, int]) -> None:
    lengths, most_rows, most_tokens = case
    batches = list(in_batches(range(len(lengths)), lengths, most_rows, most_tokens))
    assert [index for batch in batches for index in batch] == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= most_rows
        assert len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= most_tokens


@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=20), min_size=1, max_size=8))
def test_the_fake_engine_answers_a_row_the_same_in_any_company(all_ids: list[list[int]]) -> None:
    engine = fake_engine()
    rows = [row(*ids) for ids in all_ids]
    together = engine.run(Rows.of(rows)).values
    for index, one in enumerate(rows):
        assert np.array_equal(engine.run(Rows.of([one])).values[0], together[index])
        assert np.array_equal(together[index], expected(one.ids, 3))


def test_the_fake_engine_depends_on_every_id_and_on_their_order() -> None:
    base = expected(np.array([5, 6, 7], np.int32), 3)
    for other in ([5, 6, 8], [6, 5, 7], [5, 6]):
        assert not np.allclose(base, expected(np.array(other, np.int32), 3))


def test_the_fake_engine_fails_where_it_is_told_to() -> None:
    engine = fake_engine(fail_on_token=7)
    engine.run(Rows.of([row(5, 6)]))
    with pytest.raises(EngineError, match="token 7"):
        engine.run(Rows.of([row(5, 6), row(7)]))


def test_the_fake_engine_takes_no_unknown_parameter() -> None:
    with pytest.raises(ValidationError, match="ms_per_row"):
        fake_engine(ms_per_row=3)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=40), st.integers(16, 512), st.booleans())
def test_an_engine_makes_calls_of_like_lengths_that_hold_every_row_once(lengths, tokens, packed):
    calls = engine_calls(lengths, tokens, packed=packed)
    assert sorted(row for call in calls for row in call) == list(range(len(lengths)))
    for call in calls:
        each = [lengths[row] for row in call]
        assert len(call) == 1 or (sum(each) if packed else max(each) * len(each)) <= tokens
    longest = [max(lengths[row] for row in call) for call in calls]
    assert longest == sorted(longest)


def test_an_engine_makes_one_call_of_little_or_of_anything_and_one_a_row_where_it_has_to():
    assert engine_calls([30, 10, 20], 180) == [[0, 1, 2]]
    assert engine_calls([30, 10, 20], 64) == [[1, 2], [0]]
    assert engine_calls([30, 10, 20], 64, packed=True) == [[1, 2, 0]]
    assert engine_calls([300, 10], None) == [[0, 1]]
    assert engine_calls([3, 1], 512, row_by_row=True) == [[0], [1]]
