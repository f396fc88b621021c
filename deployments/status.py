"""The paths that only read: what is served, whether it is well, what is known of its quality, and the live page."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response

from deployments import schemas
from deployments.border import ERRORS, reply
from deployments.router import Router
from deployments.served import ServedFamily
from deployments.telemetry import stats_body
from fettle import __version__
from fettle.errors import UnavailableError

PAGE = "page.html"

Responses = dict[int | str, dict[str, Any]]
# Path, handler, and what a good reply holds.
Route = tuple[str, Callable[..., Awaitable[Response]], Any]


class Status:
    """The paths, bound to one router."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._started = int(time.time())
        self._page = files("deployments").joinpath(PAGE).read_bytes()

    @property
    def routes(self) -> list[Route]:
        return [
            ("/v1/models", self.models, schemas.ModelList),
            ("/info", self.info, schemas.Info),
            ("/quality", self.quality, schemas.QualityReply),
            ("/stats", self.stats, schemas.Live),
            ("/health", self.health, schemas.State),
            ("/ready", self.ready, schemas.State),
        ]

    def add_to(self, app: FastAPI) -> None:
        """Register every path, with what it may answer."""
        for path, handler, model in self.routes:
            failures: Responses = {code: ERRORS[code] for code in ((401, 503) if path == "/ready" else (401,))}
            app.add_api_route(
                path, handler, methods=["GET"], responses=failures | {200: {"model": model}}, response_class=Response
            )
        app.add_api_route("/", self.page, methods=["GET"], response_class=Response, include_in_schema=False)

    async def page(self) -> Response:
        """The live page; it holds nothing that needs a key, and asks for one itself."""
        return Response(self._page, media_type="text/html; charset=utf-8", headers={"cache-control": "no-cache"})

    async def models(self) -> Response:
        """Every family, and every variant as `family:variant`, which pins it."""
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "fettle",
                "max_model_len": family.context,
            }
            for family in self._router.families.values()
            for name in family.models
        ]
        return reply({"object": "list", "data": cards})

    async def info(self) -> Response:
        """What is served, with the measured figures, and the queues of this router."""
        families = [_family_info(family) for family in self._router.families.values()]
        return reply({"version": __version__, "families": families})

    async def health(self) -> Response:
        """Live: this router answers."""
        return reply({"status": "ok"})

    async def ready(self) -> Response:
        """Ready: whatever answers a request that names no class has replicas that take work."""
        for family in self._router.settled:
            if not family.is_ready:
                raise UnavailableError(f"a variant that answers for {family.name} has no replica that takes work yet")
        return reply({"status": "ok"})

    async def quality(self) -> Response:
        """Of each certified point: the promise, the answers compared since, and the evidence against it."""
        states = self._router.watch.states
        families = [
            {"name": name, "points": [asdict(state) for state in states if state.family == name]}
            for name in self._router.families
        ]
        return reply({"families": families})

    async def stats(self) -> Response:
        """What the page at `/` shows, of all routers together."""
        watch = self._router.watch
        return reply(stats_body(watch.live, watch.states, __version__, at=time.time(), share=watch.share))


def _family_info(served: ServedFamily) -> dict[str, Any]:
    manifest = served.family.manifest
    return {
        "name": served.name,
        "task": manifest.task.kind,
        "max_length": manifest.tokenizer.max_length,
        "width": manifest.task.width,
        "labels": manifest.task.labels,
        "instruction": manifest.task.instruction,
        "variants": [_variant_info(served, name) for name in served.batchers],
    }


def _variant_info(served: ServedFamily, name: str) -> dict[str, Any]:
    manifest, batcher = served.family.variant(name), served.batchers[name]
    measured, stats = manifest.measured, batcher.stats
    return {
        "id": manifest.id,
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "default": manifest.id == served.default.variant,
        "size_bytes": manifest.size_bytes,
        "disagreement": measured.quality.disagreement if measured else None,
        "batch_invariant": measured.batching.invariant if measured else None,
        "queued": batcher.depth,
        "running": batcher.running,
        "backlog_s": round(batcher.backlog_s, 3),
        "rows": stats.rows,
        "batches": stats.batches,
        "refused": stats.refused,
        "late": stats.late,
        "withdrawn": stats.withdrawn,
        "retried": stats.retried,
    }
