"""What a batcher asks of those who run its batches, and of whoever knows what rows cost."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from fettle.rows import Exits, Outputs, Rows


class SlotLostError(Exception):
    """The replica died or went away before it answered. The rows are intact and can go to another."""


class Slot(Protocol):
    async def run(self, rows: Rows, exits: Exits | None, *traces: str) -> Outputs:
        """`traces`: the spans of the rows that are traced, for the replica's own.

        Raises:
            SlotLostError: the replica is gone.
            EngineError: it failed on these rows.
        """
        ...


class Slots(Protocol):
    """Where batches go: each reservation waits for a free place at some replica. `replicas` are running now."""

    @property
    def replicas(self) -> int: ...

    def reserve(self) -> AbstractAsyncContextManager[Slot]: ...


class CostModel(Protocol):
    """Predicted milliseconds of one row of `length` tokens in a well-filled batch, through all stages."""

    def row_ms(self, length: int) -> float: ...
