"""The ONNX Runtime engine: `model.onnx` on the CPU or CUDA provider. Imports no torch, so a worker starts fast."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fettle.errors import EngineError, FamilyError, UsageError
from fettle.manifest import VariantManifest
from fettle.rows import Outputs, Rows
from workers.engine import EngineOptions

MODEL_FILE = "model.onnx"
WARM_UP_SHAPES = ((1, 16), (8, 32))


class OnnxEncoder:
    """One variant in ONNX Runtime. `run` pads a batch to its longest row."""

    def __init__(self, directory: Path, manifest: VariantManifest, options: EngineOptions) -> None:
        """Load the graph.

        Raises:
            UsageError: CUDA was asked for and is not there.
            FamilyError: ONNX Runtime cannot load the graph.
        """
        self.manifest = manifest
        try:
            self._session: ort.InferenceSession | None = ort.InferenceSession(
                str(directory / MODEL_FILE), session_options(options.threads), providers=_providers(options)
            )
        except _ORT_ERRORS as error:
            raise FamilyError(
                f"{directory / MODEL_FILE}: ONNX Runtime {ort.__version__} cannot load it ({_first_line(error)}); "
                "run `fettle optimize` again"
            ) from error
        if options.device == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise UsageError(_NO_CUDA)
        self._typed = any(item.name == "token_type_ids" for item in self._session.get_inputs())

    def warm_up(self) -> None:
        limit = self.manifest.tokenizer.max_length
        for rows, length in WARM_UP_SHAPES:
            length = min(length, limit)
            self.run(Rows(np.zeros(rows * length, np.int32), np.full(rows, length, np.int32)))

    def run(self, rows: Rows) -> Outputs:
        """float32 [rows, width].

        Raises:
            EngineError: ONNX Runtime failed on this batch.
        """
        if self._session is None:
            raise EngineError("the engine is closed")
        started = time.perf_counter()
        ids, mask, types = rows.padded(self.manifest.tokenizer.pad_id)
        feed: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._typed:
            feed["token_type_ids"] = types
        try:
            (values,) = self._session.run(["values"], feed)
        except _ORT_ERRORS as error:
            raise EngineError(
                f"ONNX Runtime failed on a batch of {len(rows)} rows of up to {rows.longest} tokens"
            ) from error
        return Outputs(np.asarray(values, np.float32), (time.perf_counter() - started) * 1e3)

    def close(self) -> None:
        self._session = None


def session_options(threads: int) -> ort.SessionOptions:
    """Options of one worker that shares its cores: one graph at a time, `threads` wide, idle threads asleep."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


_ORT_ERRORS = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ort.capi.onnxruntime_pybind11_state.NoSuchFile,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
    RuntimeError,
    ValueError,
)
_NO_CUDA = "no CUDA device is usable by ONNX Runtime; check the driver and CUDA libraries, or set device to cpu"


def _providers(options: EngineOptions) -> list[str]:
    if options.device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise UsageError(_NO_CUDA)
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
