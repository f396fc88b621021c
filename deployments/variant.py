"""The replica: one worker's engine behind a Serve deployment, one Ray call a batch, and the slots that reach it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.batcher import SlotLostError
from fettle.errors import EngineError
from fettle.rows import Outputs, Rows
from workers.engine import EngineOptions, open_engine

Reply = tuple[NDArray[np.float32], float] | str


@serve.deployment
class Variant:
    """Owns one loaded variant. The engine works on a thread of its own, so that health checks are always answered."""

    def __init__(self, directory: str, options: EngineOptions) -> None:
        self.engine = open_engine(Path(directory), options)
        self.engine.warm_up()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        # What was allocated so far lives as long as the replica: collecting it again and again is wasted time.
        gc.collect()
        gc.freeze()

    async def run(self, ids: NDArray[np.int32], lengths: NDArray[np.int32], type_ids: NDArray[np.int8] | None) -> Reply:
        """Values float32 [rows, width] and milliseconds, or what the engine said was wrong with the batch.

        A failed batch is a value, not an exception, so that every exception means: this replica is gone.
        """
        rows = Rows(ids, lengths, type_ids)
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self.engine.run, rows)
        except EngineError as error:
            return error.message
        return outputs.values, outputs.infer_ms


@contextmanager
def _losses() -> Iterator[None]:
    """Ray's ways to say that a replica is gone, as the one that the batcher knows."""
    try:
        yield
    except (RayError, RayServeException, ConnectionError, grpc.RpcError) as error:
        raise SlotLostError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class ReplicaSlots:
    """The batcher's `Slots`, kept by Ray: a reservation holds one of a replica's `max_ongoing_requests`."""

    handle: DeploymentHandle

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[ReplicaSlot]:
        with _losses():
            async with self.handle.run.choose_replica() as selection:
                yield ReplicaSlot(self.handle, selection)


class ReplicaSlot:
    """A place at one replica, good for one batch."""

    def __init__(self, handle: DeploymentHandle, selection: object) -> None:
        self._handle = handle
        self._selection = selection
        self.replica: str = selection.replica_id  # type: ignore[attr-defined]

    async def run(self, rows: Rows) -> Outputs:
        with _losses():
            reply: Reply = await self._handle.run.dispatch(self._selection, rows.ids, rows.lengths, rows.type_ids)
        if isinstance(reply, str):
            raise EngineError(reply)
        return Outputs(*reply)
