"""The ONNX Runtime engine for a variant with exits: one graph a stage, and fewer rows from stage to stage.

After each stage, rows whose score reaches their own threshold leave with its answer. Who leaves is `fettle.policy`; how
rows share calls is `workers.onnx_encoder`. On CPU the whole batch goes through one stage before the next starts; then
what is left of all calls is put together into full ones again, since each call costs a fixed time as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fettle.answers import Floats, confidence
from fettle.errors import EngineError
from fettle.manifest import VariantManifest
from fettle.policy import passes
from fettle.rows import Exits, Outputs, Rows, joined
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
        self._stages = [_Stage.of(open_session(directory / stage.file, options)) for stage in manifest.stages]

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
        scores = None if exits is None else np.full((len(rows), len(self._stages) - 1), np.nan, np.float32)
        calls = list(self._calls(rows))
        for index, stage in enumerate(self._stages):
            for call in calls:
                answers = call.run(stage)
                leaving = call.waiting & self._leave(answers, index, exits, call, scores)
                values[call.numbers[leaving]] = answers[leaving]
                stages[call.numbers[leaving]] = index
                call.waiting &= ~leaving
            calls = self._compacted([call for call in calls if call.waiting.any()])
        return Outputs(values, (time.perf_counter() - started) * 1e3, stages, scores)

    def by_stage(self, rows: Rows) -> Floats:
        """What every stage answers, whether a row would have left before or not: float32 [rows, stages, width].

        Raises:
            EngineError: ONNX Runtime failed on this batch.
        """
        values = np.empty((len(rows), len(self._stages), self.manifest.task.width), np.float32)
        for call in self._calls(rows):
            for index, stage in enumerate(self._stages):
                values[call.numbers, index] = call.run(stage)
        return values

    def close(self) -> None:
        self._stages = []

    def _calls(self, rows: Rows) -> Iterator[_Call]:
        if not self._stages:
            raise EngineError("the engine is closed")
        for numbers, part in self._parts(rows):
            yield _Call(part, numbers, self._kind)

    def _parts(self, rows: Rows) -> list[tuple[NDArray[np.int64], Rows]]:
        return in_calls(rows, self._call_tokens, self.manifest)

    @property
    def _kind(self) -> _Kind:
        return _Kind(self.manifest.tokenizer.pad_id, self.manifest.packed, on_device=self._device == "cuda")

    def _leave(
        self, answers: Floats, stage: int, exits: Exits | None, call: _Call, scores: Floats | None
    ) -> NDArray[np.bool_]:
        """Which rows of the call pass their own gate here; what the gates of the waiting ones saw goes to `scores`."""
        if stage == len(self._stages) - 1:
            return np.ones(len(answers), np.bool_)
        if exits is None or scores is None:
            return np.zeros(len(answers), np.bool_)
        thresholds = exits.thresholds[call.numbers, stage]
        if (thresholds > 1).all():
            # No score reaches it, so none is computed.
            return np.zeros(len(answers), np.bool_)
        found = confidence(answers, self.manifest.task, exits.temperatures[call.numbers, stage, None])
        scores[call.numbers[call.waiting], stage] = found[call.waiting]
        return passes(found, thresholds)

    def _compacted(self, calls: list[_Call]) -> list[_Call]:
        """The calls of the next stage: without the rows that have left, where that pays (see `COMPACT_AT`)."""
        if self._device == "cuda":
            for call in calls:
                if call.left() <= self.compact_at * call.tokens:
                    call.keep_waiting()
            return calls
        if all(call.waiting.all() for call in calls) or sum(map(_Call.left, calls)) > self.compact_at * sum(
            call.tokens for call in calls
        ):
            return calls
        return self._regrouped(calls)

    def _regrouped(self, calls: list[_Call]) -> list[_Call]:
        """Full calls again from what each has left."""
        rows = joined([taken(call.rows, np.flatnonzero(call.waiting).tolist()) for call in calls])
        numbers = np.concatenate([call.numbers[call.waiting] for call in calls])
        states = [state for call in calls for state in call.states(call.waiting)]
        made = []
        for chosen, part in self._parts(rows):
            call = _Call(part, numbers[chosen], self._kind)
            call.hidden = call.together([states[index] for index in chosen.tolist()])
            made.append(call)
        return made


@dataclass(frozen=True, slots=True)
class _Stage:
    """A session, with the names that asking it for each time costs more than a small layer."""

    session: ort.InferenceSession
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, session: ort.InferenceSession) -> _Stage:
        names = (tuple(item.name for item in items) for items in (session.get_inputs(), session.get_outputs()))
        return cls(session, *names)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What all calls of an engine have in common. `packed`: hidden states have no padding."""

    pad_id: int
    packed: bool
    on_device: bool


class _Call:
    """Rows that run together, and their hidden states between stages ([rows, length, hidden] or [1, tokens, hidden]).

    `numbers` are the rows' numbers in the whole batch; `waiting` says which of them have no answer yet.
    """

    def __init__(self, rows: Rows, numbers: NDArray[np.int64], kind: _Kind) -> None:
        self.rows, self.numbers = rows, numbers
        self.waiting = np.ones(len(rows), np.bool_)
        self.hidden: Any = None
        self._kind = kind
        self._feed = self._padded()

    @property
    def tokens(self) -> int:
        """Of all its rows, padded ones where there is padding."""
        return self.rows.tokens if self._kind.packed else self.rows.longest * len(self.rows)

    def left(self) -> int:
        """The same of the rows that have no answer yet."""
        lengths = self.rows.lengths[self.waiting]
        return int(lengths.sum() if self._kind.packed else lengths.max() * len(lengths))

    def states(self, chosen: NDArray[np.bool_]) -> list[Floats]:
        """Of these rows, [length, hidden] of each."""
        hidden = self.hidden.numpy() if self._kind.on_device else self.hidden
        lengths, ends = self.rows.lengths.tolist(), np.cumsum(self.rows.lengths).tolist()
        places = np.flatnonzero(chosen).tolist()
        if self._kind.packed:
            return [hidden[0, ends[row] - lengths[row] : ends[row]] for row in places]
        return [hidden[row, : lengths[row]] for row in places]

    def together(self, states: list[Floats]) -> Floats:
        """Hidden states of this call from those of its rows."""
        if self._kind.packed:
            return np.concatenate(states)[None]
        padded = np.zeros((len(states), self.rows.longest, states[0].shape[-1]), np.float32)
        for place, state in enumerate(states):
            padded[place, : len(state)] = state
        return padded

    def run(self, stage: _Stage) -> Floats:
        """The stage's answers: float32 [rows, width]. Its hidden states wait for the next stage."""
        run = self._run_on_device if self._kind.on_device else self._run
        try:
            values, self.hidden = run(stage)
        except ORT_ERRORS as error:
            raise EngineError(
                f"ONNX Runtime failed on a batch of {len(self.rows)} rows of up to {self.rows.longest} tokens"
            ) from error
        return values

    def keep_waiting(self) -> None:
        """Take the rows out that have an answer, and cut the padding to the longest of the others."""
        states, chosen = self.states(self.waiting), np.flatnonzero(self.waiting)
        self.rows = taken(self.rows, chosen.tolist())
        self.numbers, self.waiting = self.numbers[chosen], self.waiting[chosen]
        self._feed = self._padded()
        self.hidden = ort.OrtValue.ortvalue_from_numpy(self.together(states), "cuda", 0)

    def _padded(self) -> dict[str, NDArray[np.int64]]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        return dict(zip(names, self.rows.padded(self._kind.pad_id), strict=True))

    def _run(self, stage: _Stage) -> tuple[Floats, Any]:
        feed = self._feed | {HIDDEN: self.hidden}
        found = stage.session.run(None, {name: feed[name] for name in stage.inputs})
        named = dict(zip(stage.outputs, found, strict=True))
        return named[VALUES], named.get(NEXT_HIDDEN)

    def _run_on_device(self, stage: _Stage) -> tuple[Floats, Any]:
        """The same, with the hidden states left where the next stage reads them."""
        binding = stage.session.io_binding()
        for name in stage.inputs:
            if name == HIDDEN:
                binding.bind_ortvalue_input(HIDDEN, self.hidden)
            else:
                binding.bind_cpu_input(name, self._feed[name])
        for name in stage.outputs:
            binding.bind_output(name, "cpu" if name == VALUES else "cuda")
        stage.session.run_with_iobinding(binding)
        named = dict(zip(stage.outputs, binding.get_outputs(), strict=True))
        return named[VALUES].numpy(), named.get(NEXT_HIDDEN)
