"""Prediction without a server: `fettle.load(family).predict(texts)`, and the pipe `fettle predict FAMILY < texts`.

The tokenizer, the choice of the operating point and the walk through it are those of the router, so a certificate means
the same here. One process, one caller at a time; no queue and no deadlines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import orjson

from fettle.answers import Floats, probabilities
from fettle.config import TextConfig
from fettle.errors import DataError, UsageError
from fettle.family import Family, check_files
from fettle.local_text import Generates, Generation, LocalTexts
from fettle.manifest import Head, OperatingPoint, Step, Task, TaskKind
from fettle.points import Answered, answer, check_steps, choose_point, whole
from fettle.promise import EXACT, Bound, Tolerance, share
from fettle.rows import Row
from fettle.tokenizer import Text, Tokenizer

if TYPE_CHECKING:
    from workers.engine import Device, Engine

READ_BYTES = 1 << 18
JSON_LINE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


@dataclass(frozen=True, slots=True)
class Prediction:
    """One text's answer, and how it came about.

    `answer`: a label; for several labels, those that apply; for regression a number; for embeddings a vector, float32
    [width]. `scores`: by label, for classification. `score` in [0, 1] is how sure the answer is, at the gate that took
    it. `bound` is "exact" where the reference itself answered and None where no promise was asked for.
    """

    answer: str | list[str] | float | Floats
    scores: dict[str, float] | None
    score: float | None
    point: str | None
    variant: str
    stage: int
    bound: Bound | Literal["exact"] | None
    truncated: bool


@dataclass(frozen=True, slots=True)
class _Way:
    """How a call is answered: the steps, and what is promised of them."""

    steps: Sequence[Step]
    point: str | None
    bound: Bound | Literal["exact"] | None


def load(path: Path | str, *, threads: int = 1, device: str = "cpu") -> LocalFamily | LocalTexts:
    """Open a family for prediction, or for `generate` where it generates text.

    Variants are verified and loaded when they are first needed.

    Raises:
        FamilyError, IntegrityError: no intact family there.
        UsageError: not a number of threads, or no such device.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UsageError(f"threads must be a whole number from 1, not {threads!r}", param="threads")
    match device:
        case "cpu" | "cuda":
            family = Family.open(path)
            if family.manifest.task.kind is TaskKind.GENERATE:
                return LocalTexts(checked(family), lambda variant: _generator(family, variant, threads, device))
            return LocalFamily(checked(family), threads, device)
    raise UsageError(f"device must be cpu or cuda, not {device!r}", param="device")


def checked(family: Family) -> Family:
    """The family, if its tokenizer is intact and its points fit its variants.

    Raises:
        IntegrityError, FamilyError: one of these is not so.
    """
    for problem in check_files(family.directory, family.manifest.tokenizer_files):
        raise problem
    for point in family.manifest.points:
        check_steps(point.steps, family.variants)
    return family


class LocalFamily:
    """An opened family with its engines. Made by `load`; close it, or use it in a `with` block."""

    def __init__(self, family: Family, threads: int, device: Device) -> None:
        self.family = family
        self._threads, self._device = threads, device
        self._tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
        self._engines: dict[str, Engine] = {}
        self._closed = False
        # An engine runs one call at a time.
        self._turn = Lock()

    def __enter__(self) -> LocalFamily:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def points(self) -> Sequence[OperatingPoint]:
        return self.family.manifest.points

    def predict(
        self, texts: Sequence[Text], max_disagreement: Tolerance = 0.01, *, variant: str | None = None
    ) -> list[Prediction]:
        """Answer texts, or pairs of texts, in their order.

        Args:
            texts: at once; batches are made of those of like length.
            max_disagreement: the share of answers that may differ from the reference's. The cheapest operating point
                certified at it answers, and the reference where there is none; "exact" or 0 for the reference;
                None for the family's default variant, without a promise.
            variant: this variant answers, all the way and without a promise, whatever `max_disagreement` says.

        Raises:
            UsageError: an input is no text, the tolerance no share, or the family was closed.
            FamilyError: no such variant.
            IntegrityError: a model file was changed.
            EngineError: the runtime failed.
        """
        _check_texts(texts)
        way = self._way(max_disagreement, variant)
        with self._turn:
            if self._closed:
                raise UsageError("this family was closed; open it again with fettle.load")
            if not texts:
                return []
            rows = self._tokenizer.encode(texts)
            engines = {step.variant: self._engine(step.variant) for step in way.steps}
            answered = answer(rows, way.steps, engines, self.family.manifest.task)
        return _predictions(answered, rows, way, self.family.manifest.task)

    def read(self, content: Mapping[str, Any]) -> Text:
        """An object with `text` and, for pairs, `pair`.

        Raises:
            DataError: it is none.
        """
        text, pair = content.get("text"), content.get("pair")
        if not isinstance(text, str):
            raise DataError('must be an object with a string "text"')
        if pair is not None and not isinstance(pair, str):
            raise DataError('"pair" must be a string')
        return text if pair is None else (text, pair)

    def close(self) -> None:
        """Free the models; a second time does nothing."""
        with self._turn:
            self._closed = True
            while self._engines:
                self._engines.popitem()[1].close()

    def _way(self, max_disagreement: Tolerance, variant: str | None) -> _Way:
        if variant is not None:
            return self._whole(variant)
        if max_disagreement is None:
            return self._whole(self.family.manifest.default)
        point = choose_point(self.points, share(max_disagreement))
        if point is None:
            return self._whole(self.family.manifest.reference)
        found = point.certificate
        return _Way(point.steps, point.id, Bound(found.alpha, found.delta, found.upper_bound))

    def _whole(self, variant: str) -> _Way:
        exact = variant == self.family.manifest.reference
        return _Way(whole(self.family.variant(variant)), None, EXACT if exact else None)

    def _engine(self, variant: str) -> Engine:
        if variant not in self._engines:
            from workers.engine import EngineOptions, open_engine

            options = EngineOptions(device=self._device, threads=self._threads)
            self._engines[variant] = open_engine(self.family.variant_path(variant), options)
        return self._engines[variant]


def predict_lines(
    local: LocalFamily | LocalTexts, source: BinaryIO, tolerance: Tolerance, variant: str | None, *, jsonl: bool
) -> Iterator[bytes]:
    """Answer a stream of lines: for as many as have arrived, that many lines of JSON in one piece, and so on.

    A line is one text as it is, so an empty line is an empty text and has its answer too; with `jsonl` it is an object
    that the family's `read` takes, and blank lines are errors like any other.

    Raises:
        DataError: a line is not UTF-8, or not such an object; names the line. The lines before it were answered.
    """
    number = 0
    for lines in _arriving_lines(source):
        texts: list[Any] = []
        problem: DataError | None = None
        for line in lines:
            number += 1
            try:
                texts.append(_text_of(line, local, jsonl=jsonl))
            except DataError as error:
                problem = DataError(f"line {number}: {error.message}")
                break
        predictions = local.predict(texts, tolerance, variant=variant)
        yield b"".join(orjson.dumps(as_json(prediction), option=JSON_LINE) for prediction in predictions)
        if problem is not None:
            raise problem


def as_json(prediction: Prediction | Generation) -> dict[str, Any]:
    """The prediction as JSON has it; empty fields are left out, and vectors stay arrays."""
    bound = prediction.bound
    fields = {name: getattr(prediction, name) for name in type(prediction).__slots__}
    fields["bound"] = asdict(bound) if isinstance(bound, Bound) else bound
    return {name: value for name, value in fields.items() if value is not None}


def _arriving_lines(source: BinaryIO) -> Iterator[list[bytes]]:
    """Whole lines, as many as have arrived, so that a slow pipe waits for nothing but its own texts."""
    rest = b""
    # A raw read returns what is there; a buffered one would wait until it is full.
    read = getattr(source, "read1", source.read)
    while chunk := read(READ_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield [line.removesuffix(b"\r") for line in lines]
    if rest:
        yield [rest.removesuffix(b"\r")]


def _text_of(line: bytes, local: LocalFamily | LocalTexts, *, jsonl: bool) -> Any:
    if not jsonl:
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 (byte {error.start}); convert the texts first") from None
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"not JSON ({error})") from None
    return local.read(content if isinstance(content, Mapping) else {})


def _generator(family: Family, variant: str, threads: int, device: Device) -> Generates:
    """A generator with the settings that replicas have by default."""
    from workers.engine import EngineOptions, open_runner
    from workers.generator import Generator

    options, settings = EngineOptions(device=device, threads=threads), TextConfig()
    runner = open_runner(family.variant_path(variant), options)
    return Generator(runner, settings.cache_bytes, settings.slots)


def _check_texts(texts: Sequence[Text]) -> None:
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise UsageError(f"predict takes a list of texts, not {type(texts).__name__}", param="texts")
    for index, text in enumerate(texts):
        parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
        if not all(isinstance(part, str) for part in parts):
            kind = type(text).__name__
            raise UsageError(f"input {index} is {kind}; it must be a string or a tuple of two strings", param="texts")
        try:
            "".join(parts).encode()
        except UnicodeEncodeError:
            raise UsageError(f"input {index} holds half of a surrogate pair; decode it anew", param="texts") from None


def _predictions(answered: Answered, rows: Sequence[Row], way: _Way, task: Task) -> list[Prediction]:
    names = _label_names(task)
    shown = probabilities(answered.values, task)
    return [
        Prediction(
            answer=_answer(shown[index], task, names),
            scores=dict(zip(names, shown[index].tolist(), strict=True)) if names else None,
            score=None if np.isnan(score) else float(score),
            point=way.point,
            variant=way.steps[answered.steps[index]].variant,
            stage=int(answered.stages[index]),
            bound=way.bound,
            truncated=rows[index].truncated,
        )
        for index, score in enumerate(answered.scores)
    ]


def _label_names(task: Task) -> list[str]:
    """The labels whose scores are shown; none for numbers and vectors."""
    if task.kind is TaskKind.EMBED or task.head is Head.REGRESSION:
        return []
    return task.labels or [f"LABEL_{number}" for number in range(task.width)]


def _answer(scores: Floats, task: Task, names: Sequence[str]) -> str | list[str] | float | Floats:
    if task.kind is TaskKind.EMBED:
        return scores
    match task.head:
        case Head.MULTI_LABEL:
            return [name for name, score in zip(names, scores, strict=True) if score > 0.5]
        case Head.REGRESSION:
            return float(scores[0])
        case _:
            return names[int(scores.argmax())]
