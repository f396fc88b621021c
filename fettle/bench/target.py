"""The server under load, before the load: whether it is there, what it calls its model, and whether it would answer."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit

from fettle.bench.traffic import GENERATES, Kind, payload
from fettle.errors import FettleError, UsageError

WAIT_S = 60.0


def check_address(url: str) -> None:
    """Raises UsageError if this is no whole HTTP address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is no address; give one such as http://localhost:8000/v1/embeddings")


def model_of(url: str, headers: Sequence[str] = ()) -> str | None:
    """What `/v1/models` of this server names first; None where it has no such path, as TEI."""
    parts = urlsplit(url)
    try:
        with _open(f"{parts.scheme}://{parts.netloc}/v1/models", None, headers) as reply:
            return str(json.load(reply)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_answers(url: str, kind: Kind, model: str | None, headers: Sequence[str] = ()) -> float:
    """Ask once; seconds that it took.

    Raises:
        FettleError: nobody answers at this address, or not with 200; what the server said is in the message.
    """
    body = payload(kind, model, "Are you there?")
    if kind in GENERATES:
        body |= {"max_tokens": 1}
    started = time.perf_counter()
    try:
        with _open(url, json.dumps(body).encode(), headers) as reply:
            reply.read()
    except urllib.error.HTTPError as error:
        said = error.read(400).decode(errors="replace").strip()
        raise FettleError(f"{url} answered with {error.code}: {said or error.reason}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise FettleError(f"no answer from {url}: {reason}; is the server up, and the address right?") from None
    return time.perf_counter() - started


def _open(url: str, body: bytes | None, headers: Sequence[str]) -> urllib.request._UrlopenRet:
    request = urllib.request.Request(url, body)
    request.add_header("Content-Type", "application/json")
    for line in headers:
        name, _, value = line.partition(":")
        request.add_header(name.strip(), value.strip())
    return urllib.request.urlopen(request, timeout=WAIT_S)
