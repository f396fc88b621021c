"""The HTTP API in this process: the real router, batchers and tokenizer over fake engines, without Ray.

The monitor is the real one too, where one is given; it is told what the tests tell it to be (`Router.watch.report`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import uvicorn
from fastapi import FastAPI

from deployments.api import build_api
from deployments.batcher import Batcher
from deployments.keyring import Keyring
from deployments.lane import Lane
from deployments.monitor import Monitor
from deployments.router import Client, Router
from deployments.served import ServedFamily
from deployments.telemetry import Telemetry
from deployments.text_source import TextSource
from deployments.text_work import Bit, TextWork
from deployments.watch import Send, Watch
from fettle.config import FamilyConfig, GearConfig, LimitConfig, MonitorConfig
from fettle.family import Family
from fettle.latency import TextCosts
from fettle.manifest import TaskKind
from fettle.rows import Exits, Outputs, Rows
from fettle.scheduling import BatchBounds, Queue
from workers.engine import Engine, open_engine

MAX_QUEUE_S = 1.0
ROUTER = "router-1"


@dataclass
class EngineSlots:
    """One replica that runs one batch at a time, while `gate` is open; `batches` are the sizes of those it ran."""

    engine: Engine
    replicas: int = 1
    batches: list[int] = field(default_factory=list)
    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[EngineSlots]:
        async with self.free:
            yield self

    async def run(self, rows: Rows, exits: Exits | None, *traces: str) -> Outputs:
        self.batches.append(len(rows))
        # Others get a turn, as they do while a real replica works.
        await asyncio.sleep(0)
        await self.gate.wait()
        return self.engine.run(rows, exits)


class FlatCost:
    def row_ms(self, length: int) -> float:
        return 1.0


def slots_of(router: Router, family: str, variant: str) -> EngineSlots:
    slots = router.families[family].batchers[variant].slots
    assert isinstance(slots, EngineSlots)
    return slots


def make_router(
    families: Sequence[Family],
    limits: LimitConfig | None = None,
    *,
    settings: Mapping[str, FamilyConfig] | None = None,
    gears: GearConfig | None = None,
    classes: Mapping[str, float] | None = None,
    send: Send | None = None,
    share: float = 0.0,
    id: str = ROUTER,
) -> Router:
    """All variants of the families, each behind a batcher of its own. `settings` by family; `send` is the monitor's."""
    gears = gears or GearConfig()
    served = {}
    for family in families:
        own = (settings or {}).get(family.name) or FamilyConfig(path=str(family.directory))
        make: Callable[[Family, str], Batcher | Lane] = (
            make_lane if family.manifest.task.kind is TaskKind.GENERATE else make_batcher
        )
        batchers = {name: make(family, name) for name in own.variants or family.variants}
        served[family.name] = made = ServedFamily.of(own, family.name, family, batchers, gears)
        for batcher in batchers.values():
            batcher.calm = made.is_calm
    telemetry = Telemetry()
    watch = Watch(id, served, telemetry, send, share, seed=1)
    return Router(served, limits or LimitConfig(), classes or {}, telemetry, watch, id=id)


def make_batcher(family: Family, variant: str) -> Batcher:
    return Batcher(
        slots=EngineSlots(open_engine(family.variant_path(variant))),
        cost=FlatCost(),
        queue=Queue(BatchBounds(rows=16, tokens=1024, max_age_s=0.1)),
        max_queue_s=MAX_QUEUE_S,
        stages=family.variant(variant).exits + 1,
    )


@dataclass
class Unasked:
    """One replica of a text variant that is never asked: a scripted source answers in its place."""

    replicas: int = 1

    def generate(self, work: TextWork) -> AsyncGenerator[list[Bit], None]:
        raise AssertionError(f"{work.id} went past the scripted source")


def make_lane(family: Family, variant: str) -> Lane:
    measured = family.variant(variant).measured
    assert measured is not None
    costs = TextCosts(measured.latency, measured.latency, rows=4, length=16)
    return Lane(Unasked(), costs, places=4, max_queue_s=MAX_QUEUE_S)


@asynccontextmanager
async def monitoring(families: Sequence[Family], config: MonitorConfig | None = None) -> AsyncIterator[Monitor]:
    monitor = Monitor({family.name: str(family.directory) for family in families}, config or MonitorConfig())
    try:
        yield monitor
    finally:
        await monitor.close()


def client_of(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    # What a server would answer, even to a bug.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://fettle", headers=headers)


async def listening(app: FastAPI) -> AsyncIterator[str]:
    """The application on a free port of this machine, while the fixture that yields from here lives; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        running = asyncio.create_task(server.serve(sockets=[bound]))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        server.should_exit = True
        await running


def make_app(
    families: Sequence[Family],
    *,
    clients: Mapping[str, Client] | None = None,
    limits: LimitConfig | None = None,
    text_source: TextSource | None = None,
) -> FastAPI:
    return build_api(make_router(families, limits), Keyring(clients) if clients else None, text_source)
