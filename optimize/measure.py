"""Measure a variant on the engine that will serve it: quality against the reference, batch invariance, cost, memory.

The variant runs in a process of its own (`optimize.trial`); what came out is compared here. Quality is the worst
over the batchings that were tried: each row alone, and in mixed batches with their padding.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fettle.answers import EMBEDDING_COSINE_FLOOR, Floats, cosine, disagreements, loss_in_words, normalized
from fettle.errors import PassError
from fettle.manifest import (
    BatchInvariance,
    Hardware,
    Head,
    LatencyTable,
    Measurements,
    Quality,
    Step,
    Task,
    TaskKind,
)
from fettle.rows import Row, Rows
from optimize.labels import Targets
from optimize.point_trial import Contestant, PointRequest, PointResult
from optimize.trial import (
    OUTPUTS_FILE,
    REQUEST_FILE,
    RESULT_FILE,
    ROWS_FILE,
    Part,
    TrialRequest,
    TrialResult,
    save_rows,
)

if TYPE_CHECKING:
    from optimize.load import Reference

ALONE_ROWS = 300
MIXED_BATCH = 32
# A text's ten nearest neighbours are looked for among so many.
NEIGHBOURS, NEIGHBOUR_ROWS = 10, 1000
COST_ROWS = 256
BATCHES = [1, 4, 8, 16, 32]
SHORTEST = 16
LATENCY_SECONDS = 6.0
# Of the largest output value. Float32 kernels differ by 1e-6 or so between batch shapes; bfloat16 by 1e-2.
INVARIANCE_TOLERANCE = 1e-4
SMALLEST_TOLERANCE = 1e-12

Report = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Exam:
    """What every variant is tried on, with the reference's values [rows, width], and labels if there are any.

    Figures are reported on `rows`; what to try next is decided on `tuning_rows`, which may be none.
    """

    task: Task
    rows: list[Row]
    reference: Floats
    tuning_rows: list[Row]
    tuning_reference: Floats
    targets: Targets | None
    threads: int
    hardware: Hardware
    cosine_floor: float = EMBEDDING_COSINE_FLOOR


def reference_values(reference: Reference, rows: list[Row], report: Report) -> Floats:
    """What the reference, in torch and float32, answers: float32 [rows, width]."""
    return torch_values(reference.model, reference, rows, report)


def soft_values(reference: Reference, rows: list[Row], report: Report) -> Floats:
    """The reference's answers in bfloat16 arithmetic, twice as fast: to learn from, not to compare with."""
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        return torch_values(reference.model, reference, rows, report)


def torch_values(model: Callable[..., Any], reference: Reference, rows: list[Row], report: Report) -> Floats:
    """Answers of a torch model with the reference's inputs, in batches of like length: float32 [rows, width]."""
    import torch

    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    values = np.zeros((len(rows), reference.task.width), np.float32)
    for start in range(0, len(order), MIXED_BATCH):
        chosen = order[start : start + MIXED_BATCH]
        arrays = Rows.of([rows[index] for index in chosen]).padded(reference.tokenizer.pad_id)
        inputs = [torch.from_numpy(array) for array in arrays[: 3 if reference.tokenizer.segments else 2]]
        with torch.inference_mode():
            values[chosen] = model(*inputs).float().numpy()
        report((start + len(chosen)) / len(order))
    return values


def measure(directory: Path, exam: Exam, fingerprint: str, report: Report) -> Measurements:
    """Try the variant in `directory`.

    Raises:
        PassError: its process failed or crashed, or its values are not finite.
    """
    started = time.perf_counter()
    rows = [*exam.rows, *exam.tuning_rows]
    batch = min(MIXED_BATCH, len(exam.rows))
    parts = [
        Part(name="alone", first=0, last=min(ALONE_ROWS, len(exam.rows)), batch=1),
        Part(name="mixed", first=0, last=len(exam.rows), batch=batch),
    ]
    if exam.tuning_rows:
        parts.append(Part(name="tuning", first=len(exam.rows), last=len(rows), batch=batch))
    request = TrialRequest(
        variant=directory.resolve(),
        device="cpu",
        threads=exam.threads,
        parts=parts,
        cost_rows=min(COST_ROWS, len(exam.rows)),
        batches=BATCHES,
        lengths=timed_lengths(max(len(row) for row in exam.rows)),
        latency_seconds=LATENCY_SECONDS,
    )
    result, outputs = try_rows(request, rows, report)
    alone, mixed = outputs["alone"][:, -1], outputs["mixed"][:, -1]
    tuned = None
    if exam.tuning_rows:
        wrong = disagreements(outputs["tuning"][:, -1], exam.tuning_reference, exam.task, exam.cosine_floor)
        tuned = float(wrong.mean())
    return Measurements(
        fingerprint=fingerprint,
        hardware=exam.hardware,
        quality=quality(alone, mixed, exam.reference, exam.targets, exam.task, exam.cosine_floor),
        batching=batch_invariance(outputs["alone"], outputs["mixed"], exam.task, request.parts[1].batch),
        tuned_disagreement=tuned,
        latency=LatencyTable(device=request.device, threads=exam.threads, cells=result.cells),
        typical_length=int(np.median([len(row) for row in exam.rows])),
        row_cpu_ms=sum(result.stage_cpu_ms),
        stage_cpu_ms=result.stage_cpu_ms if len(result.stage_cpu_ms) > 1 else [],
        peak_memory_bytes=result.peak_memory_bytes,
        load_seconds=result.load_seconds,
        seconds=time.perf_counter() - started,
    )


def try_rows(request: TrialRequest, rows: list[Row], report: Report) -> tuple[TrialResult, dict[str, Floats]]:
    """Run a trial in a process of its own; the outputs of each part are float32 [rows, stages, width].

    Raises:
        PassError: the process failed or crashed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / REQUEST_FILE).write_text(request.model_dump_json())
        save_rows(folder / ROWS_FILE, rows)
        run_child("optimize.trial", folder, report)
        result = TrialResult.model_validate_json((folder / RESULT_FILE).read_bytes())
        with np.load(folder / OUTPUTS_FILE) as outputs:
            return result, {part.name: outputs[part.name] for part in request.parts}


def try_points(
    points: Mapping[str, Sequence[Step]],
    paths: Mapping[str, Path],
    rows: list[Row],
    task: Task,
    threads: int,
    report: Report,
) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
    """Answer the rows through each point, by name, in one process; `paths` are the variants' directories.

    Returns the processor milliseconds of an average row by point, and what `optimize.point_trial` writes.

    Raises:
        PassError: the process failed or crashed.
    """
    used = sorted({step.variant for steps in points.values() for step in steps})
    request = PointRequest(
        variants={name: paths[name].resolve() for name in used},
        contestants=[Contestant(name=name, steps=list(steps)) for name, steps in points.items()],
        task=task,
        device="cpu",
        threads=threads,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / REQUEST_FILE).write_text(request.model_dump_json())
        save_rows(folder / ROWS_FILE, rows)
        run_child("optimize.point_trial", folder, report)
        result = PointResult.model_validate_json((folder / RESULT_FILE).read_bytes())
        with np.load(folder / OUTPUTS_FILE) as outputs:
            return result.cpu_ms, dict(outputs)


def timed_lengths(longest: int) -> list[int]:
    """16, 32, 64 and so on below the longest row, and that row's own length."""
    lengths = [SHORTEST]
    while lengths[-1] * 2 < longest:
        lengths.append(lengths[-1] * 2)
    return sorted({min(length, longest) for length in lengths} | {longest})


def quality(
    alone: Floats,
    mixed: Floats,
    reference: Floats,
    targets: Targets | None,
    task: Task,
    cosine_floor: float = EMBEDDING_COSINE_FLOOR,
) -> Quality:
    """Compare values [rows, width] with the reference's; `alone` may cover only the first rows.

    Raises:
        PassError: a value is not finite.
    """
    broken = int((~np.isfinite(mixed).all(axis=1)).sum()) + int((~np.isfinite(alone).all(axis=1)).sum())
    if broken:
        raise PassError(f"{broken} of {len(mixed) + len(alone)} answers are not finite numbers")
    tried = [(alone, reference[: len(alone)]), (mixed, reference)]
    name, score = task_metric(mixed, targets, task)
    return Quality(
        rows=len(mixed),
        disagreement=max(float(disagreements(values, truth, task, cosine_floor).mean()) for values, truth in tried),
        loss=loss_in_words(task, cosine_floor),
        max_difference=max(float(np.abs(values - truth).max()) for values, truth in tried),
        mean_cosine=float(cosine(mixed, reference).mean()) if task.kind is TaskKind.EMBED else None,
        top10_overlap=neighbour_overlap(mixed, reference) if task.kind is TaskKind.EMBED else None,
        metric_name=name,
        metric=score,
        reference_metric=task_metric(reference, targets, task)[1],
    )


def batch_invariance(alone: Floats, mixed: Floats, task: Task, batch: int) -> BatchInvariance:
    """Compare the same rows' values [rows, stages, width] (or [rows, width]) alone and in mixed batches.

    The last stage's answers count as changed; that the values move is looked for at every stage.
    """
    same = mixed[: len(alone)]
    difference = float(np.abs(alone - same).max())
    tolerance = max(INVARIANCE_TOLERANCE * float(np.abs(mixed).max()), SMALLEST_TOLERANCE)
    last, last_same = (values if values.ndim == 2 else values[:, -1] for values in (alone, same))
    return BatchInvariance(
        rows=len(alone),
        batch=batch,
        changed=float(disagreements(last, last_same, task).mean()),
        max_difference=difference,
        tolerance=tolerance,
        invariant=difference <= tolerance,
    )


def neighbour_overlap(values: Floats, reference: Floats) -> float | None:
    """Mean share of a text's ten nearest neighbours (by cosine, among the first rows) that the variant keeps."""
    rows = min(len(values), NEIGHBOUR_ROWS)
    if rows <= NEIGHBOURS:
        return None
    mine, theirs = (_nearest(normalized(vectors[:rows])) for vectors in (values, reference))
    shared = [len(np.intersect1d(left, right)) for left, right in zip(mine, theirs, strict=True)]
    return float(np.mean(shared)) / NEIGHBOURS


def _nearest(vectors: Floats) -> NDArray[np.intp]:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]


def task_metric(values: Floats, targets: Targets | None, task: Task) -> tuple[str | None, float | None]:
    """The task's own figure on the labelled rows: accuracy, micro-F1 or Spearman's correlation; None without any."""
    if targets is None or task.kind is TaskKind.EMBED or not targets.known.any():
        return None, None
    answers, truth = values[targets.known], targets.values
    match task.head:
        case Head.MULTI_LABEL:
            return "micro-F1", _micro_f1(answers > 0, truth)
        case Head.REGRESSION:
            return _spearman(answers[:, 0], truth)
        case _:
            return "accuracy", float((answers.argmax(axis=1) == truth).mean())


def _micro_f1(answers: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    right = int((answers & truth).sum())
    wrong = int((answers ^ truth).sum())
    return 2 * right / (2 * right + wrong) if right + wrong else 1.0


def _spearman(answers: Floats, truth: NDArray[Any]) -> tuple[str | None, float | None]:
    from scipy.stats import spearmanr

    # Undefined where either side is constant.
    if len(truth) < 2 or np.ptp(answers) == 0 or np.ptp(truth) == 0:
        return None, None
    return "Spearman", float(spearmanr(answers, truth).statistic)


def run_child(module: str, folder: Path, report: Report) -> None:
    """Run `python -m module folder`, which says on its standard output how far it is.

    Raises:
        PassError: it failed or crashed.
    """
    errors = folder / "errors.txt"
    with errors.open("wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
        try:
            for line in child.stdout or ():
                # A runtime may print what it likes between our numbers.
                with contextlib.suppress(ValueError):
                    report(float(line))
            status = child.wait()
        finally:
            child.kill()
            child.wait()
    if status != 0:
        raise PassError(_why(status, errors.read_text(errors="replace")))


def _why(status: int, errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it said nothing"
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name} ({last})"
    return f"its process ended with status {status} ({last})"
