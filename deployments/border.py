"""The HTTP border: reading bodies, keys, errors. Whatever a client sends, the reply has the documented error shape."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from deployments.bounds import within
from deployments.cycle import handled
from deployments.haproxy import SECRET_HEADER
from deployments.journal import Journal
from deployments.keyring import Keyring
from deployments.notes import header_of, headers_of, id_of, note_error, note_if_slow, subject, text_of, traced
from deployments.router import ANYBODY, Client
from deployments.schemas import ErrorReply
from deployments.tracing import Tracer
from fettle.config import LimitConfig
from fettle.errors import (
    AuthError,
    EncodingError,
    FettleError,
    ForbiddenError,
    OverloadedError,
    RequestError,
    SlowBodyError,
    TooLargeError,
)

logger = logging.getLogger("ray.serve.fettle")

Model = TypeVar("Model")

Handler = Callable[[Request], Awaitable[Response]]
# Path, handler, and what a good reply holds, a model or `Streamed`.
Route = tuple[str, Callable[..., Awaitable[Response]], Any]

# The page asks for a key itself.
OPEN_PATHS = frozenset({"/health", "/"})
CLIENT = "fettle.client"
PROXY_HEADER = SECRET_HEADER.encode()
# Of a body that nobody wants, so much is read, and so long, before its connection is closed.
LINGER_BYTES = 16_000_000
LINGER_S = 2.0
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "the request is not right"},
    401: {"model": ErrorReply, "description": "no valid API key"},
    404: {"model": ErrorReply, "description": "no such model"},
    408: {"model": ErrorReply, "description": "the body was not complete in time"},
    413: {"model": ErrorReply, "description": "too many inputs, or too long a body"},
    415: {"model": ErrorReply, "description": "the body is compressed"},
    429: {"model": ErrorReply, "description": "overloaded; `Retry-After` says when to come back"},
    500: {"model": ErrorReply, "description": "the engine failed on this input"},
    503: {"model": ErrorReply, "description": "no replica could answer"},
    504: {"model": ErrorReply, "description": "not to be answered before the request's deadline"},
}


@dataclass(frozen=True, slots=True)
class Streamed:
    """A reply that holds a model, or comes as server-sent events where that was asked for."""

    model: Any


def reply(content: object, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """JSON by orjson; numpy arrays are written without a detour through Python floats."""
    data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Json(data, status, headers or {})


class Json(Response):
    """A reply in JSON. Starlette's own constructor encodes every header's name anew, for each reply."""

    media_type = "application/json"

    def __init__(self, data: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.status_code, self.body, self.background = status, data, None
        self.raw_headers = [(encoded(name), value.encode("latin-1")) for name, value in headers.items()]
        self.raw_headers += (b"content-length", b"%d" % len(data)), (b"content-type", b"application/json")


@lru_cache(maxsize=256)
def encoded(name: str) -> bytes:
    """A header's name as it is sent."""
    return name.lower().encode("latin-1")


def error_reply(error: FettleError) -> Response:
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, OverloadedError) else None
    if isinstance(error, AuthError):
        headers = {"www-authenticate": "Bearer"}
    return reply(error.body(), headers, error.status)


class BodyReader(Generic[Model]):
    """Reads, bounds and validates one kind of body. Also knows how to describe it in the OpenAPI document."""

    def __init__(self, model: Any, limits: LimitConfig, remedies: Mapping[str, str] | None = None) -> None:
        """`remedies`: what is said of a field whose value is wrong; by its name, below others with dots between."""
        self.adapter: TypeAdapter[Model] = TypeAdapter(model)
        self._limits = limits
        self._remedies = remedies or {}

    async def __call__(self, request: Request) -> Model:
        """Read and validate.

        Raises:
            TooLargeError, SlowBodyError, EncodingError: the body is over a limit, or compressed.
            RequestError: anything else is wrong with it.
        """
        encoding = (text_of(request.scope, b"content-encoding") or "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise EncodingError(
                "content-encoding: compressed bodies are not read; send it plain", param="content-encoding"
            )
        declared = text_of(request.scope, b"content-type")
        if declared not in (None, "application/json"):
            kind = declared.partition(";")[0].strip().lower()
            if kind != "application/json" and not kind.endswith("+json"):
                raise RequestError(
                    f"content type {kind!r} is not understood; send application/json", param="content-type"
                )
        try:
            body = await within(self._limits.body_within_s, self._read(request))
        except TimeoutError:
            limit_s = self._limits.body_within_s
            raise SlowBodyError(f"the body was not complete within {limit_s:g} s; send it at once, or less") from None
        try:
            return self.adapter.validate_json(body)
        except ValidationError as error:
            raise _explained(error, self._remedies) from None

    async def _read(self, request: Request) -> bytes:
        limit = self._limits.max_body_bytes
        declared = header_of(request.scope, b"content-length")
        pieces: list[bytes] = []
        size = int(declared) if declared.isdigit() else 0
        if size <= limit:
            size, more = 0, True
            while more and size <= limit:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                more = message.get("more_body", False)
        if size > limit:
            raise TooLargeError(f"the body is larger than {limit} bytes; send several smaller requests")
        return b"".join(pieces)


def _explained(error: ValidationError, remedies: Mapping[str, str]) -> RequestError:
    """One readable line from pydantic's report; of a union's many complaints, the alternatives in words."""
    problems = error.errors(include_url=False, include_input=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['ctx']['error']}")
    # Parts that name a member of a union of models are no fields of the client's.
    path = [str(part) for part in first["loc"] if not str(part).endswith("Request")]
    field = next((part for part in path if part in ("input", "inputs")), None)
    if field is not None:
        empty = any(problem["type"] in ("too_short", "string_too_short") for problem in problems)
        what = "must not be empty" if empty else "must be a text, a list of texts, or token ids as the API documents"
        return RequestError(f"{field}: {what}", param=field)
    if path[:1] == ["max_disagreement"]:
        what = "must be a share from 0 to 1, `exact`, or the name of a class"
        return RequestError(f"max_disagreement: {what}", param="max_disagreement")
    # Of the fields on the way that have a remedy, the innermost; places in lists are no names.
    for end in range(len(path), 0, -1):
        remedy = remedies.get(".".join(part for part in path[:end] if not part.isdecimal()))
        if remedy is not None and first["type"] != "missing" and not path[end - 1].isdecimal():
            where = ".".join(path[:end])
            return RequestError(f"{where}: {remedy}", param=where)
    where = ".".join(path) or "body"
    return RequestError(f"{where}: {first['msg']}", param=where)


def add_posts(app: FastAPI, routes: Iterable[Route]) -> None:
    """Register paths that are posted to, with what they may answer."""
    for path, handler, model in routes:
        good = {"model": model}
        if isinstance(model, Streamed):
            good = {"model": model.model, "content": {"text/event-stream": {}}}
        app.add_api_route(path, handler, methods=["POST"], responses=ERRORS | {200: good}, response_class=Response)


def document(app: FastAPI, readers: Mapping[str, BodyReader[Any]]) -> None:
    """Complete the OpenAPI document with the bodies, which are read by hand (`readers` by path)."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            bodies, definitions = TypeAdapter.json_schemas(
                [(path, "validation", reader.adapter) for path, reader in readers.items()],
                ref_template="#/components/schemas/{model}",
            )
            document["components"]["schemas"].update(definitions.get("$defs", {}))
            for path in readers:
                content = {"application/json": {"schema": bodies[path, "validation"]}}
                document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


class Body:
    """A request's body as it comes. What is left of it when the reply begins is thrown away, since many clients read no
    reply before they have sent everything; but not for long: then the connection is closed.
    """

    def __init__(self, receive: Receive, send: Send, headers: Mapping[bytes, bytes]) -> None:
        """Of a request with these headers, by their names."""
        self._receive = receive
        self._send = send
        self._more = True
        self._none = b"transfer-encoding" not in headers and headers.get(b"content-length", b"0") == b"0"

    async def __call__(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):
            self._more = False
        return message

    @property
    def send(self) -> Send:
        """How to reply now."""
        return self._send if self._none or not self._more else self._closing

    async def _closing(self, message: Message) -> None:
        if self._more and message["type"] == "http.response.start":
            await self._throw_away()
            if self._more:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await self._send(message)

    async def _throw_away(self) -> None:
        size = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while self._more and size <= LINGER_BYTES:
                    size += len((await self()).get("body", b""))
        except TimeoutError:
            return


class Api(FastAPI):
    """FastAPI with a guard, and a short cut past it for the requests that count.

    Every path but `/health` and the page at `/` needs one of the keys, if there are any; whose it is goes along.
    A POST to a path of `direct` goes straight to
    its handler: the layers and the dependency resolution of FastAPI, which these handlers do not use, cost a
    quarter of the router's CPU time. The same handlers are routes of the application, which documents them.
    """

    def __init__(
        self,
        direct: Mapping[str, Handler],
        keyring: Keyring,
        proxy_secret: str | None = None,
        journal: Journal | None = None,
        tracer: Tracer | None = None,
        **settings: Any,
    ) -> None:
        """`proxy_secret`: what HAProxy adds to requests, where it does; what comes without it is refused."""
        super().__init__(redoc_url=None, redirect_slashes=False, **settings)
        self._direct = direct
        self.journal = journal or Journal()
        self._proxy_secret = None if proxy_secret is None else proxy_secret.encode()
        self._tracer = tracer
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        await handled(scope, send, self._handle(scope, Body(receive, send, headers_of(scope))))

    async def _handle(self, scope: Scope, body: Body) -> None:
        try:
            scope[CLIENT] = self._admitted(scope)
        except FettleError as error:
            note_error(self.journal, scope, error)
            await error_reply(error)(scope, body, body.send)
            return
        if scope["method"] != "POST" or scope["path"] not in self._direct:
            await super().__call__(scope, body, body.send)
        elif self._tracer is None:
            await self._straight(scope, body)
        else:
            await traced(self._tracer, scope, partial(self._straight, scope, body))

    async def _straight(self, scope: Scope, body: Body) -> Response:
        response = await _answered(self._direct[scope["path"]], Request(scope, body), self.journal)
        await response(scope, body, body.send)
        return response

    def _admitted(self, scope: Scope) -> Client:
        """Whose request it is. Raises ForbiddenError, AuthError."""
        if not self._came_through_proxy(scope):
            raise ForbiddenError("this port is the proxy's alone; use the service's own address")
        if self._keyring.is_open or scope["path"] in OPEN_PATHS:
            return ANYBODY
        scheme, _, offered = header_of(scope, b"authorization").partition(b" ")
        return self._keyring.find(offered if scheme.lower() == b"bearer" else b"")

    def _came_through_proxy(self, scope: Scope) -> bool:
        if self._proxy_secret is None:
            return True
        return hmac.compare_digest(header_of(scope, PROXY_HEADER), self._proxy_secret)


def client_of(request: Request) -> Client:
    """Who asks, as the guard found."""
    client: Client = request.scope.get(CLIENT, ANYBODY)
    return client


async def _answered(handler: Handler, request: Request, journal: Journal) -> Response:
    try:
        response = await handler(request)
    except FettleError as error:
        note_error(journal, request.scope, error)
        return error_reply(error)
    except ClientDisconnect as error:
        return await _on_disconnect(request, error)
    except Exception as error:
        return _bug(journal, request, error)
    note_if_slow(journal, request.scope, response)
    return response


def install_error_handlers(app: FastAPI) -> None:
    """Every failure in the one documented shape: Fettle's own, Starlette's 404 and 405, and bugs (500, logged)."""
    app.add_exception_handler(FettleError, _on_fettle_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


async def _on_fettle_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FettleError)
    note_error(request.app.journal, request.scope, error)
    return error_reply(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    request.app.journal.count(error.status_code, "http")
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return reply(body, dict(error.headers or {}), error.status_code)


async def _on_disconnect(_: Request, __: Exception) -> Response:
    """Nobody reads this; it is no bug either."""
    return error_reply(RequestError("the client left before it was answered"))


async def _on_bug(request: Request, error: Exception) -> Response:
    return _bug(request.app.journal, request, error)


def _bug(journal: Journal, request: Request, error: Exception) -> Response:
    told = {"request_id": id_of(request.scope), **subject(request.scope)}
    logger.exception("unexpected error in %s %s", request.method, request.url.path, exc_info=error, extra=told)
    journal.count(FettleError.status, "bug")
    return error_reply(FettleError("internal error; the service's log has the details"))
