"""The thin contract under all backends: load, warm up, run, close.

An engine owns one loaded variant in one process. It holds no queue and knows no HTTP, no Ray, no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from fettle.errors import UsageError
from fettle.family import MANIFEST_FILE, check_files, parse_manifest
from fettle.manifest import Runtime, VariantManifest
from fettle.rows import Exits, Outputs, Rows
from workers.decoder import Runner

WARM_UP_SHAPES = ((1, 16), (8, 32))

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Where and how wide to run. `threads` is the intra-op pool on CPU."""

    device: Device = "cpu"
    threads: int = 1
    verify: bool = True


class Engine(Protocol):
    manifest: VariantManifest

    def warm_up(self) -> None:
        """Run typical shapes once, so that the first request does not pay for allocation and compilation."""

    def run(self, rows: Rows, exits: Exits | None = None) -> Outputs:
        """Answer a batch. Not thread-safe: one call at a time.

        A row of a staged variant leaves at the first stage whose score reaches its threshold; without `exits`, and
        where there is one stage only, every row goes to the end.

        Raises:
            EngineError: the runtime failed on this batch.
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""


def warm_up_rows(max_length: int) -> Iterator[Rows]:
    """Batches of typical shapes, of a token that every vocabulary has."""
    for rows, length in WARM_UP_SHAPES:
        length = min(length, max_length)
        yield Rows(np.zeros(rows * length, np.int32), np.full(rows, length, np.int32))


def open_engine(directory: Path, options: EngineOptions | None = None) -> Engine:
    """Verify a variant's files and load it with the runtime that its manifest names.

    Raises:
        IntegrityError: a file is missing or was changed.
        UsageError: the device is not there.
    """
    options = options or EngineOptions()
    manifest = _verified(directory, options)
    match manifest.runtime:
        case Runtime.ONNX:
            if manifest.stages:
                from workers.staged_encoder import StagedEncoder

                return StagedEncoder(directory, manifest, options)
            from workers.onnx_encoder import OnnxEncoder

            return OnnxEncoder(directory, manifest, options)
        case Runtime.TORCH:
            from workers.torch_encoder import TorchEncoder

            return TorchEncoder(directory, manifest, options)
        case Runtime.FAKE:
            from workers.fake import FakeEngine

            return FakeEngine(manifest)
    raise UsageError(f"no engine for runtime {manifest.runtime!r}")


def open_runner(directory: Path, options: EngineOptions | None = None) -> Runner:
    """The same for a variant that generates text.

    Raises:
        IntegrityError: a file is missing or was changed.
        FamilyError: the variant generates no text.
        UsageError: the device is not there, or the runtime has no runner.
    """
    options = options or EngineOptions()
    manifest = _verified(directory, options)
    match manifest.runtime:
        case Runtime.ONNX:
            from workers.onnx_decoder import OnnxDecoder

            return OnnxDecoder(directory, manifest, options)
        case Runtime.TORCH:
            from workers.torch_decoder import TorchDecoder

            return TorchDecoder(directory, manifest, options)
        case Runtime.FAKE:
            from workers.fake_decoder import FakeRunner

            return FakeRunner(manifest)
    raise UsageError(f"no runner for runtime {manifest.runtime!r}")


def _verified(directory: Path, options: EngineOptions) -> VariantManifest:
    manifest = parse_manifest(directory / MANIFEST_FILE, VariantManifest)
    if options.verify:
        for problem in check_files(directory, manifest.files):
            raise problem
    return manifest
