"""The HTTP API in this process: the real router, batchers and tokenizer over fake engines, without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
from fastapi import FastAPI

from deployments.api import build_api
from deployments.batcher import Batcher
from deployments.router import Router, ServedFamily
from fettle.config import LimitConfig
from fettle.family import Family
from fettle.policy import BatchBounds
from fettle.rows import Outputs, Rows
from fettle.tokenizer import Tokenizer
from workers.engine import Engine, open_engine

MAX_QUEUE_S = 1.0


@dataclass(frozen=True)
class EngineSlots:
    """A replica that is always free."""

    engine: Engine
    replicas: int = 1

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[EngineSlots]:
        yield self

    async def run(self, rows: Rows) -> Outputs:
        return self.engine.run(rows)


class FlatCost:
    def row_ms(self, length: int) -> float:
        return 1.0


def make_router(families: Sequence[Family], limits: LimitConfig | None = None) -> Router:
    """All variants of the families, each behind a batcher of its own."""
    served = {}
    for family in families:
        batchers = {
            name: Batcher(
                slots=EngineSlots(open_engine(family.variant_path(name))),
                cost=FlatCost(),
                bounds=BatchBounds(rows=16, tokens=1024, max_age_s=0.1),
                max_queue_s=MAX_QUEUE_S,
            )
            for name in family.variants
        }
        tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
        served[family.name] = ServedFamily(family.name, family, tokenizer, batchers, family.manifest.default)
    return Router(served, limits or LimitConfig())


def client_of(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    # What a server would answer, even to a bug.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://fettle", headers=headers)


def make_app(families: Sequence[Family], *, api_keys: Sequence[str] = (), limits: LimitConfig | None = None) -> FastAPI:
    return build_api(make_router(families, limits), api_keys)
