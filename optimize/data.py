"""The user's sample of traffic: read, cleaned and split. What its labels mean to the model is `optimize.labels`.

Files are JSONL (also .gz), CSV or Parquet. What is broken is an error that names the line; what is merely useless
(empty texts, duplicates) is left out and counted in a warning.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fettle.config import DataFiles
from fettle.errors import DataError
from fettle.manifest import DataSplit
from fettle.tokenizer import Text

# In the order in which a duplicate is kept: the rows that figures are reported on stay clean.
SPLITS = ("test", "calibration", "validation", "train")
SHARES = {"train": 0.60, "validation": 0.12, "calibration": 0.16, "test": 0.12}
MINIMUM_TEST_ROWS = 16
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Split:
    """Texts (or pairs) and, where the data have them, the labels as they stand in the file (None: not labelled)."""

    texts: list[Text]
    labels: list[Any] | None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for row in zip(self.texts, self.labels or [None] * len(self), strict=True):
            digest.update(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
        return digest.hexdigest()

    def record(self) -> DataSplit:
        return DataSplit(rows=len(self), sha256=self.sha256, labelled=self.labels is not None)


@dataclass(frozen=True, slots=True)
class Splits:
    by_name: dict[str, Split]
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Split:
        return self.by_name[name]


@dataclass(frozen=True, slots=True)
class Table:
    """One file's usable rows, and how many had no text."""

    texts: list[Text]
    labels: list[Any] | None
    empty: int


Reader = Callable[[Path, DataFiles], Table]


def load_splits(files: DataFiles, seed: int = 0, read: Reader | None = None) -> Splits:
    """Read the files and make disjoint splits of them; one file is split by the hash of its texts.

    Args:
        read: from a file to its rows; `read_table` if None.

    Raises:
        DataError: a file, a line or a column cannot be used; or too few rows are left to report on.
    """
    warnings: list[str] = []
    read = read or read_table
    if files.data is not None:
        tables = _divide(_read_counted(read, files.data, files, warnings), seed)
    else:
        given = {name: getattr(files, name) for name in SPLITS}
        tables = {name: _read_counted(read, path, files, warnings) for name, path in given.items() if path is not None}
    splits = _without_duplicates(tables, warnings)
    rows = len(splits["test"])
    if rows < MINIMUM_TEST_ROWS:
        raise DataError(
            f"only {rows} rows are left to test on, at least {MINIMUM_TEST_ROWS} are needed; give more data"
            + (f" (the test split is {SHARES['test']:.0%} of --data)" if files.data is not None else "")
        )
    return Splits(splits, warnings)


def read_table(path: Path, files: DataFiles) -> Table:
    """Read one file.

    Raises:
        DataError: unreadable, wrongly encoded, broken lines (the first few are named), or a column that is not there.
    """
    rows = list(records(path))
    if not rows:
        raise DataError(f"{path}: no rows")
    _check_columns(path, files, {column for _, record in rows for column in record})
    texts: list[Text] = []
    labels: list[Any] = []
    broken: list[tuple[int, str]] = []
    empty = 0
    for line, record in rows:
        sides = [record.get(column) for column in (files.text_column, files.pair_column) if column is not None]
        wrong = next(filter(None, map(not_a_text, sides)), None)
        if wrong is not None:
            broken.append((line, wrong))
        elif not all(side and side.strip() for side in sides):
            empty += 1
        else:
            texts.append(str(sides[0]) if len(sides) == 1 else (str(sides[0]), str(sides[1])))
            labels.append(_blank_to_none(record.get(files.label_column)))
    raise_if_broken(path, broken)
    return Table(texts, labels if any(label is not None for label in labels) else None, empty)


# Splits


def _divide(table: Table, seed: int) -> dict[str, Table]:
    """By content, so that a text stays in its split when rows are added, removed or shuffled."""
    chosen: dict[str, list[int]] = {name: [] for name in SPLITS}
    for row, text in enumerate(table.texts):
        chosen[_split_of(text, seed)].append(row)
    return {
        name: Table(
            [table.texts[row] for row in rows],
            None if table.labels is None else [table.labels[row] for row in rows],
            empty=0,
        )
        for name, rows in chosen.items()
    }


def _split_of(text: Text, seed: int) -> str:
    digest = hashlib.sha256(json.dumps([seed, text], ensure_ascii=False).encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    for name, share in SHARES.items():
        if point < share:
            return name
        point -= share
    return "test"


def _without_duplicates(tables: dict[str, Table], warnings: list[str]) -> dict[str, Split]:
    seen: set[Text] = set()
    dropped: dict[str, int] = {}
    splits = {}
    for name in (name for name in SPLITS if name in tables):
        table = tables[name]
        keep = []
        for row, text in enumerate(table.texts):
            if text not in seen:
                seen.add(text)
                keep.append(row)
        dropped[name] = len(table.texts) - len(keep)
        labels = None if table.labels is None else [table.labels[row] for row in keep]
        splits[name] = Split([table.texts[row] for row in keep], labels)
    if any(dropped.values()):
        counts = ", ".join(f"{count} from {name}" for name, count in dropped.items() if count)
        warnings.append(f"dropped {sum(dropped.values())} duplicate texts: {counts}")
    return splits


def _read_counted(read: Reader, path: Path, files: DataFiles, warnings: list[str]) -> Table:
    table = read(path, files)
    if table.empty:
        warnings.append(f"{path.name}: dropped {table.empty} rows without text")
    return table


# Files


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line, columns)` of each row of a file of any known kind."""
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            return _parquet(path)
        if name.endswith((".jsonl", ".ndjson", ".json")):
            return _json_lines(path, _decoded(path))
        if name.endswith(".csv"):
            return _csv(path, _decoded(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (IsADirectoryError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    raise DataError(f"{path}: unknown kind of file; use .jsonl, .jsonl.gz, .csv, .csv.gz or .parquet")


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8 ({error.reason}); convert the file") from None


def _json_lines(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    broken: list[tuple[int, str]] = []
    records = []
    # Not splitlines(): a JSON string may hold U+2028 and its like.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            broken.append((number, f"not JSON ({error.msg} at column {error.colno})"))
            continue
        if isinstance(record, dict):
            records.append((number, record))
        else:
            broken.append((number, f"a JSON {type(record).__name__}, not an object"))
    raise_if_broken(path, broken)
    return iter(records)


def _csv(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    limit = csv.field_size_limit(len(content) + 1)
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    records: list[tuple[int, dict[str, Any]]] = []
    broken: list[tuple[int, str]] = []
    try:
        for record in reader:
            if None in record or None in record.values():
                broken.append((reader.line_num, f"not {len(reader.fieldnames or [])} columns as in the header"))
            else:
                records.append((reader.line_num, record))
    except csv.Error as error:
        broken.append((reader.line_num, str(error)))
    finally:
        csv.field_size_limit(limit)
    raise_if_broken(path, broken)
    return iter(records)


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow; run: pip install 'fettle[parquet]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from None
    return iter(enumerate(rows, start=1))


def _check_columns(path: Path, files: DataFiles, present: set[str]) -> None:
    wanted = {"text": files.text_column, "pair": files.pair_column}
    # The default label column is optional; one that was asked for is not.
    if "label_column" in files.model_fields_set:
        wanted["label"] = files.label_column
    for role, column in wanted.items():
        if column is not None and column not in present:
            raise DataError(
                f"{path}: no column {column!r} for the {role}; it has {', '.join(sorted(present))} "
                f"(choose one with --{role}-column)"
            )


def raise_if_broken(path: Path, broken: Iterable[tuple[int, str]]) -> None:
    broken = list(broken)
    if not broken:
        return
    shown = "; ".join(f"line {line}: {reason}" for line, reason in broken[:SHOWN])
    count = f"{len(broken)} broken line" + "s" * (len(broken) > 1)
    raise DataError(f"{path}: {count}: {shown}" + "; ..." * (len(broken) > SHOWN))


def not_a_text(value: Any) -> str | None:
    """Why a value cannot be a text; None for a text and for no value."""
    if value is None:
        return None
    if not isinstance(value, str):
        return f"the text is {type(value).__name__}, not a string"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "the text has half of a surrogate pair, which is not valid Unicode"
    return None


def _blank_to_none(label: Any) -> Any:
    return None if isinstance(label, str) and not label.strip() else label
