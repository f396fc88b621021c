"""`fettle optimize` of a tiny language model on tiny data, with its trials in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fettle.config import DataFiles, OptimizeConfig
from fettle.family import Family
from optimize import hardware, measure, pipeline, text_measure
from optimize.progress import Progress
from optimize.text_trial import run_text_trial
from tests.fakes import HARDWARE

ROWS = {"train": 24, "validation": 30, "calibration": 40, "test": 20}
# Of a random model's texts nothing but the first letter is likely to survive a quantization.
ANSWER = "pattern=^(?s:.)"


def settle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(measure, "run_child", _run_here)
    patch.setattr(hardware, "describe", lambda: HARDWARE)
    patch.setattr(text_measure, "LATENCY_SECONDS", 0.05)


def _run_here(module: str, folder: Path, report: Callable[[float], None]) -> None:
    assert module == "optimize.text_trial"
    run_text_trial(folder, report)


def write_data(directory: Path, rows: dict[str, int] | None = None) -> DataFiles:
    directory.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    paths = {}
    for split, count in (rows or ROWS).items():
        texts = ["".join(chance.choice(list("abcdefgh "), 9)) + split[0] + str(row) for row in range(count)]
        lines = [json.dumps({"text": text, "label": text[0].strip() or "x"}) for text in texts]
        paths[split] = directory / f"{split}.jsonl"
        paths[split].write_text("\n".join(lines))
    return DataFiles(**paths)


def config_for(model: Path, directory: Path, **changes: Any) -> OptimizeConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "out": directory / "family",
        "files": write_data(directory / "data"),
        "prompt": "Say {text}",
        "answer": ANSWER,
        "max_tokens": 6,
        "levels": [0.1, 0.6],
    }
    return OptimizeConfig(**{**values, **changes})


def run(config: OptimizeConfig, progress: Progress | None = None) -> Family:
    return pipeline.run(config, progress or Progress(Console(quiet=True)))
