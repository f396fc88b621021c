"""What passes between router and batcher: a request's terms, one leg of its way, a row with whoever waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deployments.landed import Answered
from fettle.points import NEVER as NO_EXIT
from fettle.points import Gates
from fettle.rows import Exits, Row
from fettle.scheduling import NEVER, Entry, Priority

if TYPE_CHECKING:
    from deployments.tracing import Trace

# A row lost this often may be the one that kills replicas.
SUSPECT_FROM = 3


@dataclass(frozen=True, slots=True)
class Terms:
    """What the rows of a request keep on their whole way. Times are of `time.monotonic`."""

    arrived: float
    deadline: float = NEVER
    priority: Priority = Priority.INTERACTIVE
    key: str = ""
    weight: float = 1.0
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Leg:
    """One step of that way: where rows may leave early, and the share of a whole run's cost that they take on average.

    `reserve_s` is what the steps after it are expected to take; `admitted` rows are not asked again whether they fit.
    `trace` is the span that the replica's own belongs to, if the request is traced.
    """

    gates: Gates | None = None
    share: float = 1.0
    reserve_s: float = 0.0
    admitted: bool = False
    trace: str | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket(Entry):
    """An entry of the queue with its row, and whoever waits for it; `entered` this queue, `arrived` at the router."""

    row: Row
    entered: float
    future: asyncio.Future[Answered]
    gates: Gates | None = None
    losses: int = 0
    alone: bool = False
    trace: str | None = None

    @property
    def suspect(self) -> bool:
        return self.losses >= SUSPECT_FROM


def traces_of(batch: Iterable[Ticket]) -> tuple[str, ...]:
    """The spans of those rows that are traced, each once."""
    return tuple({ticket.trace: None for ticket in batch if ticket.trace is not None})


def exits_of(batch: Sequence[Ticket], stages: int) -> Exits | None:
    """A row of thresholds for each row, also where operating points are mixed; None where none can leave early."""
    if all(ticket.gates is None for ticket in batch):
        return None
    never: Gates = (np.full(stages - 1, NO_EXIT, np.float32), np.ones(stages - 1, np.float32))
    gates = [ticket.gates or never for ticket in batch]
    return Exits(
        thresholds=np.stack([thresholds for thresholds, _ in gates]),
        temperatures=np.stack([temperatures for _, temperatures in gates]),
    )
