"""An engine without a model, for tests of everything around an engine.

Its values are a linear function of the row's own token ids, so every answer can be checked and no answer depends
on who shares the batch. It takes as long as it is told to, and fails where it is told to.
"""

from __future__ import annotations

import os
import time

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fettle.answers import Floats, normalized
from fettle.errors import EngineError
from fettle.manifest import Strict, VariantManifest
from fettle.rows import Exits, Outputs, Rows

FAKE_PASS = "fake"
CRASH_STATUS = 70


class FakeParameters(Strict):
    """The parameters of the pass named "fake" in the manifest's recipe."""

    ms_per_call: float = Field(default=0.0, ge=0)
    ms_per_token: float = Field(default=0.0, ge=0, description="for each padded token of a batch")
    fail_on_token: int | None = Field(default=None, description="a batch with this token id raises EngineError")
    exit_on_token: int | None = Field(default=None, description="a batch with this token id ends the process")


class FakeEngine:
    def __init__(self, manifest: VariantManifest) -> None:
        self.manifest = manifest
        given = next((step.parameters for step in manifest.recipe if step.name == FAKE_PASS), {})
        self.parameters = FakeParameters.model_validate(given)

    def warm_up(self) -> None:
        """Nothing to warm."""

    def run(self, rows: Rows, exits: Exits | None = None) -> Outputs:
        del exits  # one stage only, so there is nothing to leave by
        started = time.perf_counter()
        if self.parameters.exit_on_token in rows.ids:
            os._exit(CRASH_STATUS)
        if self.parameters.fail_on_token in rows.ids:
            raise EngineError(f"the fake engine was told to fail on token {self.parameters.fail_on_token}")
        padded = len(rows) * rows.longest
        time.sleep((self.parameters.ms_per_call + self.parameters.ms_per_token * padded) / 1000)
        task = self.manifest.task
        each = np.split(rows.ids, np.cumsum(rows.lengths)[:-1])
        values = np.stack([expected(ids, task.width) for ids in each])
        if task.normalized:
            values = normalized(values)
        return Outputs(values, (time.perf_counter() - started) * 1000)

    def close(self) -> None:
        """Nothing to free."""


def expected(ids: NDArray[np.int32], width: int) -> Floats:
    """What the fake engine answers for one row, before any normalisation: float32 [width].

    Value j is the mean over the positions i of `ids[i] * ((i + j) % width + 1)`, over 100: it depends on every id
    and on their order.
    """
    weights = (np.arange(len(ids))[:, None] + np.arange(width)) % width + 1
    values: Floats = (ids.astype(np.float64) @ weights / (100 * max(len(ids), 1))).astype(np.float32)
    return values
