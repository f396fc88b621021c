"""Run one variant in a process of its own, for `optimize.measure`: outputs, latencies, memory.

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

import numpy as np
from numpy.typing import NDArray

from fettle.answers import Floats
from fettle.manifest import LatencyCell, Strict
from fettle.rows import Row, Rows
from workers.engine import Device, Engine, EngineOptions, open_engine

REQUEST_FILE, ROWS_FILE, OUTPUTS_FILE, RESULT_FILE = "request.json", "rows.npz", "outputs.npz", "result.json"
MINIMUM_CALLS, MAXIMUM_CALLS = 3, 30
# How far each part brings the progress; only for the eye.
LOADED, ANSWERED_ALONE, ANSWERED_MIXED = 0.05, 0.25, 0.55


class TrialRequest(Strict):
    """`alone`: how many of the rows also run one by one. `batch`: rows of a mixed batch. Latencies for every pair of
    `batches` and `lengths` that fits into `latency_seconds`."""

    variant: Path
    device: Device
    threads: int
    alone: int
    batch: int
    batches: list[int]
    lengths: list[int]
    latency_seconds: float


class TrialResult(Strict):
    load_seconds: float
    cells: list[LatencyCell]
    peak_memory_bytes: int


Report = Callable[[float], None]


def run_trial(folder: Path, report: Report) -> None:
    request = TrialRequest.model_validate_json((folder / REQUEST_FILE).read_bytes())
    rows = load_rows(folder / ROWS_FILE)
    started = time.perf_counter()
    # Hashes were checked when the variant was written or taken over.
    engine = open_engine(request.variant, EngineOptions(device=request.device, threads=request.threads, verify=False))
    engine.warm_up()
    load_seconds = time.perf_counter() - started
    report(LOADED)
    alone = _answers(engine, rows[: request.alone], 1, _part(report, LOADED, ANSWERED_ALONE))
    mixed = _answers(engine, rows, request.batch, _part(report, ANSWERED_ALONE, ANSWERED_MIXED))
    cells = _latencies(engine, rows, request, _part(report, ANSWERED_MIXED, 1.0))
    np.savez(folder / OUTPUTS_FILE, alone=alone, mixed=mixed)
    result = TrialResult(load_seconds=load_seconds, cells=cells, peak_memory_bytes=peak_memory_bytes())
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


def _answers(engine: Engine, rows: list[Row], batch: int, report: Report) -> Floats:
    values = []
    for start in range(0, len(rows), batch):
        values.append(engine.run(Rows.of(rows[start : start + batch])).values)
        report(min(1.0, (start + batch) / len(rows)))
    return np.concatenate(values)


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
