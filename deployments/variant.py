"""The replica: one worker's engine behind a Serve deployment, one Ray call a batch, and the slots that reach it."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import grpc
import numpy as np
import ray
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.schema import ReplicaState

from deployments.endpoints import Listening
from deployments.fleet import Fleet
from deployments.journal import speak
from deployments.links import Links
from deployments.silence import Patience
from deployments.slots import SlotLostError
from deployments.tracing import at_replica, open_tracer
from deployments.watchdog import Watchdog
from deployments.wire_server import WireServer
from fettle.config import TracingConfig
from fettle.errors import EngineError
from fettle.model_store import VariantFiles
from fettle.rows import Exits, Outputs, Rows
from workers.engine import EngineOptions, open_engine

logger = logging.getLogger("ray.serve.fettle")

FOLLOW_EVERY_S = 1.0
AWAIT_EVERY_S = 0.5
CONTROLLER_S = 10.0

Floats = NDArray[np.float32]
# Values, milliseconds, and where there are exits the stages and their scores (`fettle.rows.Outputs`); or what failed.
Reply = tuple[Floats, float, NDArray[np.int8] | None, Floats | None] | str


@serve.deployment
class Variant:
    """Owns one loaded variant. The engine works on a thread of its own, so that health checks are always answered."""

    def __init__(
        self,
        files: VariantFiles,
        options: EngineOptions,
        niceness: int = 0,
        stuck_after_s: float = math.inf,
        wire: bool = True,
        tracing: TracingConfig | None = None,
    ) -> None:
        speak()
        # Of this thread and those that it starts, the engine's among them.
        os.nice(niceness)
        began = time.perf_counter()
        self.engine = files.load(lambda directory: open_engine(directory, options))
        loaded = time.perf_counter()
        self.engine.warm_up()
        took = {"load_ms": 1000 * (loaded - began), "warm_up_ms": 1000 * (time.perf_counter() - loaded)}
        logger.info("the engine is warm", extra={"kind": "engine", **{name: round(ms) for name, ms in took.items()}})
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._watchdog = Watchdog(stuck_after_s)
        if stuck_after_s < math.inf:
            self._watchdog.start()
        self._tracer = open_tracer(tracing or TracingConfig())
        self._wire = Listening(WireServer(answers={"run": self.run}) if wire else None)
        # What was allocated so far lives as long as the replica: collecting it again and again is wasted time.
        gc.collect()
        gc.freeze()

    async def run(
        self,
        ids: NDArray[np.int32],
        lengths: NDArray[np.int32],
        type_ids: NDArray[np.int8] | None,
        thresholds: Floats | None = None,
        temperatures: Floats | None = None,
        traces: Sequence[str] = (),
    ) -> Reply:
        """What the engine makes of a batch, rows and exits in their parts, or what it said was wrong with it.

        A failed batch is a value, not an exception, so that every exception means: this replica is gone.
        """
        rows = Rows(ids, lengths, type_ids)
        exits = None if thresholds is None or temperatures is None else Exits(thresholds, temperatures)
        with at_replica(self._tracer, traces, {"batch_rows": len(lengths), "tokens": rows.tokens}) as found:
            try:
                outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, rows, exits)
            except EngineError as error:
                found["error"] = error.message
                return error.message
            found["infer_ms"] = outputs.infer_ms
        return outputs.values, outputs.infer_ms, outputs.stages, outputs.scores

    def _run(self, rows: Rows, exits: Exits | None) -> Outputs:
        with self._watchdog.watching():
            return self.engine.run(rows, exits)

    async def check_health(self) -> None:
        await self._wire.begin()

    async def __del__(self) -> None:
        await self._wire.end()


@contextmanager
def losses() -> Iterator[None]:
    """Ray's ways to say that a replica is gone, as the one that the batcher knows."""
    try:
        yield
    except (RayError, RayServeException, ConnectionError, grpc.RpcError) as error:
        raise SlotLostError(f"{type(error).__name__}: {error}") from error


def direct(handle: DeploymentHandle, *, stream: bool = False) -> DeploymentHandle:
    """The handle as it calls on the fast path: replicas over gRPC, not through Ray's objects.

    A handle that came with the application does as the process did that made it, which may know no fast path.
    """
    return handle.options(stream=stream, _by_reference=not RAY_SERVE_USE_GRPC_BY_DEFAULT)


class ReplicaSlots:
    """The batcher's `Slots`: as many batches under way as the replicas can hold, counted here.

    Ray can reserve a place at a replica itself, but that is one more actor call for each batch, 3 to 4 ms of latency
    and 1.5 ms of CPU on two cores; and what a full replica refuses, Ray's handle sends to another anyway.
    `share` is this router's part of each replica's `places`, since routers know nothing of each other; it changes as
    routers come and go.
    A call that is given up keeps its place at the replica, so that what is done again goes elsewhere; and as many
    replicas as such calls fill are not counted on.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        places: int,
        share: float = 1.0,
        stuck_after_s: float = math.inf,
        links: Links | None = None,
    ) -> None:
        self.replicas = 0
        self.share = share
        self._links = links or Links()
        self._handle = direct(handle)
        self._places = places
        self._taken = 0
        self._given_up = 0
        self._freed = asyncio.Event()
        self._patience = Patience(stuck_after_s, lambda: self.replicas > 0)

    @property
    def capacity(self) -> int:
        """Calls at a time. One where there is no replica: a deployment that was scaled to zero comes back because a
        batch waits for it at its handle.
        """
        silent = math.ceil(self._given_up / self._places) + self._links.silent
        speaking = max(0, self.replicas - silent)
        return max(0 if silent else 1, math.ceil(speaking * self._places * self.share))

    def resize(self, replicas: int) -> None:
        """Tell how many replicas are running now."""
        if replicas < self.replicas:
            self._patience.forget()
        self.replicas = replicas
        self._freed.set()

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[ReplicaSlot]:
        while self._taken >= self.capacity:
            self._freed.clear()
            await self._freed.wait()
        self._taken += 1
        slot = ReplicaSlot(self._handle, self._patience, self._links)
        try:
            yield slot
        finally:
            self._taken -= 1
            if slot.given_up is not None:
                self._given_up += 1
                slot.given_up.add_done_callback(self._ended)
            self._freed.set()

    def _ended(self, _: asyncio.Future[Reply]) -> None:
        """Of a call that was given up."""
        self._given_up -= 1
        self._freed.set()


@dataclass(slots=True)
class ReplicaSlot:
    """A place at one of the replicas, good for one batch. `given_up`: a call that did not come back in time."""

    handle: DeploymentHandle
    patience: Patience
    links: Links
    given_up: asyncio.Future[Reply] | None = None

    async def run(self, rows: Rows, exits: Exits | None, *traces: str) -> Outputs:
        gates = (None, None) if exits is None else (exits.thresholds, exits.temperatures)
        arguments = (rows.ids, rows.lengths, rows.type_ids, *gates, traces)
        link = self.links.pick()
        reply: Reply = await (self._through_ray(arguments) if link is None else link.ask("run", *arguments))
        if isinstance(reply, str):
            raise EngineError(reply)
        return Outputs(*reply)

    async def _through_ray(self, arguments: tuple[object, ...]) -> Reply:
        self.links.through_ray += 1
        try:
            with losses():
                call = asyncio.ensure_future(_awaited(self.handle.run.remote(*arguments)))
                if not await self.patience.wait(call):
                    self.given_up = call
                    raise SlotLostError(f"no reply in {self.patience.seconds:g} s")
                return call.result()
        finally:
            self.links.through_ray -= 1


async def _awaited(response: DeploymentResponse[Reply]) -> Reply:
    reply: Reply = await response
    return reply


class Followed(Protocol):
    """What changes with the number of a deployment's replicas."""

    def resize(self, replicas: int) -> None:
        """Tell how many replicas are running now."""


async def follow_replicas(
    slots: Mapping[str, Followed], links: Mapping[str, Links], application: str, fleet: Fleet
) -> None:
    """Keep every deployment's slots and links (by its name), and the fleet, at what Serve says, until cancelled."""
    while True:
        try:
            running = await asyncio.to_thread(_look_at_replicas, application, fleet)
        except (RayError, RayServeException, KeyError) as error:
            # The controller is away, or knows nothing yet; what was known last still holds, and lost replicas are
            # retried.
            logger.warning("Serve's controller does not answer: %r", error)
        else:
            for name, own in slots.items():
                own.resize(fleet.standings[name].running if name in fleet.standings else 0)
            # After that, and all at once: a host that does not answer takes seconds.
            await asyncio.gather(*(own_links.meet(running.get(name, ())) for name, own_links in links.items()))
        await asyncio.sleep(FOLLOW_EVERY_S)


def await_replicas(deployments: Collection[str], application: str) -> None:
    """Wait until each of them has a replica that takes work."""
    fleet = Fleet()
    while not all(name in fleet.standings and fleet.standings[name].running for name in deployments):
        time.sleep(AWAIT_EVERY_S)
        try:
            _look_at_replicas(application, fleet)
        except (RayError, RayServeException, KeyError) as error:
            logger.warning("Serve's controller does not answer: %r", error)


def _look_at_replicas(application: str, fleet: Fleet) -> dict[str, list[str]]:
    """The ids of what runs, by deployment.

    `serve.status()` reads the same, and checks it by a schema at a twelfth of the router's time.

    Raises RayError where the controller does not answer in time, as when its host is cut off.
    """
    details = ray.get(_get_global_client()._controller.get_serve_instance_details.remote(), timeout=CONTROLLER_S)
    running = {}
    for name, found in details["applications"][application]["deployments"].items():
        replicas = found["replicas"]
        running[name] = [each["replica_id"] for each in replicas if each["state"] == ReplicaState.RUNNING]
        fleet.see(name, len(running[name]), found["target_num_replicas"], [each["replica_id"] for each in replicas])
    return running
