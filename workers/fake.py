"""An engine without a model, for tests of everything around an engine.

Its values are a linear function of the row's own token ids, so every answer can be checked and no answer depends
on who shares the batch. With stages, an early one has read only the beginning of a row. It takes as long as it is told
to, fails where it is told to, and corrupts one answer in so many if it is told to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fettle.answers import Floats, confidence, normalized
from fettle.errors import EngineError
from fettle.manifest import Strict, VariantManifest
from fettle.policy import passes
from fettle.rows import Exits, Outputs, Rows

FAKE_PASS = "fake"
CRASH_STATUS = 70


class FakeParameters(Strict):
    """The parameters of the pass named "fake" in the manifest's recipe."""

    ms_per_call: float = Field(default=0.0, ge=0)
    ms_per_token: float = Field(default=0.0, ge=0, description="for each padded token of a batch")
    fail_on_token: int | None = Field(default=None, description="a batch with this token id raises EngineError")
    exit_on_token: int | None = Field(default=None, description="a batch with this token id ends the process")
    stall_file: str | None = Field(default=None, description="the engine that can remove this file never returns")
    corrupt_every: int | None = Field(default=None, ge=1, description="every so manyth row gets another row's answer")
    tokens_read: int | None = Field(default=None, ge=1, description="the answer comes from so many tokens")


class FakeEngine:
    def __init__(self, manifest: VariantManifest) -> None:
        self.manifest = manifest
        given = next((step.parameters for step in manifest.recipe if step.name == FAKE_PASS), {})
        self.parameters = FakeParameters.model_validate(given)
        self._answered = 0

    def warm_up(self) -> None:
        """Nothing to warm."""

    def run(self, rows: Rows, exits: Exits | None = None) -> Outputs:
        started = time.perf_counter()
        if self.parameters.exit_on_token in rows.ids:
            os._exit(CRASH_STATUS)
        if self.parameters.fail_on_token in rows.ids:
            raise EngineError(f"the fake engine was told to fail on token {self.parameters.fail_on_token}")
        self._stall()
        padded = len(rows) * rows.longest
        time.sleep((self.parameters.ms_per_call + self.parameters.ms_per_token * padded) / 1000)
        each = np.split(rows.ids, np.cumsum(rows.lengths)[:-1])
        if self.manifest.exits:
            values, stages, scores = self._by_stage(each, exits)
        else:
            values, stages, scores = self._values([ids[: self.parameters.tokens_read] for ids in each]), None, None
        self._corrupt(values)
        return Outputs(values, (time.perf_counter() - started) * 1000, stages, scores)

    def _values(self, each: Sequence[NDArray[np.int32]]) -> Floats:
        task = self.manifest.task
        values = np.stack([expected(ids, task.width) for ids in each])
        return normalized(values) if task.normalized else values

    def _by_stage(
        self, each: Sequence[NDArray[np.int32]], exits: Exits | None
    ) -> tuple[Floats, NDArray[np.int8], Floats | None]:
        """As `workers.staged_encoder` does it: each row leaves where its score reaches its own threshold."""
        last = self.manifest.exits
        values = self._values(each)
        stages = np.full(len(each), last, np.int8)
        if exits is None:
            return values, stages, None
        scores = np.full((len(each), last), np.nan, np.float32)
        for stage in range(last):
            found = self._values([ids[: read_at(len(ids), stage, last + 1)] for ids in each])
            score = confidence(found, self.manifest.task, exits.temperatures[:, stage, None])
            waiting = stages == last
            scores[waiting, stage] = score[waiting]
            leaving = waiting & passes(score, exits.thresholds[:, stage])
            values[leaving], stages[leaving] = found[leaving], stage
        return values, stages, scores

    def _stall(self) -> None:
        """An endless loop, once, where it was told to."""
        if self.parameters.stall_file is None:
            return
        try:
            Path(self.parameters.stall_file).unlink()
        except FileNotFoundError:
            return
        while True:
            pass

    def _corrupt(self, values: Floats) -> None:
        """Roll every so manyth row by one, which puts another label first."""
        every = self.parameters.corrupt_every
        for row in range(len(values) if every else 0):
            self._answered += 1
            if every and self._answered % every == 0:
                values[row] = np.roll(values[row], 1)

    def close(self) -> None:
        """Nothing to free."""


def read_at(length: int, stage: int, stages: int) -> int:
    """How many tokens of a row a stage has read."""
    return max(1, length * (stage + 1) // stages)


def expected(ids: NDArray[np.int32], width: int) -> Floats:
    """What the fake engine answers for one row, before any normalisation: float32 [width].

    Value j is the mean over the positions i of `ids[i] * ((i + j) % width + 1)`, over 100: it depends on every id
    and on their order.
    """
    weights = (np.arange(len(ids))[:, None] + np.arange(width)) % width + 1
    values: Floats = (ids.astype(np.float64) @ weights / (100 * max(len(ids), 1))).astype(np.float32)
    return values
