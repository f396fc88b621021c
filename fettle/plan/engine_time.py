"""How long an engine takes for a batch, by its latency table: the calls that it makes of it, stage by stage.

Each stage has calls of its own, of the rows that are left: half of the rows take more than half of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from fettle.config import ReplicaConfig
from fettle.family import Family
from fettle.latency import estimate_ms
from fettle.manifest import LatencyTable, Runtime
from fettle.rows import CALL_TOKENS, engine_calls

# A row's tokens, and of a whole run the parts that the stages take which it goes through.
Going = tuple[int, tuple[float, ...]]


def batch_seconds(family: Family, name: str, config: ReplicaConfig, pace: float) -> Callable[[Sequence[Going]], float]:
    """Core seconds of a batch of so many rows, none of them without a stage; `pace` is over the table's time."""
    table, threads = table_of(family, name), config.threads
    variant = family.variant(name)
    cut = variant.runtime is Runtime.ONNX and config.device == "cpu"
    most = CALL_TOKENS * threads if cut else None

    @cache
    def call(rows: int, length: int) -> float:
        return pace * threads * estimate_ms(table, rows, length) / 1000

    def charged(lengths: Sequence[int]) -> int:
        """What each row of a call counts for: as long as the longest one, where there is padding."""
        return round(sum(lengths) / len(lengths)) if variant.packed else max(lengths)

    def seconds(batch: Sequence[Going]) -> float:
        parts = max((parts for _, parts in batch), key=len)
        spent = 0.0
        for stage, part in enumerate(parts):
            lengths = [length for length, own in batch if len(own) > stage]
            calls = engine_calls(lengths, most, row_by_row=cut and variant.row_by_row, packed=variant.packed)
            spent += part * sum(call(len(rows), charged([lengths[row] for row in rows])) for rows in calls)
        return spent

    return seconds


def table_of(family: Family, name: str) -> LatencyTable:
    """A variant's latency table; that it was measured is checked where a setup is made."""
    measured = family.variant(name).measured
    assert measured is not None
    return measured.latency
