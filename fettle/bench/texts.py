"""What requests say: texts of a file or made of words, and requests recorded with their times."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from fettle.errors import UsageError

Item = TypeVar("Item")
# Names of the column with the text, the first that a line has.
COLUMNS = ("text", "prompt", "input", "inputs")
# Frequent words, so that a tokenizer makes about one token of each.
WORDS = """
the of and to a in is it you that he was for on are with as his they be at one have this from or had by hot word but
what some we can out other were all there when up use your how said an each she which do their time if will way about
many then them would write like so these her long make thing see him two has look more day could go come did number
sound no most people my over know water than call first who may down side been now find any new work part take get
"""
SYNTHETIC = 2000


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request of a trace: second after the start, what it says, and how it differs from others."""

    at: float
    text: str | None = None
    max_disagreement: float | str | None = None
    max_tokens: int | None = None


def read_texts(path: Path) -> list[str]:
    """The texts of a JSONL file (`text`, `prompt` or `input` of each line), or the lines of any other; gzipped or not.

    Raises:
        UsageError: there is none, or a line has no text.
    """
    lines = [line for line in _lines(path) if line.strip()]
    if not lines:
        raise UsageError(f"{path}: no texts in it")
    if ".jsonl" not in path.suffixes:
        return [line.decode(errors="replace") for line in lines]
    return [_text_of(_object(line, path, number), path, number) for number, line in enumerate(lines, 1)]


def synthetic_texts(words: tuple[int, int], seed: int, count: int = SYNTHETIC) -> list[str]:
    """`count` texts of frequent words, their number drawn evenly from the two bounds."""
    source, known = random.Random(f"{seed} texts"), WORDS.split()
    return [" ".join(source.choices(known, k=source.randint(*words))) for _ in range(count)]


def read_trace(path: Path, speed: float = 1.0) -> list[Recorded]:
    """Requests with their times: JSONL with `at` (or `timestamp`) in seconds, and what else each may say.

    Counted from the first one, `speed` times as fast.

    Raises:
        UsageError: a line without a time, or with a field of a wrong sort.
    """
    made = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        fields = _object(line, path, number)
        at = fields.get("at", fields.get("timestamp"))
        if not isinstance(at, int | float):
            raise UsageError(f"{path}: line {number} has no number `at`, the second at which it is sent")
        text = next((fields[name] for name in COLUMNS if name in fields), None)
        made.append(Recorded(float(at), text, fields.get("max_disagreement"), fields.get("max_tokens")))
    if not made:
        raise UsageError(f"{path}: no requests in it")
    made.sort(key=lambda item: item.at)
    first = made[0].at
    return [Recorded((r.at - first) / speed, r.text, r.max_disagreement, r.max_tokens) for r in made]


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The same order for every system that is given the same seed, and for whatever goes with the texts."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def _lines(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: line {number} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UsageError(f"{path}: line {number} is no JSON object")
    return fields


def _text_of(fields: dict[str, Any], path: Path, number: int) -> str:
    text = next((fields[name] for name in COLUMNS if name in fields), None)
    if not isinstance(text, str):
        raise UsageError(f"{path}: line {number} has no text in one of {', '.join(COLUMNS)}")
    return text
