"""What is said of a request, in the log and in its trace: its id, who asked for what, what its reply told.

The application remembers in the ASGI scope what it has understood of a request; here it is read again.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from starlette.types import Scope

from deployments.journal import Journal, request_id
from deployments.router import Asked
from deployments.tracing import Tracer
from fettle.errors import FettleError
from fettle.manifest import TaskKind

TRACE = "fettle.trace"
ASKED = "fettle.asked"
HEADERS = "fettle.headers"
# A request that takes so many times the latency objective is told of; of a text only its wait counts.
SLOW = 10.0

Handling = Callable[[], Awaitable[Response]]


def remember(request: Request, asked: Asked) -> Asked:
    """What the request asks for, for what may have to be said about it."""
    request.scope[ASKED] = asked
    return asked


def note_error(journal: Journal, scope: Scope, error: FettleError) -> None:
    """A line about a request that is answered with an error."""
    journal.failed(error, id_of(scope), path=scope["path"], **subject(scope))


def id_of(scope: Scope) -> str:
    """The request's id, which Serve has given to those that came without one, and echoes."""
    return request_id(header_of(scope, b"x-request-id").decode("latin-1"))


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """A request's headers by their names in lower case, the first of each name; made once of a request."""
    headers: dict[bytes, bytes] | None = scope.get(HEADERS)
    if headers is None:
        headers = scope[HEADERS] = dict(reversed(scope["headers"]))
    return headers


def header_of(scope: Scope, name: bytes) -> bytes:
    """The first header of this name; empty if there is none."""
    return headers_of(scope).get(name, b"")


def text_of(scope: Scope, name: bytes) -> str | None:
    """The first header of this name as a text; None if there is none."""
    value = headers_of(scope).get(name)
    return None if value is None else value.decode("latin-1")


def subject(scope: Scope) -> dict[str, str]:
    asked: Asked | None = scope.get(ASKED)
    if asked is None:
        return {}
    return {"family": asked.family.name, "class": asked.quality.asked, "client": asked.client.name}


def note_if_slow(journal: Journal, scope: Scope, response: Response) -> None:
    """The reply's own headers say who answered and where the time went."""
    asked: Asked | None = scope.get(ASKED)
    if asked is None or response.status_code != 200:
        return
    took_ms = 1000 * (time.monotonic() - asked.terms.arrived)
    limit_ms = SLOW * asked.family.gears.objective_ms
    if took_ms <= limit_ms:
        return
    facts = told(response)
    if asked.family.task.kind is not TaskKind.GENERATE or float(facts.get("queue_ms", 0.0)) > limit_ms:
        journal.slow(id_of(scope), path=scope["path"], took_ms=round(took_ms, 1), client=asked.client.name, **facts)


def told(response: Response) -> dict[str, str]:
    """What the reply's own headers say."""
    return {name[9:].replace("-", "_"): value for name, value in response.headers.items() if name[:9] == "x-fettle-"}


async def traced(tracer: Tracer, scope: Scope, handle: Handling) -> None:
    """Handle a request, as a span from here to the end of its reply if it is sampled."""
    parent = header_of(scope, b"traceparent").decode("latin-1")
    trace = scope[TRACE] = tracer.begin(f"POST {scope['path']}", parent or None)
    if trace is None:
        await handle()
        return
    # What stays, if the client leaves.
    status = 499
    try:
        response = await handle()
        status = response.status_code
        trace.say({"request_id": id_of(scope), **subject(scope), **told(response)})
    finally:
        trace.end(status)
