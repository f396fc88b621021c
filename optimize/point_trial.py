"""The child process that answers `test` through operating points, and through the fp32 ONNX reference, in one run.

`python -m optimize.point_trial FOLDER`, with the files of `optimize.trial`. The rows are cut into a few chunks, and
each chunk goes through every contestant in turn, so that what else the machine does disturbs all of them alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fettle.answers import Floats
from fettle.manifest import Identifier, Step, Strict, Task
from fettle.points import Answered, answer
from optimize.trial import OUTPUTS_FILE, REQUEST_FILE, RESULT_FILE, ROWS_FILE, load_rows
from workers.engine import Device, EngineOptions, open_engine

CHUNKS = 6
WARM_UP_ROWS = 64


class Contestant(Strict):
    name: Identifier
    steps: list[Step]


class PointRequest(Strict):
    """`variants` by id; every step of every contestant names one of them."""

    variants: dict[Identifier, Path]
    contestants: list[Contestant]
    task: Task
    device: Device
    threads: int


class PointResult(Strict):
    """Processor milliseconds for an average row, by contestant."""

    cpu_ms: dict[str, float]


Report = Callable[[float], None]


def run_point_trial(folder: Path, report: Report) -> None:
    """Writes for each contestant `<name>.values` float32 [rows, width], `.steps` and `.stages` int8 [rows], and
    `.scores` float32 [rows].
    """
    request = PointRequest.model_validate_json((folder / REQUEST_FILE).read_bytes())
    rows = load_rows(folder / ROWS_FILE)
    options = EngineOptions(device=request.device, threads=request.threads, verify=False)
    engines = {name: open_engine(path, options) for name, path in request.variants.items()}
    for contestant in request.contestants:
        answer(rows[:WARM_UP_ROWS], contestant.steps, engines, request.task)
    parts: dict[str, list[Answered]] = {contestant.name: [] for contestant in request.contestants}
    seconds = dict.fromkeys(parts, 0.0)
    chunks = np.array_split(np.arange(len(rows)), min(CHUNKS, len(rows)))
    for number, chunk in enumerate(chunks):
        for contestant in request.contestants:
            started = time.process_time()
            found = answer([rows[index] for index in chunk], contestant.steps, engines, request.task)
            seconds[contestant.name] += time.process_time() - started
            parts[contestant.name].append(found)
        report((number + 1) / len(chunks))
    np.savez(folder / OUTPUTS_FILE, **_joined(parts))  # type: ignore[arg-type]
    result = PointResult(cpu_ms={name: 1000 * spent / len(rows) for name, spent in seconds.items()})
    (folder / RESULT_FILE).write_text(result.model_dump_json())
    for engine in engines.values():
        engine.close()


def _joined(parts: dict[str, list[Answered]]) -> dict[str, NDArray[np.int8] | Floats]:
    arrays: dict[str, NDArray[np.int8] | Floats] = {}
    for name, found in parts.items():
        arrays[f"{name}.values"] = np.concatenate([part.values for part in found])
        arrays[f"{name}.steps"] = np.concatenate([part.steps for part in found])
        arrays[f"{name}.stages"] = np.concatenate([part.stages for part in found])
        arrays[f"{name}.scores"] = np.concatenate([part.scores for part in found])
    return arrays


def _say(done: float) -> None:
    print(f"{done:.3f}", flush=True)


if __name__ == "__main__":
    run_point_trial(Path(sys.argv[1]), _say)
