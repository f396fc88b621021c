"""The router's core: which family and variant a request means, its rows, its way through a batcher, its answer.

Knows neither HTTP nor Ray: the batchers are given. `deployments.api` is its border to HTTP, `deployments.app` binds it
to Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deployments.batcher import Batcher
from fettle.config import LimitConfig
from fettle.errors import RequestError, TooLargeError, UnknownModelError
from fettle.family import Family
from fettle.manifest import TaskKind, VariantManifest
from fettle.rows import Row
from fettle.tokenizer import Text, Tokenizer

# Above this many characters tokenization leaves the event loop, so that one large request does not stall the rest.
TOKENIZE_INLINE_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True)
class ServedFamily:
    """A family with a batcher for each variant that is served."""

    name: str
    family: Family
    tokenizer: Tokenizer
    batchers: Mapping[str, Batcher]
    default: str

    @property
    def models(self) -> list[str]:
        return [self.name, *(f"{self.name}:{variant}" for variant in self.batchers)]


@dataclass(frozen=True, slots=True)
class Target:
    """Who will answer: a variant of a family, and the batcher before it."""

    family: ServedFamily
    variant: str

    @property
    def manifest(self) -> VariantManifest:
        return self.family.family.variants[self.variant]

    @property
    def batcher(self) -> Batcher:
        return self.family.batchers[self.variant]


@dataclass(frozen=True, slots=True)
class Tokenized:
    rows: list[Row]
    ms: float

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def truncated(self) -> int:
        return sum(row.truncated for row in self.rows)


@dataclass(frozen=True, slots=True)
class Inferred:
    """`values` float32 [rows, width]; of the rows' times the longest, in ms."""

    values: NDArray[np.float32]
    queue_ms: float
    infer_ms: float


@dataclass(frozen=True, slots=True)
class Router:
    families: Mapping[str, ServedFamily]
    limits: LimitConfig

    def target(self, model: str | None, kind: TaskKind | None = None) -> Target:
        """Resolve `family` or `family:variant`; None means the only family that does this kind of task.

        Raises:
            UnknownModelError: no such family or variant is served.
            RequestError: the family does another task, or several could be meant.
        """
        if model is None:
            return self._only(kind)
        name, _, pinned = model.partition(":")
        family = self.families.get(name)
        if family is None or (pinned and pinned not in family.batchers):
            raise UnknownModelError(f"model {model!r} is not served; there are {self._models()}", param="model")
        if kind is not None and family.family.manifest.task.kind is not kind:
            raise RequestError(
                f"model {name!r} does not {kind.value}: its task is {family.family.manifest.task.kind.value}",
                param="model",
            )
        return Target(family, pinned or family.default)

    def check_room(self, target: Target, inputs: int) -> None:
        """Refuse early, before tokenization costs anything.

        Raises:
            TooLargeError: more inputs than one request may have.
            OverloadedError: the queue is full.
        """
        self.check_inputs(inputs)
        target.batcher.check_room()

    def check_inputs(self, inputs: int) -> None:
        """Raises TooLargeError for more inputs than one request may have."""
        if inputs > self.limits.max_inputs:
            raise TooLargeError(
                f"{inputs} inputs in one request, the limit is {self.limits.max_inputs}; send several requests",
                param="input",
            )

    async def tokenize(
        self, target: Target, texts: Sequence[Text], *, max_length: int | None = None, truncate: bool = True
    ) -> Tokenized:
        """Texts or pairs to rows."""

        def encode() -> list[Row]:
            return target.family.tokenizer.encode(texts, max_length=max_length, truncate=truncate)

        if sum(map(_characters, texts)) > TOKENIZE_INLINE_CHARACTERS:
            return await asyncio.to_thread(_timed, encode)
        return _timed(encode)

    def rows_of_ids(
        self, target: Target, lists: Sequence[Sequence[int]], *, max_length: int | None = None, truncate: bool = True
    ) -> Tokenized:
        """Rows from token ids that the client made."""
        row = target.family.tokenizer.row_of_ids
        return _timed(
            lambda: [row(ids, index=index, max_length=max_length, truncate=truncate) for index, ids in enumerate(lists)]
        )

    async def infer(self, target: Target, rows: Sequence[Row]) -> Inferred:
        answers = await target.batcher.answer(rows)
        return Inferred(
            values=np.stack([answer.values for answer in answers]),
            queue_ms=max(answer.queue_ms for answer in answers),
            infer_ms=max(answer.infer_ms for answer in answers),
        )

    def _only(self, kind: TaskKind | None) -> Target:
        fitting = [family for family in self.families.values() if kind in (None, family.family.manifest.task.kind)]
        if len(fitting) == 1:
            return Target(fitting[0], fitting[0].default)
        if not fitting and kind is not None:
            raise UnknownModelError(f"no family here does {kind.value}; there are {self._models()}", param="model")
        raise RequestError(f"name a model: one of {self._models()}", param="model")

    def _models(self) -> str:
        return ", ".join(model for family in self.families.values() for model in family.models)


def _timed(work: Callable[[], list[Row]]) -> Tokenized:
    started = time.perf_counter()
    rows = work()
    return Tokenized(rows, (time.perf_counter() - started) * 1000)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
