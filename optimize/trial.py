"""The child process that runs one variant over rows and says what came out: outputs, costs, latencies, memory.

`python -m optimize.trial FOLDER` reads `request.json` and `rows.npz` there and writes `outputs.npz` and
`result.json`; on standard output it says how far it is, one number from 0 to 1 a line. It imports no torch unless
the variant's engine does, so that the memory it reports is the variant's alone; and it compares nothing, so that a
crash of a runtime loses nothing but this trial.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fettle.answers import Floats
from fettle.manifest import Identifier, LatencyCell, Strict
from fettle.rows import Exits, Row, Rows
from workers.engine import Device, Engine, EngineOptions, open_engine

if TYPE_CHECKING:
    from workers.staged_encoder import StagedEncoder

REQUEST_FILE, ROWS_FILE, OUTPUTS_FILE, RESULT_FILE = "request.json", "rows.npz", "outputs.npz", "result.json"
MINIMUM_CALLS, MAXIMUM_CALLS = 3, 30
# Rows in one call where cost is measured: enough for the engine to cut its own best batches from.
BULK_ROWS = 64
# How far each part brings the progress; only for the eye.
LOADED, ANSWERED = 0.05, 0.65


class Part(Strict):
    """Rows `first` to `last` (exclusive), answered in calls of `batch` rows; by length if `sort`, else as they come."""

    name: Identifier
    first: int = Field(ge=0)
    last: int = Field(ge=1)
    batch: int = Field(ge=1)
    sort: bool = False


class TrialRequest(Strict):
    """What to run. The processor time of a row comes from the first `cost_rows` rows; latencies from every pair of
    `batches` and `lengths` that fits into `latency_seconds`."""

    variant: Path
    device: Device
    threads: int
    parts: list[Part]
    cost_rows: int = 0
    batches: list[int] = []
    lengths: list[int] = []
    latency_seconds: float = 0.0


class TrialResult(Strict):
    """`stage_cpu_ms`: processor milliseconds that each stage adds for an average row; empty if nothing was timed."""

    load_seconds: float
    cells: list[LatencyCell]
    stage_cpu_ms: list[float]
    peak_memory_bytes: int


Report = Callable[[float], None]


def run_trial(folder: Path, report: Report) -> None:
    """Outputs are float32 [rows, stages, width] for each part."""
    request = TrialRequest.model_validate_json((folder / REQUEST_FILE).read_bytes())
    rows = load_rows(folder / ROWS_FILE)
    started = time.perf_counter()
    # Hashes were checked when the variant was written or taken over.
    engine = open_engine(request.variant, EngineOptions(device=request.device, threads=request.threads, verify=False))
    engine.warm_up()
    load_seconds = time.perf_counter() - started
    report(LOADED)
    outputs = _all_answers(engine, rows, request.parts, _part(report, LOADED, ANSWERED))
    costs = _stage_cpu_ms(engine, rows[: request.cost_rows]) if request.cost_rows else []
    cells = _latencies(engine, rows, request, _part(report, ANSWERED, 1.0)) if request.latency_seconds else []
    np.savez(folder / OUTPUTS_FILE, **outputs)  # type: ignore[arg-type]
    result = TrialResult(
        load_seconds=load_seconds, cells=cells, stage_cpu_ms=costs, peak_memory_bytes=peak_memory_bytes()
    )
    (folder / RESULT_FILE).write_text(result.model_dump_json())
    engine.close()


def save_rows(path: Path, rows: list[Row]) -> None:
    flat = Rows.of(rows)
    types = np.zeros(0, np.int8) if flat.type_ids is None else flat.type_ids
    np.savez(path, ids=flat.ids, lengths=flat.lengths, type_ids=types)


def load_rows(path: Path) -> list[Row]:
    with np.load(path) as arrays:
        ends = np.cumsum(arrays["lengths"])[:-1]
        ids = np.split(arrays["ids"], ends)
        types = np.split(arrays["type_ids"], ends) if arrays["type_ids"].size else [None] * len(ids)
    return [Row(row, segment) for row, segment in zip(ids, types, strict=True)]


def peak_memory_bytes() -> int:
    """The most memory that this process has held.

    From the kernel's high-water mark of this program: `ru_maxrss` survives exec, so in a child it starts at what
    the parent held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    # Bytes on macOS, which is where there is no /proc.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _all_answers(engine: Engine, rows: list[Row], parts: list[Part], report: Report) -> dict[str, Floats]:
    outputs: dict[str, Floats] = {}
    total = sum(part.last - part.first for part in parts)
    done = 0
    for part in parts:
        chosen = rows[part.first : part.last]
        before = done / total
        done += len(chosen)
        outputs[part.name] = _answers(engine, chosen, part, _part(report, before, done / total))
    return outputs


def _answers(engine: Engine, rows: list[Row], part: Part, report: Report) -> Floats:
    order = sorted(range(len(rows)), key=lambda index: len(rows[index])) if part.sort else list(range(len(rows)))
    values: Floats | None = None
    for start in range(0, len(order), part.batch):
        chosen = order[start : start + part.batch]
        found = _every_stage(engine, Rows.of([rows[index] for index in chosen]))
        if values is None:
            values = np.empty((len(rows), *found.shape[1:]), np.float32)
        values[chosen] = found
        report(min(1.0, (start + part.batch) / len(rows)))
    return np.zeros((0, 1, engine.manifest.task.width), np.float32) if values is None else values


def _every_stage(engine: Engine, rows: Rows) -> Floats:
    """float32 [rows, stages, width]."""
    if engine.manifest.stages:
        return staged(engine).by_stage(rows)
    return engine.run(rows).values[:, None, :]


def staged(engine: Engine) -> StagedEncoder:
    from workers.staged_encoder import StagedEncoder

    assert isinstance(engine, StagedEncoder)
    return engine


def _stage_cpu_ms(engine: Engine, rows: list[Row]) -> list[float]:
    """Processor milliseconds that each stage adds for an average row, in batches of similar length."""
    ordered = sorted(rows, key=len)
    batches = [Rows.of(ordered[start : start + BULK_ROWS]) for start in range(0, len(ordered), BULK_ROWS)]
    totals = []
    for stage in range(engine.manifest.exits + 1):
        exits = [_leaving_at(stage, engine.manifest.exits, len(batch)) for batch in batches]
        # The better of two, since others may have been at work in one of them.
        totals.append(min(_cpu_ms(engine, batches, exits) for _ in range(2)) / len(rows))
    # A stage that is nearly free may seem to cost less than nothing.
    return [max(float(added), 1e-6) for added in np.diff(totals, prepend=0.0)]


def _leaving_at(stage: int, exits: int, rows: int) -> Exits:
    thresholds = np.where(np.arange(exits) == stage, np.float32(0), np.float32(2))
    return Exits(np.repeat(thresholds[None, :], rows, axis=0).astype(np.float32), np.ones((rows, exits), np.float32))


def _cpu_ms(engine: Engine, batches: list[Rows], exits: list[Exits]) -> float:
    started = time.process_time()
    for batch, leaving in zip(batches, exits, strict=True):
        engine.run(batch, leaving)
    return (time.process_time() - started) * 1000


def _latencies(engine: Engine, rows: list[Row], request: TrialRequest, report: Report) -> list[LatencyCell]:
    """Small cells first. From the cell on that cannot be timed within what is left of the budget, all are left out."""
    tokens = np.concatenate([row.ids for row in rows])
    shapes = sorted(
        ((batch, length) for batch in request.batches for length in request.lengths), key=lambda shape: np.prod(shape)
    )
    work = [batch * length for batch, length in shapes]
    deadline = time.perf_counter() + request.latency_seconds
    cells: list[LatencyCell] = []
    for index, (batch, length) in enumerate(shapes):
        left = deadline - time.perf_counter()
        if cells and _predicted_seconds(cells[-1], work[index]) * (MINIMUM_CALLS + 1) > left:
            break
        cells.append(_timed(engine, _filled(tokens, batch, length), left * work[index] / sum(work[index:])))
        report((index + 1) / len(shapes))
    return cells


def _predicted_seconds(cell: LatencyCell, tokens: int) -> float:
    return cell.median_ms / 1000 * tokens / (cell.batch * cell.length)


def _timed(engine: Engine, rows: Rows, seconds: float) -> LatencyCell:
    """One call to warm up, then as many as fit into `seconds`, within bounds."""
    first = _call_ms(engine, rows)
    calls = int(np.clip(seconds * 1000 / first, MINIMUM_CALLS, MAXIMUM_CALLS))
    times = [_call_ms(engine, rows) for _ in range(calls)]
    median, p95 = np.percentile(times, (50, 95))
    return LatencyCell(batch=len(rows), length=rows.longest, median_ms=float(median), p95_ms=float(p95))


def _call_ms(engine: Engine, rows: Rows) -> float:
    started = time.perf_counter()
    engine.run(rows)
    return (time.perf_counter() - started) * 1000


def _filled(tokens: NDArray[np.int32], batch: int, length: int) -> Rows:
    """A full batch made of the sample's own tokens, over and over."""
    return Rows(np.resize(tokens, batch * length), np.full(batch, length, np.int32))


def _part(report: Report, start: float, end: float) -> Report:
    return lambda done: report(start + (end - start) * done)


def _say(done: float) -> None:
    # A closed pipe means that the parent is gone: the error then ends this process as well.
    print(f"{done:.3f}", flush=True)


if __name__ == "__main__":
    run_trial(Path(sys.argv[1]), _say)
