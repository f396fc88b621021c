"""A long training written down from time to time, so that one that is killed goes on: tensors and a few figures.

Safetensors and JSON, never pickle; written whole or not at all. What the state means is the training's own business.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fettle.store import new_directory

TENSORS, FIGURES = "state.safetensors", "state.json"
# A state is written after this time at the earliest, and takes at most this share of the whole.
SECONDS_BETWEEN: Final = 20.0
MOST_SHARE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Written:
    tensors: dict[str, Tensor]
    figures: dict[str, Any]


class Notebook:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._next = time.monotonic() + SECONDS_BETWEEN

    @property
    def due(self) -> bool:
        return time.monotonic() >= self._next

    def write(self, state: Written) -> None:
        started = time.monotonic()
        # Tensors that share memory, such as best and present weights, are written as they are, each by itself.
        content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.tensors.items()})
        with new_directory(self._directory) as new:
            (new / TENSORS).write_bytes(content)
            (new / FIGURES).write_text(json.dumps(state.figures))
        took = time.monotonic() - started
        self._next = time.monotonic() + max(SECONDS_BETWEEN, took / MOST_SHARE)

    def read(self) -> Written | None:
        """None where nothing, or nothing whole, is written down."""
        try:
            figures = json.loads((self._directory / FIGURES).read_text())
            return Written(load((self._directory / TENSORS).read_bytes()), figures)
        except (FileNotFoundError, ValueError, SafetensorError):
            return None
