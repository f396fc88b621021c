"""Requests that went wrong or took long, as log lines with their ids, and counts of errors by their code.

Nothing is written while all is well. A flood of one kind does not become a flood of lines: of each kind some are
written in a second, and then how many more there were. Neither keys nor texts of clients are in any. How a line looks
is the logger's business: one JSON object where Serve's `logging_config` says so.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from fettle.errors import FettleError, shortened

OURS = "ray.serve.fettle"
logger = logging.getLogger(OURS)

# Lines of one kind in a second.
MOST_LINES = 5
LONGEST_ID = 128
UNUSUAL = re.compile(r"[^A-Za-z0-9._:@/+=-]")

Fact = str | int | float | bool | None


def speak() -> None:
    """In each process of the service, once: let our own lines through from INFO on, whatever Serve's own are kept at.

    That is WARNING: at INFO Serve makes a record of each request, shown or not, at a thirtieth of the router's time.
    """
    logging.getLogger(OURS).setLevel(logging.INFO)


def request_id(given: str | None) -> str:
    """The client's own id, of usual characters and length; a new one where there is none."""
    cleaned = UNUSUAL.sub("_", given or "")[:LONGEST_ID]
    return cleaned or uuid.uuid4().hex


@dataclass(slots=True)
class Budget:
    """How many lines of a kind were written in this second, and how many were not."""

    second: int = 0
    written: int = 0
    withheld: int = 0


@dataclass(slots=True)
class Journal:
    """One router's. `errors`: replies by status and code."""

    clock: Callable[[], float] = time.monotonic
    errors: dict[tuple[int, str], int] = field(default_factory=dict)
    _budgets: dict[str, Budget] = field(default_factory=dict)

    def failed(self, error: FettleError, id: str, **facts: Fact) -> None:
        """A reply with an error; of bugs and broken engines as an error, of all that is the client's or load's not."""
        kind = error.code or error.type
        self.count(error.status, kind)
        level = logging.ERROR if error.status >= 500 and error.status != 504 else logging.WARNING
        self._write(level, kind, shortened(error.message), request_id=id, status=error.status, code=kind, **facts)

    def count(self, status: int, code: str) -> None:
        self.errors[status, code] = self.errors.get((status, code), 0) + 1

    def slow(self, id: str, **facts: Fact) -> None:
        """A request that was answered, long after its objective."""
        self._write(logging.WARNING, "slow", "a slow request", request_id=id, **facts)

    def _write(self, level: int, kind: str, message: str, **facts: Fact) -> None:
        budget = self._budgets.setdefault(kind, Budget())
        now = int(self.clock())
        if now != budget.second:
            withheld, budget.withheld, budget.written, budget.second = budget.withheld, 0, 0, now
            if withheld:
                logger.log(level, "%d more lines like the last were not written", withheld, extra={"kind": kind})
        if budget.written >= MOST_LINES:
            budget.withheld += 1
            return
        budget.written += 1
        logger.log(level, "%s", message, extra={"kind": kind, **facts})
