"""What rows and batches cost by the measured tables, and what follows from it: bounds of a batch, who yields to whom.

The service and the planner (`fettle.plan`) read the same. Pure functions; no clock, no queue.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from fettle import latency
from fettle.config import ReplicaConfig
from fettle.family import Family
from fettle.manifest import LatencyTable, VariantManifest
from fettle.menu import Menu

TYPICAL_LENGTH = 64
# An engine that takes every core must not keep the router from refusing, and from feeding its neighbours.
CPU_NICENESS = 5
MOST_NICENESS = 15
# What a batch costs beside the engine's own time: transport and replies, on both sides (benchmarks/LOG.md).
CALL_MS = 4.5


def work_shares(family: Family, variants: Collection[str]) -> dict[str, float]:
    """By variant, the share of a whole run that a row takes there on average, where its points let rows leave early."""
    shares: dict[str, list[float]] = {variant: [] for variant in variants}
    for way in Menu(family, variants).points:
        for stretch in way.stretches:
            shares[stretch.step.variant].append(stretch.share)
    return {variant: max(found, default=1.0) for variant, found in shares.items()}


def batch_tokens(table: LatencyTable, objective_ms: float, work_share: float) -> int:
    """The tokens of a batch that make good use of a call, but no more than take half of the latency objective: whoever
    comes while it runs waits for it.
    """
    good = good_tokens(table)
    return min(good, latency.tokens_within(table, objective_ms / 2 / work_share))


def good_tokens(table: LatencyTable) -> int:
    """The tokens of a batch that make good use of a call."""
    return latency.best_tokens_per_call(table, CALL_MS, TYPICAL_LENGTH)


class RowCosts:
    """Predicted milliseconds of one row by length, in a batch that fills the token budget; a table look-up."""

    def __init__(self, table: LatencyTable, tokens: int, max_length: int) -> None:
        lengths = range(1, max_length + 1)
        sizes = [max(1, tokens // length) for length in lengths]
        costs = [latency.estimate_ms(table, size, length) / size for size, length in zip(sizes, lengths, strict=True)]
        self._by_length = np.array([costs[0], *costs])

    def row_ms(self, length: int) -> float:
        return float(self._by_length[length])


def niceness(family: Family, variant: str, config: ReplicaConfig) -> int:
    """Replicas that share cores yield to cheaper ones: two steps for each time that a row costs twice as much.

    Shortest job first, by the scheduler's weights: a flood of dear rows then delays the many cheap ones little, and is
    itself slowed little by them. A step is a weight of 1.25, so nothing starves.
    """
    if config.device != "cpu":
        return 0
    costs = {name: row_ms(manifest) for name, manifest in family.variants.items() if manifest.measured is not None}
    return min(MOST_NICENESS, CPU_NICENESS + round(2 * math.log2(costs[variant] / min(costs.values()))))


def row_ms(variant: VariantManifest) -> float:
    """A row of typical length in the batch that suits it best."""
    assert variant.measured is not None
    return 1000 / latency.best_rows_per_second(variant.measured.latency, TYPICAL_LENGTH)
