"""The real pipeline over a fake model and fake recipes, for tests of everything around the passes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import JsonValue
from rich.console import Console

from fettle.answers import Floats
from fettle.config import DataFiles, OptimizeConfig
from fettle.family import Family
from fettle.manifest import Analysis, Precision, Runtime, Source, Task, TaskKind, TokenizerSpec
from fettle.rows import Row
from fettle.store import sha256_bytes
from optimize import hardware, measure, pipeline, recipes, search, train, trial
from optimize.point_trial import run_point_trial
from optimize.progress import Progress
from optimize.recipes import Bench, Pass, Recipe
from optimize.trial import run_trial
from tests import fakes
from workers.engine import Engine
from workers.fake import expected


@dataclass
class FakeReference:
    task: Task = field(default_factory=fakes.classify_task)
    tokenizer: TokenizerSpec = field(default_factory=fakes.tokenizer_spec)
    tokenizer_json: bytes = field(default_factory=fakes.tokenizer_json)
    source: Source = field(
        default_factory=lambda: Source(name="fake", architecture="Fake", sha256=sha256_bytes(b"fake"))
    )
    notes: dict[str, JsonValue] = field(default_factory=dict)
    decoder: None = None
    layers: int = 2
    shares_layers: bool = False


def fake_pass(text: str = "weights", **parameters: Any) -> Pass:
    def write(bench: Bench) -> dict[str, JsonValue]:
        (bench.directory / "weights.bin").write_bytes(text.encode() * 1000)
        return {"bytes": len(text) * 1000}

    return Pass("fake", write, parameters)


def failing_pass(error: Exception) -> Pass:
    def fail(bench: Bench) -> dict[str, JsonValue]:
        (bench.directory / "half.bin").write_bytes(b"half")
        raise error

    return Pass("fails", fail)


def fake_recipe(name: str, *passes: Pass, parent: str | None = recipes.REFERENCE) -> Recipe:
    return Recipe(name, Runtime.FAKE, Precision.FP32, passes or (fake_pass(name),), parent=parent)


REFERENCE = fake_recipe(recipes.REFERENCE, parent=None)
# With this one among the recipes, points are certified and tried.
ONNX_REFERENCE = fake_recipe(recipes.ONNX_REFERENCE)


def install(patch: pytest.MonkeyPatch, plan: Sequence[Recipe], *, in_process: bool = True) -> None:
    """Make `optimize.pipeline.run` use this plan.

    `in_process`: variants are tried here, not in processes, and cost what their parameters say, so that which one is
    dominated does not depend on the machine.
    """
    patch.setattr(pipeline, "task_kind", lambda source, task=None: TaskKind.CLASSIFY)
    patch.setattr(pipeline, "load_reference", lambda source, task=None: FakeReference())
    patch.setattr(search, "agenda", lambda state: iter(plan))
    patch.setattr(train, "analyse", lambda work: Analysis(layer_influence=[0.2, 0.1]))
    patch.setattr(recipes, "unavailable", list)
    patch.setattr(hardware, "describe", lambda: fakes.HARDWARE)
    patch.setattr(hardware, "busy_share", lambda: 0.0)
    patch.setattr(measure, "reference_values", _reference_values)
    patch.setattr(measure, "LATENCY_SECONDS", 0.05)
    if in_process:
        patch.setattr(measure, "run_child", _run_here)
        patch.setattr(trial, "_stage_cpu_ms", _told_cpu_ms)


def write_data(path: Path, rows: int = 400, *, start: int = 0) -> Path:
    words = fakes.WORDS[6:]
    lines = [
        {"text": f"the {words[n % 250]} {words[(n * 7 + n // 250) % 250]}", "label": ("red", "green")[n % 2]}
        for n in range(start, start + rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_for(directory: Path, **changes: Any) -> OptimizeConfig:
    data = directory / "data.jsonl"
    if not data.exists():
        write_data(data)
    values: dict[str, Any] = {"model": "fake", "out": directory / "family", "files": DataFiles(data=data)}
    return OptimizeConfig(**{**values, **changes})


def run(config: OptimizeConfig, say: Callable[[str], Any] = lambda text: None) -> Family:
    """Run the pipeline; what the user would have seen is handed to `say`."""
    console = Console(record=True, width=200, quiet=False, file=_Nowhere())
    try:
        return pipeline.run(config, Progress(console))
    finally:
        say(console.export_text())


def _run_here(module: str, folder: Path, report: Callable[[float], None]) -> None:
    {"optimize.trial": run_trial, "optimize.point_trial": run_point_trial}[module](folder, report)


def _told_cpu_ms(engine: Engine, rows: list[Row]) -> list[float]:
    """One millisecond a row, and what the fake engine was told to take for a call."""
    (step,) = engine.manifest.recipe
    told = step.parameters.get("ms_per_call", 0.0)
    assert isinstance(told, int | float)
    return [1.0 + told]


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _reference_values(reference: FakeReference, rows: list[Row], report: Callable[[float], None]) -> Floats:
    report(1.0)
    return np.stack([expected(row.ids, reference.task.width) for row in rows])
