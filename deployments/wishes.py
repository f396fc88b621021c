"""What a request says about how it is to be answered: in its body, else in its headers."""

from __future__ import annotations

import math

from fastapi import Request

from deployments import schemas
from deployments.notes import TRACE, text_of
from deployments.router import LONGEST_TIMEOUT_S, Wishes
from fettle.errors import RequestError


def wishes_of(request: Request, body: schemas.Wished) -> Wishes:
    """Raises RequestError for a header that is no class, or no time."""
    return Wishes(
        max_disagreement=_tolerance(request, body.max_disagreement),
        allow_degraded=body.allow_degraded,
        priority=body.priority,
        timeout_s=_timeout_s(request),
        explain=isinstance(body, schemas.Explained) and body.explain,
        session=text_of(request.scope, b"x-fettle-session"),
        trace=request.scope.get(TRACE),
    )


def _tolerance(request: Request, given: float | str | None) -> float | str | None:
    """The class from the body, else from the header `x-max-disagreement`."""
    header = text_of(request.scope, b"x-max-disagreement")
    if given is not None or header is None:
        return given
    try:
        value = float(header)
    except ValueError:
        return header.strip()
    if not 0 <= value <= 1:
        raise RequestError(f"x-max-disagreement: {header!r} is no share from 0 to 1", param="x-max-disagreement")
    return value


def _timeout_s(request: Request) -> float | None:
    header = text_of(request.scope, b"x-request-timeout-seconds")
    if header is None:
        return None
    try:
        value = float(header)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_TIMEOUT_S:
        raise RequestError(
            f"x-request-timeout-seconds: {header!r} is no number of seconds above 0 and up to {LONGEST_TIMEOUT_S:g}",
            param="x-request-timeout-seconds",
        )
    return value
