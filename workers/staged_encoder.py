"""The ONNX Runtime engine for a variant with exits: one graph a stage, and fewer rows from stage to stage.

After each stage, rows whose score reaches their own threshold leave with its answer. Who leaves is `fettle.policy`; how
rows share calls is `workers.onnx_encoder`. On CPU all stages of one call run before the next call starts, so that
hidden states stay in the core's cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fettle.answers import Floats, confidence
from fettle.errors import EngineError
from fettle.manifest import VariantManifest
from fettle.policy import passes
from fettle.rows import Exits, Outputs, Rows
from workers.engine import EngineOptions, warm_up_rows
from workers.onnx_encoder import ORT_ERRORS, call_tokens, in_calls, open_session, taken

VALUES, HIDDEN, NEXT_HIDDEN = "values", "hidden", "next_hidden"
# Rows that have left are taken out of the batch once the padded tokens that stay are at most this share of it. On CPU
# a call costs what its tokens cost, so it always pays. On CUDA hidden states go to the host and back for it, and small
# batches cost nearly what large ones do: not measured, so only when half is gone.
COMPACT_AT = {"cpu": 1.0, "cuda": 0.5}


class StagedEncoder:
    """One variant with exits in ONNX Runtime. `run` answers each row at the first stage whose score suffices."""

    def __init__(self, directory: Path, manifest: VariantManifest, options: EngineOptions) -> None:
        """Load the graph of every stage.

        Raises:
            UsageError: CUDA was asked for and is not there.
            FamilyError: ONNX Runtime cannot load a graph.
        """
        self.manifest = manifest
        self.compact_at = COMPACT_AT[options.device]
        self._device = options.device
        self._call_tokens = call_tokens(options)
        self._sessions = [open_session(directory / stage.file, options) for stage in manifest.stages]

    def warm_up(self) -> None:
        for rows in warm_up_rows(self.manifest.tokenizer.max_length):
            self.run(rows)

    def run(self, rows: Rows, exits: Exits | None = None) -> Outputs:
        """float32 [rows, width], and the stage that answered each row.

        Raises:
            EngineError: ONNX Runtime failed on this batch.
            UsageError: there are `exits`, and the task's answers have no confidence.
        """
        started = time.perf_counter()
        values = np.empty((len(rows), self.manifest.task.width), np.float32)
        stages = np.empty(len(rows), np.int8)
        for chosen, part in self._calls(rows):
            part_exits = None if exits is None else Exits(exits.thresholds[chosen], exits.temperatures)
            values[chosen], stages[chosen] = self._answered(part, part_exits)
        return Outputs(values, (time.perf_counter() - started) * 1e3, stages)

    def by_stage(self, rows: Rows) -> Floats:
        """What every stage answers, whether a row would have left before or not: float32 [rows, stages, width].

        Raises:
            EngineError: ONNX Runtime failed on this batch.
        """
        values = np.empty((len(rows), len(self.manifest.stages), self.manifest.task.width), np.float32)
        for chosen, part in self._calls(rows):
            batch = self._batch(part)
            for index, session in enumerate(self._sessions):
                values[chosen, index] = batch.answers(session)
        return values

    def close(self) -> None:
        self._sessions = []

    def _calls(self, rows: Rows) -> Iterator[tuple[NDArray[np.int64], Rows]]:
        if not self._sessions:
            raise EngineError("the engine is closed")
        yield from in_calls(rows, self._call_tokens, row_by_row=self.manifest.row_by_row)

    def _batch(self, rows: Rows) -> _Batch:
        return _Batch(rows, self.manifest.tokenizer.pad_id, on_device=self._device == "cuda")

    def _answered(self, rows: Rows, exits: Exits | None) -> tuple[Floats, NDArray[np.int8]]:
        values = np.empty((len(rows), self.manifest.task.width), np.float32)
        stages = np.empty(len(rows), np.int8)
        batch = self._batch(rows)
        # Row numbers of what is in the batch, and which of them have no answer yet.
        numbers = np.arange(len(rows))
        waiting = np.ones(len(rows), np.bool_)
        for index, session in enumerate(self._sessions):
            answers = batch.answers(session)
            leaving = waiting & self._leave(answers, index, exits, numbers)
            values[numbers[leaving]] = answers[leaving]
            stages[numbers[leaving]] = index
            waiting &= ~leaving
            if not waiting.any():
                break
            if self._pays(batch.rows, waiting):
                batch.keep(np.flatnonzero(waiting))
                numbers, waiting = numbers[waiting], waiting[waiting]
        return values, stages

    def _leave(self, answers: Floats, stage: int, exits: Exits | None, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        if stage == len(self._sessions) - 1:
            return np.ones(len(answers), np.bool_)
        if exits is None:
            return np.zeros(len(answers), np.bool_)
        scores = confidence(answers, self.manifest.task, float(exits.temperatures[stage]))
        return passes(scores, exits.thresholds[numbers, stage])

    def _pays(self, rows: Rows, waiting: NDArray[np.bool_]) -> bool:
        """Whether to take the rows that have left out of the batch: see `COMPACT_AT`."""
        if waiting.all():
            return False
        left = int(rows.lengths[waiting].max()) * int(waiting.sum())
        return left <= self.compact_at * rows.longest * len(rows)


class _Batch:
    """The inputs of one call, and the hidden states [rows, length, hidden] between its stages."""

    def __init__(self, rows: Rows, pad_id: int, *, on_device: bool) -> None:
        self.rows = rows
        self._pad_id = pad_id
        self._on_device = on_device
        self._hidden: Any = None
        self._feed = self._padded()

    def answers(self, session: ort.InferenceSession) -> Floats:
        """Run a stage on the batch: float32 [rows, width]. Its hidden states wait for the next stage."""
        run = self._run_on_device if self._on_device else self._run
        try:
            values, self._hidden = run(session)
        except ORT_ERRORS as error:
            raise EngineError(
                f"ONNX Runtime failed on a batch of {len(self.rows)} rows of up to {self.rows.longest} tokens"
            ) from error
        return values

    def keep(self, chosen: NDArray[np.int64]) -> None:
        """Take all but the chosen rows out, and cut the padding to the longest of them."""
        self.rows = taken(self.rows, chosen.tolist())
        self._feed = self._padded()
        hidden = self._hidden.numpy() if self._on_device else self._hidden
        hidden = np.ascontiguousarray(hidden[chosen, : self.rows.longest])
        self._hidden = ort.OrtValue.ortvalue_from_numpy(hidden, "cuda", 0) if self._on_device else hidden

    def _padded(self) -> dict[str, NDArray[np.int64]]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        return dict(zip(names, self.rows.padded(self._pad_id), strict=True))

    def _run(self, session: ort.InferenceSession) -> tuple[Floats, Any]:
        feed = self._feed | {HIDDEN: self._hidden}
        found = session.run(None, {item.name: feed[item.name] for item in session.get_inputs()})
        named = dict(zip((item.name for item in session.get_outputs()), found, strict=True))
        return named[VALUES], named.get(NEXT_HIDDEN)

    def _run_on_device(self, session: ort.InferenceSession) -> tuple[Floats, Any]:
        """The same, with the hidden states left where the next stage reads them."""
        binding = session.io_binding()
        for item in session.get_inputs():
            if item.name == HIDDEN:
                binding.bind_ortvalue_input(HIDDEN, self._hidden)
            else:
                binding.bind_cpu_input(item.name, self._feed[item.name])
        names = [item.name for item in session.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu" if name == VALUES else "cuda")
        session.run_with_iobinding(binding)
        named = dict(zip(names, binding.get_outputs(), strict=True))
        return named[VALUES].numpy(), named.get(NEXT_HIDDEN)
