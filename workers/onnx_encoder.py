"""The ONNX Runtime engine: `model.onnx` on the CPU or CUDA provider. Imports no torch, so a worker starts fast.

On CPU a batch runs as a few small calls, its rows sorted by length: a core is saturated by a few hundred tokens,
beyond which activations only fall out of its cache, and unequal rows cost little padding; of a packed graph only
attention has any.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fettle.errors import EngineError, FamilyError, UsageError, first_line
from fettle.manifest import VariantManifest
from fettle.rows import CALL_TOKENS, Exits, Outputs, Rows, engine_calls
from workers.engine import EngineOptions, warm_up_rows

MODEL_FILE = "model.onnx"
# ONNX Runtime fuses these at load. Its fused CPU kernels are the slower ones: SkipLayerNormalization takes seven
# times as long as Add and LayerNormalization (benchmarks/LOG.md, "fusions that cost").
SLOWER_ON_CPU = ["SkipLayerNormFusion", "BiasGeluFusion"]


class OnnxEncoder:
    """One variant in ONNX Runtime. `run` pads to the longest row of each call, nothing more."""

    def __init__(self, directory: Path, manifest: VariantManifest, options: EngineOptions) -> None:
        """Load the graph.

        Raises:
            UsageError: CUDA was asked for and is not there.
            FamilyError: ONNX Runtime cannot load the graph.
        """
        self.manifest = manifest
        self._call_tokens = call_tokens(options)
        self._session: ort.InferenceSession | None = open_session(directory / MODEL_FILE, options)
        self._typed = any(item.name == "token_type_ids" for item in self._session.get_inputs())

    def warm_up(self) -> None:
        for rows in warm_up_rows(self.manifest.tokenizer.max_length):
            self.run(rows)

    def run(self, rows: Rows, exits: Exits | None = None) -> Outputs:
        """float32 [rows, width].

        Raises:
            EngineError: ONNX Runtime failed on this batch.
        """
        del exits  # one stage only, so there is nothing to leave by
        if self._session is None:
            raise EngineError("the engine is closed")
        started = time.perf_counter()
        values = np.empty((len(rows), self.manifest.task.width), np.float32)
        for chosen, part in in_calls(rows, self._call_tokens, self.manifest):
            values[chosen] = self._call(self._session, part)
        return Outputs(values, (time.perf_counter() - started) * 1e3)

    def close(self) -> None:
        self._session = None

    def _call(self, session: ort.InferenceSession, rows: Rows) -> NDArray[np.float32]:
        ids, mask, types = rows.padded(self.manifest.tokenizer.pad_id)
        feed: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._typed:
            feed["token_type_ids"] = types
        try:
            values: NDArray[np.float32] = session.run(["values"], feed)[0]
        except ORT_ERRORS as error:
            raise EngineError(
                f"ONNX Runtime failed on a batch of {len(rows)} rows of up to {rows.longest} tokens"
            ) from error
        return values


def call_tokens(options: EngineOptions) -> int | None:
    """Tokens of one call, None for as many as there are."""
    return CALL_TOKENS * options.threads if options.device == "cpu" else None


def in_calls(rows: Rows, tokens: int | None, manifest: VariantManifest) -> list[tuple[NDArray[np.int64], Rows]]:
    """The batch as the calls that answer it: row numbers, and those rows."""
    calls = engine_calls(rows.lengths.tolist(), tokens, row_by_row=manifest.row_by_row, packed=manifest.packed)
    if len(calls) == 1:
        return [(np.arange(len(rows)), rows)]
    return [(np.array(chosen), taken(rows, chosen)) for chosen in calls]


def taken(rows: Rows, chosen: Sequence[int]) -> Rows:
    """The rows of these numbers, in this order."""
    starts = np.cumsum(rows.lengths) - rows.lengths
    where = np.concatenate([np.arange(starts[row], starts[row] + rows.lengths[row]) for row in chosen])
    types = None if rows.type_ids is None else rows.type_ids[where]
    return Rows(rows.ids[where], rows.lengths[list(chosen)], types)


def session_options(threads: int, *, spin: bool = False) -> ort.SessionOptions:
    """Options of one worker that shares its cores: one graph at a time, `threads` wide, idle threads asleep.

    Args:
        spin: between two operators of a call, threads wait awake for the next one.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.add_session_config_entry("session.force_spinning_stop", str(int(spin)))
    options.log_severity_level = 3
    return options


_state = ort.capi.onnxruntime_pybind11_state
ORT_ERRORS = (
    _state.Fail,
    _state.InvalidArgument,
    _state.InvalidGraph,
    _state.InvalidProtobuf,
    _state.NoSuchFile,
    _state.NotImplemented,
    _state.RuntimeException,
    RuntimeError,
    ValueError,
)
_NO_CUDA = "no CUDA device is usable by ONNX Runtime; check the driver and CUDA libraries, or set device to cpu"


def open_session(path: Path, options: EngineOptions, *, spin: bool = False) -> ort.InferenceSession:
    cpu = options.device == "cpu"
    if not cpu and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise UsageError(_NO_CUDA)
    try:
        session = ort.InferenceSession(
            str(path),
            session_options(options.threads, spin=spin),
            providers=["CPUExecutionProvider"] if cpu else ["CUDAExecutionProvider", "CPUExecutionProvider"],
            disabled_optimizers=SLOWER_ON_CPU if cpu else [],
        )
    except ORT_ERRORS as error:
        raise FamilyError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load it ({first_line(error)}); run `fettle optimize` again"
        ) from error
    # ONNX Runtime goes on without a provider that fails to start; serving on CPU what should be on CUDA is no success.
    if not cpu and "CUDAExecutionProvider" not in session.get_providers():
        raise UsageError(_NO_CUDA)
    return session
