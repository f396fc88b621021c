"""The decode step recorded once as a CUDA graph for each shape and replayed: one launch instead of a thousand.

A shape is (rows, positions that are read), both rounded up, so that a few dozen recordings serve every batch. Rows that
only fill up write into a spare slot, the one after the last. Knows no model: the step is a function.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fettle.errors import first_line
from workers.decoder import Ids
from workers.slot_cache import Call

# Rows in powers of two up to here, then in steps of it.
ROW_STEP = 8
SHORTEST_READ = 128

# Tokens int64 [rows, 1] and where they go; float32 logits [rows, vocabulary], and which rows are sound, bool [rows].
Step = Callable[[Tensor, Call], tuple[Tensor, Tensor]]
# Gets a function without arguments that reads and writes fixed memory, and returns one that does the same again.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


class RecordingError(Exception):
    """A step cannot be recorded."""


class CudaRecorder:
    """Recordings of one recorder share a pool of memory, since only one of them is under way at a time.

    The pool goes with its recordings, so that a recorder is of no use after they are gone.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Raises RuntimeError for a step that waits for the device, and for want of memory."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Whatever a first pass sets up must not be part of the recording.
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        replay: Callable[[], None] = graph.replay
        return replay


class DecodeGraphs:
    """For `slots` slots of `context` tokens, of which slot `slots` is the spare one."""

    def __init__(
        self, step: Step, recorder: Recorder, slots: int, context: int, vocabulary: int, device: torch.device
    ) -> None:
        self._step = step
        self._recorder = recorder
        self._slots = slots
        self._context = context
        # Tokens, positions and slots of each row.
        self._inputs = torch.zeros(3, slots, dtype=torch.int64, device=device)
        self._logits = torch.zeros(slots, vocabulary, dtype=torch.float32, device=device)
        self._sound = torch.ones(slots, dtype=torch.bool, device=device)
        self._recorded: dict[tuple[int, int], Callable[[], None]] = {}

    def run(self, ids: Ids, lengths: Ids) -> tuple[Tensor, Tensor]:
        """As `Runner.decode`; also which rows are sound. Both are overwritten by the next run.

        Raises:
            RecordingError: a new shape could not be recorded.
        """
        rows = len(ids)
        shape = rounded_rows(rows, self._slots), rounded_length(int(lengths.max()) + 1, self._context)
        inputs = np.zeros((3, self._slots), np.int64)
        inputs[2] = self._slots
        inputs[:, :rows] = ids, lengths, np.arange(rows)
        self._inputs.copy_(torch.from_numpy(inputs))
        replay = self._recorded.get(shape)
        if replay is None:
            replay = self._recorded[shape] = self._record(*shape)
        replay()
        return self._logits[:rows], self._sound[:rows]

    def _record(self, rows: int, seen: int) -> Callable[[], None]:
        try:
            return self._recorder(lambda: self._static_step(rows, seen))
        except RuntimeError as error:
            raise RecordingError(first_line(error)) from error

    def _static_step(self, rows: int, seen: int) -> None:
        ids, positions, targets = self._inputs[:, :rows].unbind()
        logits, sound = self._step(ids[:, None], Call(0, rows, seen, targets, positions[:, None]))
        self._logits[:rows].copy_(logits)
        self._sound[:rows].copy_(sound)


def rounded_rows(rows: int, most: int) -> int:
    if rows > ROW_STEP:
        return min(-(-rows // ROW_STEP) * ROW_STEP, most)
    return min(1 << (rows - 1).bit_length(), most)


def rounded_length(length: int, most: int) -> int:
    return min(max(SHORTEST_READ, 1 << (length - 1).bit_length()), most)
