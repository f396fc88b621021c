"""How an operating point answers: which point, where a row leaves, what goes on to the next variant.

The loop is one for all uses: `answer` walks the steps with engines, `replay` with outputs recorded from them, and both
decide alike, so that what was certified is what is served. The caller holds the engines; no file, no clock, no queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from fettle.answers import Floats, confidence
from fettle.errors import FamilyError
from fettle.manifest import Certificate, Gate, Head, OperatingPoint, Step, Strict, Task, TaskKind, VariantManifest
from fettle.policy import passes
from fettle.rows import Exits, Outputs, Row, Rows, in_batches
from fettle.store import sha256_bytes

# Scores end at 1, so this threshold is never reached.
NEVER = 2.0
# One call of an engine in `answer`; engines cut it further as suits them.
BATCH_ROWS = 256
BATCH_TOKENS = 16_384

# Thresholds and temperatures of a step's exits, each float32 [stages - 1].
Gates = tuple[Floats, Floats]
# Runs one step on some of the rows: their values [chosen, width], and the stage that answered each, int8 [chosen].
RunStep = Callable[[Step, NDArray[np.intp]], tuple[Floats, NDArray[np.int8]]]


class _Promise(Strict):
    steps: list[Step]
    certificate: Certificate


class Runs(Protocol):
    """What `answer` asks of an engine (`workers.engine.Engine` has it)."""

    def run(self, rows: Rows, exits: Exits | None = None) -> Outputs: ...


@dataclass(frozen=True, slots=True)
class Answered:
    """Row by row: `values` float32 [rows, width]; which `steps` and `stages` answered, int8 [rows], both from 0.

    `scores` float32 [rows] is that of the answer at its own gate, NaN where the task has none.
    """

    values: Floats
    steps: NDArray[np.int8]
    stages: NDArray[np.int8]
    scores: Floats


def choose_point(points: Iterable[OperatingPoint], max_disagreement: float) -> OperatingPoint | None:
    """The cheapest point that is certified at `max_disagreement` or a stricter level.

    None where there is no such point, always at 0 (`exact`): the reference answers.
    """
    admissible = [point for point in points if point.certificate.alpha <= max_disagreement]
    return min(admissible, key=lambda point: (point.expected_cpu_ms, point.certificate.alpha), default=None)


def fingerprint(point: OperatingPoint) -> str:
    """Hex SHA-256 of how the point answers and of what is certified about it; a new certificate is another one."""
    promise = _Promise(steps=point.steps, certificate=point.certificate)
    # Without what is None, so that a new optional field leaves the evidence about older points theirs.
    content = promise.model_dump(mode="json", exclude_none=True)
    return sha256_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))


def whole(variant: VariantManifest) -> tuple[Step]:
    """One variant on its own, every row to its last stage."""
    return (Step(variant=variant.id, gates=[Gate(threshold=NEVER)] * variant.exits + [Gate(threshold=0.0)]),)


def check_steps(steps: Sequence[Step], variants: Mapping[str, VariantManifest]) -> None:
    """A point must name variants of its family, with one gate for each stage.

    Raises:
        FamilyError: it does not.
    """
    for step in steps:
        if step.variant not in variants:
            raise FamilyError(
                f"an operating point uses {step.variant!r}, which the family lacks; run `fettle optimize`"
            )
        stages = variants[step.variant].exits + 1
        if len(step.gates) != stages:
            raise FamilyError(
                f"an operating point has {len(step.gates)} gates for {step.variant!r}, not {stages}; "
                "run `fettle optimize` again"
            )


def has_scores(task: Task) -> bool:
    """Whether answers have a score, so that rows can exit early or be escalated; numbers and vectors have none."""
    return task.kind is TaskKind.CLASSIFY and (
        task.head is Head.MULTI_LABEL or (task.head is Head.SINGLE_LABEL and task.width > 1)
    )


def scores_at(values: Floats, task: Task, gate: Gate) -> Floats:
    """The score of each answer at the gate's temperature: float32 [rows], NaN where the task has none."""
    if not has_scores(task):
        return np.full(len(values), np.nan, np.float32)
    # Infinite logits have no score either, and need no warning.
    with np.errstate(invalid="ignore"):
        return confidence(values, task, gate.temperature)


def accepts(values: Floats, task: Task, gate: Gate) -> NDArray[np.bool_]:
    """Which answers the gate takes: bool [rows]. NaN scores pass no gate."""
    return passes(scores_at(values, task, gate), gate.threshold)


def exits(step: Step, rows: int) -> Exits | None:
    """The step's early gates as an engine takes them; None where no row can leave early."""
    early = step.gates[:-1]
    if all(gate.threshold > 1 for gate in early):
        return None
    thresholds, temperatures = early_gates(step)
    return Exits(thresholds=np.tile(thresholds, (rows, 1)), temperatures=np.tile(temperatures, (rows, 1)))


def early_gates(step: Step) -> Gates:
    """The step's exits as one row of an engine's table: thresholds and temperatures, each float32 [stages - 1]."""
    early = step.gates[:-1]
    return (
        np.array([gate.threshold for gate in early], np.float32),
        np.array([gate.temperature for gate in early], np.float32),
    )


def answer(rows: Sequence[Row], steps: Sequence[Step], engines: Mapping[str, Runs], task: Task) -> Answered:
    """Answer the rows: each step on those that the steps before did not take.

    Rows of like length share a call, whatever their order.

    Raises:
        EngineError: an engine failed on a batch.
    """
    lengths = [len(row) for row in rows]

    def run(step: Step, chosen: NDArray[np.intp]) -> tuple[Floats, NDArray[np.int8]]:
        order = chosen[np.argsort([lengths[index] for index in chosen], kind="stable")].tolist()
        values = np.empty((len(rows), task.width), np.float32)
        stages = np.full(len(rows), len(step.gates) - 1, np.int8)
        for batch in in_batches(order, lengths, BATCH_ROWS, BATCH_TOKENS):
            outputs = engines[step.variant].run(Rows.of([rows[index] for index in batch]), exits(step, len(batch)))
            values[batch] = outputs.values
            if outputs.stages is not None:
                stages[batch] = outputs.stages
        return values[chosen], stages[chosen]

    return _walk(steps, len(rows), task, run)


def replay(traces: Mapping[str, Floats], steps: Sequence[Step], task: Task) -> Answered:
    """What `answer` would give, from each variant's outputs at each of its stages: float32 [rows, stages, width]."""

    def run(step: Step, chosen: NDArray[np.intp]) -> tuple[Floats, NDArray[np.int8]]:
        trace = traces[step.variant][chosen]
        stages = np.full(len(chosen), len(step.gates) - 1, np.int8)
        # From the back, so that the first gate that takes a row has the last word.
        for stage in reversed(range(len(step.gates) - 1)):
            stages[accepts(trace[:, stage], task, step.gates[stage])] = stage
        return trace[np.arange(len(chosen)), stages], stages

    return _walk(steps, len(next(iter(traces.values()))), task, run)


def judge(
    values: Floats, stages: NDArray[np.int8], step: Step, task: Task, *, last: bool
) -> tuple[NDArray[np.bool_], Floats]:
    """Which answers of a step are taken, bool [rows], and their scores, float32 [rows].

    A row that left at an early gate is taken; at the last gate its score decides; the last step takes all.
    """
    scores = _scores_by_stage(values, stages, step, task)
    if last:
        return np.ones(len(values), np.bool_), scores
    return (stages < len(step.gates) - 1) | passes(scores, step.gates[-1].threshold), scores


def _walk(steps: Sequence[Step], rows: int, task: Task, run: RunStep) -> Answered:
    values = np.full((rows, task.width), np.nan, np.float32)
    taken_by, stages = np.zeros(rows, np.int8), np.zeros(rows, np.int8)
    scores = np.full(rows, np.nan, np.float32)
    left = np.arange(rows)
    for number, step in enumerate(steps):
        if not len(left):
            break
        got, at = run(step, left)
        taken, score = judge(got, at, step, task, last=number == len(steps) - 1)
        done = left[taken]
        values[done], scores[done], stages[done], taken_by[done] = got[taken], score[taken], at[taken], number
        left = left[~taken]
    return Answered(values, taken_by, stages, scores)


def _scores_by_stage(values: Floats, stages: NDArray[np.int8], step: Step, task: Task) -> Floats:
    if len(values) == 1:
        # The router's most frequent case; masks would take longer than the score.
        return scores_at(values, task, step.gates[int(stages[0])])
    scores = np.full(len(values), np.nan, np.float32)
    for stage, gate in enumerate(step.gates):
        here: NDArray[Any] = stages == stage
        if here.any():
            scores[here] = scores_at(values[here], task, gate)
    return scores
