from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.config import DataFiles
from fettle.errors import DataError
from fettle.manifest import Head, Task, TaskKind
from optimize.data import SHARES, load_splits, read_table
from optimize.labels import map_labels
from tests.fakes import classify_task

SINGLE = classify_task(["red", "green", "blue"])
MULTI = SINGLE.model_copy(update={"head": Head.MULTI_LABEL})
NUMBER = Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, labels=["score"], width=1)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text number {n}", "label": n % 3} for n in range(start, start + count)]


def read(path: Path, **columns: str) -> Any:
    return read_table(path, DataFiles(data=path, **columns))


# Reading


def test_json_lines(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"text": "a", "label": "x", "other": 1}, {"text": "b"}])
    table = read(path)
    assert (table.texts, table.labels, table.empty) == (["a", "b"], ["x", None], 0)


def test_compressed_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert read(path).texts == ["a", "b"]
    assert read(path).labels is None


def test_strange_separators_inside_a_string_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False) + "\r\n\n")
    assert read(path).texts == ["one\u2028two\x85three"]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\na,x\n")
    assert read(path).texts == ["a"]


def test_csv_with_quotes_and_newlines(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('text,label\n"one, ""two""\nthree",x\nfour,\n')
    table = read(path)
    assert table.texts == ['one, "two"\nthree', "four"]
    assert table.labels == ["x", None]


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text\n" + "a" * 300_000 + "\n")
    assert len(read(path).texts[0]) == 300_000


def test_pairs_and_other_column_names(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"q": "a", "d": "b", "y": 1}, {"q": "a", "d": " ", "y": 1}])
    table = read(path, text_column="q", pair_column="d", label_column="y")
    assert (table.texts, table.labels, table.empty) == ([("a", "b")], [1], 1)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'fettle\[parquet\]'"):
        read(tmp_path / "d.parquet")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [1, 2]}), tmp_path / "d.parquet")
    table = read(tmp_path / "d.parquet")
    assert (table.texts, table.labels) == (["a", "b"], [1, 2])


# What cannot be read


def test_broken_lines_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n\n[1]\n"x"\n{]\n')
    with pytest.raises(DataError) as caught:
        read(path)
    message = caught.value.message
    assert str(path) in message
    assert "4 broken lines" in message
    for part in ("line 2: not JSON", "line 4: a JSON list", "line 5: a JSON str"):
        assert part in message
    assert "line 6" not in message


def test_a_text_that_is_no_string_is_a_broken_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"text": "a"}, {"text": 5}])
    with pytest.raises(DataError, match="1 broken line: line 2: the text is int"):
        read(path)


def test_half_a_surrogate_pair_is_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"line 2: .*surrogate"):
        read(path)


def test_wrong_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read(path)


def test_a_csv_row_with_other_columns_than_the_header_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\na,x\nb\nc,y,z\n")
    with pytest.raises(DataError, match=r"2 broken lines: line 3: not 2 columns.*line 4"):
        read(path)


@pytest.mark.parametrize(
    ("columns", "option"),
    [
        ({"text_column": "txt"}, "--text-column"),
        ({"pair_column": "txt"}, "--pair-column"),
        ({"label_column": "txt"}, "--label-column"),
    ],
)
def test_a_wrong_column_lists_those_there_are(tmp_path: Path, columns: dict[str, str], option: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(DataError, match=f"no column 'txt' .*it has label, text .*{option}"):
        read(path, **columns)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.txt", b"a", "unknown kind of file"),
        ("d.jsonl", b"", "no rows"),
        ("d.jsonl.gz", b"not gzip", "cannot be read"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}' * 100, mtime=0)[:30], "cannot be read"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "absent.jsonl")


# Splits


def test_one_file_is_split_in_the_stated_shares(tmp_path: Path) -> None:
    splits = load_splits(DataFiles(data=jsonl(tmp_path / "d.jsonl", numbered(5000))))
    sizes = {name: len(split) for name, split in splits.by_name.items()}
    assert sum(sizes.values()) == 5000
    for name, share in SHARES.items():
        assert sizes[name] == pytest.approx(5000 * share, rel=0.12)


def test_a_text_stays_in_its_split_whatever_else_is_in_the_file(tmp_path: Path) -> None:
    rows = numbered(600)
    first = load_splits(DataFiles(data=jsonl(tmp_path / "a.jsonl", rows)))
    shuffled = random.Random(0).sample(rows, 500) + numbered(300, start=10_000)
    second = load_splits(DataFiles(data=jsonl(tmp_path / "b.jsonl", shuffled)))
    home = {text: name for name, split in first.by_name.items() for text in split.texts}
    for name, split in second.by_name.items():
        assert all(home.get(text, name) == name for text in split.texts)


def test_the_seed_changes_the_split(tmp_path: Path) -> None:
    files = DataFiles(data=jsonl(tmp_path / "d.jsonl", numbered(600)))
    assert load_splits(files, 0)["test"].sha256 == load_splits(files, 0)["test"].sha256
    assert load_splits(files, 0)["test"].sha256 != load_splits(files, 1)["test"].sha256


def test_labels_stay_with_their_texts(tmp_path: Path) -> None:
    splits = load_splits(DataFiles(data=jsonl(tmp_path / "d.jsonl", numbered(600))))
    for split in splits.by_name.values():
        assert split.labels == [int(text.split()[-1]) % 3 for text in split.texts]


def test_duplicates_leave_the_split_that_matters_less(tmp_path: Path) -> None:
    test = jsonl(tmp_path / "test.jsonl", numbered(20) + numbered(2))
    calibration = jsonl(tmp_path / "calibration.jsonl", numbered(20, start=15))
    train = jsonl(tmp_path / "train.jsonl", numbered(50))
    splits = load_splits(DataFiles(test=test, calibration=calibration, train=train))
    assert {name: len(split) for name, split in splits.by_name.items()} == {"test": 20, "calibration": 15, "train": 15}
    assert not {*splits["test"].texts} & {*splits["calibration"].texts, *splits["train"].texts}
    assert splits.warnings == ["dropped 42 duplicate texts: 2 from test, 5 from calibration, 35 from train"]


def test_rows_without_text_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*numbered(30), {"text": ""}, {"text": "  \n"}, {"text": None}]
    splits = load_splits(DataFiles(test=jsonl(tmp_path / "t.jsonl", rows)))
    assert len(splits["test"]) == 30
    assert splits.warnings == ["t.jsonl: dropped 3 rows without text"]


def test_clean_data_give_no_warnings(tmp_path: Path) -> None:
    assert load_splits(DataFiles(test=jsonl(tmp_path / "t.jsonl", numbered(30)))).warnings == []


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only 15 rows are left to test on, at least 16"):
        load_splits(DataFiles(test=jsonl(tmp_path / "t.jsonl", numbered(15))))


def test_the_hash_covers_texts_and_labels(tmp_path: Path) -> None:
    def digest(rows: list[dict[str, Any]]) -> str:
        return load_splits(DataFiles(test=jsonl(tmp_path / "t.jsonl", rows)))["test"].sha256

    rows = numbered(20)
    other_label = [{**rows[0], "label": 2}, *rows[1:]]
    other_text = [{**rows[0], "text": "changed"}, *rows[1:]]
    assert len({digest(rows), digest(other_label), digest(other_text)}) == 3
    assert digest(rows) == digest([{**row, "unused": 1} for row in rows])


@pytest.mark.parametrize("given", [{}, {"data": "a", "test": "b"}, {"train": "a"}])
def test_files_are_given_one_way_or_the_other(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"either data|test is missing"):
        DataFiles(**given)


# Labels


def test_labels_by_name_and_by_index() -> None:
    targets = map_labels(["blue", 0, "1", 2.0, True], SINGLE)
    assert targets.known.all()
    assert targets.values.tolist() == [2, 0, 1, 2, 1]
    assert targets.warning is None


def test_a_label_named_like_a_number_wins_over_the_index() -> None:
    assert map_labels(["1", "0"], classify_task(["1", "0"])).values.tolist() == [0, 1]


def test_unknown_labels_are_counted_and_left_out() -> None:
    targets = map_labels(["red", "pink", "pink", 3, -1, 1.5, None, "blue"], SINGLE)
    assert targets.known.tolist() == [True, False, False, False, False, False, False, True]
    assert targets.values.tolist() == [0, 2]
    assert targets.warning is not None
    assert "5 of 8 rows" in targets.warning
    assert "'pink' (2)" in targets.warning


def test_multi_label_by_lists_vectors_and_csv_cells() -> None:
    labels = [["red", "blue"], [1], [0.0, 1.0, 1.0], [], '["green"]', "red", ["red", "pink"], "[oops"]
    targets = map_labels(labels, MULTI)
    assert targets.known.tolist() == [True] * 6 + [False] * 2
    assert targets.values.tolist() == [
        [True, False, True],
        [False, True, False],
        [False, True, True],
        [False, False, False],
        [False, True, False],
        [True, False, False],
    ]


def test_regression_labels_are_numbers() -> None:
    targets = map_labels([1, "2.5", -3.0, "high", float("nan"), None], NUMBER)
    assert targets.values.tolist() == [1.0, 2.5, -3.0]
    assert targets.known.tolist() == [True, True, True, False, False, False]


any_label = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.one_of(st.integers(), st.text())),
    st.dictionaries(st.text(), st.integers(), max_size=1),
)  # fmt: skip


@given(st.lists(any_label, max_size=6), st.sampled_from([SINGLE, MULTI, NUMBER]))
def test_any_json_value_is_a_label_or_unknown(labels: list[Any], task: Task) -> None:
    targets = map_labels(labels, task)
    assert len(targets.values) == np.count_nonzero(targets.known)
