from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fettle.errors import RequestError
from fettle.tokenizer import Tokenizer
from tests.fakes import CLS, SEP, UNKNOWN, token_id, tokenizer_json, tokenizer_spec

LIMIT = 10


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    return Tokenizer(tmp_path / "tokenizer.json", tokenizer_spec(max_length=LIMIT))


def words(count: int, start: int = 0) -> str:
    return " ".join(f"word{number}" for number in range(start, start + count))


def ids_of(text: str) -> list[int]:
    return [token_id(word) for word in text.split()]


def test_a_text_gets_its_special_tokens(tokenizer: Tokenizer) -> None:
    (row,) = tokenizer.encode(["quick fox"])
    assert row.ids.tolist() == [CLS, token_id("quick"), token_id("fox"), SEP]
    assert row.type_ids is None
    assert not row.truncated


def test_unknown_words_and_no_words(tokenizer: Tokenizer) -> None:
    strange, empty = tokenizer.encode(["zebra", ""])
    assert strange.ids.tolist() == [CLS, UNKNOWN, SEP]
    assert empty.ids.tolist() == [CLS, SEP]


def test_a_pair_has_segments(tokenizer: Tokenizer) -> None:
    (row,) = tokenizer.encode([("quick", "brown fox")])
    assert row.ids.tolist() == [CLS, token_id("quick"), SEP, token_id("brown"), token_id("fox"), SEP]
    assert row.type_ids is not None
    assert row.type_ids.tolist() == [0, 0, 0, 1, 1, 1]


def test_segments_are_left_out_for_a_model_without_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    spec = tokenizer_spec().model_copy(update={"segments": False})
    (row,) = Tokenizer(tmp_path / "tokenizer.json", spec).encode([("quick", "fox")])
    assert row.type_ids is None


def test_a_text_of_just_the_limit_is_whole(tokenizer: Tokenizer) -> None:
    (row,) = tokenizer.encode([words(LIMIT - 2)])
    assert len(row) == LIMIT
    assert not row.truncated


def test_a_longer_text_is_cut_on_the_right_and_says_so(tokenizer: Tokenizer) -> None:
    (row,) = tokenizer.encode([words(30)])
    assert row.ids.tolist() == [CLS, *ids_of(words(LIMIT - 2)), SEP]
    assert row.truncated


def test_a_long_pair_loses_from_its_longer_side(tokenizer: Tokenizer) -> None:
    (row,) = tokenizer.encode([("fox", words(30))])
    assert row.ids.tolist() == [CLS, token_id("fox"), SEP, *ids_of(words(LIMIT - 4)), SEP]
    assert row.truncated


def test_without_truncation_a_long_text_is_an_error_that_says_how_long(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="input 1 has 32 tokens, the limit is 10") as caught:
        tokenizer.encode(["fox", words(30)], truncate=False)
    assert caught.value.status == 400


def test_a_shorter_limit_holds_and_a_larger_one_does_not_lift_the_models(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode([words(30)], max_length=5)[0]) == 5
    assert len(tokenizer.encode([words(30)], max_length=1000)[0]) == LIMIT
    # The limit of one call does not stay for the next.
    assert len(tokenizer.encode([words(30)])[0]) == LIMIT


def test_threads_with_different_limits_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    def cut(limit: int) -> int:
        return len(tokenizer.encode([words(30)], max_length=limit)[0])

    limits = [3 + number % 7 for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(cut, limits)) == limits


def test_ids_are_used_as_they_are(tokenizer: Tokenizer) -> None:
    row = tokenizer.row_of_ids([7, 8, 9])
    assert row.ids.tolist() == [7, 8, 9]
    assert not row.truncated


@pytest.mark.parametrize("bad", [-1, 260, 2**40])
def test_an_id_outside_the_vocabulary_is_named(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(RequestError, match=rf"input 3: token id {bad} is outside the vocabulary \(0 to 259\)"):
        tokenizer.row_of_ids([5, bad], index=3)


def test_the_last_id_of_the_vocabulary_is_fine(tokenizer: Tokenizer) -> None:
    assert tokenizer.row_of_ids([0, 259]).ids.tolist() == [0, 259]


def test_too_many_ids_are_cut_or_refused(tokenizer: Tokenizer) -> None:
    row = tokenizer.row_of_ids(list(range(20)))
    assert row.ids.tolist() == list(range(LIMIT))
    assert row.truncated
    with pytest.raises(RequestError, match="20 tokens, the limit is 10"):
        tokenizer.row_of_ids(list(range(20)), truncate=False)
