"""A plan as plain values: for each mix the deployment that bears it, what it costs, and what the reference alone would.

One machine whose cores all share, as `fettle serve` starts it, is tried first; where that is not enough, every process
has cores of its own, as on a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fettle.bench.traffic import Flow, mix_of
from fettle.config import FamilyConfig, GearConfig, ReplicaConfig, ServeConfig
from fettle.errors import UsageError
from fettle.family import Family
from fettle.manifest import TaskKind
from fettle.menu import EXACT, Menu
from fettle.plan.cell import ServingCosts, Setup, Simulated
from fettle.plan.limits import tiers
from fettle.plan.sizing import REQUESTS, Node, Objective, needed, nodes_for, percentile, shares_by_point, simulate, size
from fettle.plan.workload import Asked, mixed

RANKS = (50.0, 90.0, 99.0, 99.9)
SECONDS_AN_HOUR = 3600.0
# More than one machine's router bears in any case.
ONE_MACHINE_RPS = 2000.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of the planner. `lengths`: tokens of rows; `pace`: the nodes' time over that of the tables."""

    rate: float
    objective: Objective
    node: Node
    lengths: Sequence[int]
    threads: int = 1
    pace: float = 1.0
    seed: int = 0
    requests: int = REQUESTS
    costs: ServingCosts = field(default_factory=ServingCosts)


def study(family: Family, mixes: Sequence[str], wanted: Wanted) -> dict[str, Any]:
    """The plan for each mix, and for the reference alone.

    Raises:
        UsageError: the family cannot be planned with, or a mix names what it does not have.
    """
    check(family, wanted)
    reference = family.manifest.reference
    plans = [plan_for(family, mix, mix_of(mix), variants_of(family, mix), wanted) for mix in mixes]
    alone = plan_for(family, "the reference alone", mix_of(EXACT), [reference], wanted)
    return {
        "family": family.name,
        "rate": wanted.rate,
        "latency_ms": wanted.objective.latency_ms,
        "percentile": wanted.objective.percentile,
        "mean_tokens": round(float(np.mean(wanted.lengths)), 1),
        "hardware": family.manifest.hardware.model_dump(mode="json"),
        "plans": plans,
        "reference_alone": alone,
    }


def check(family: Family, wanted: Wanted) -> None:
    """Raises UsageError where the family's tables say nothing about what is asked."""
    if family.manifest.task.kind is TaskKind.GENERATE:
        raise UsageError(f"family {family.name!r} generates text; plans are for classifiers and embedding models")
    for name, variant in family.variants.items():
        if variant.measured is not None and variant.measured.latency.threads != wanted.threads:
            raise UsageError(
                f"--threads {wanted.threads}: variant {name!r} was measured with {variant.measured.latency.threads}; "
                "run `fettle optimize --threads` with that number to plan for it"
            )


def variants_of(family: Family, mix: str) -> list[str]:
    """What has to be served for a mix: the reference, the points' variants, and those that it names.

    Raises:
        UsageError: a class that is neither a share, `exact` nor a measured variant.
    """
    manifest = family.manifest
    names = [manifest.reference, *(step.variant for point in manifest.points for step in point.steps)]
    for asked in mixed(mix_of(mix)):
        if asked.variant is not None:
            known = family.variants.get(asked.variant)
            if known is None or known.measured is None:
                raise UsageError(
                    f"--mix: {asked.variant!r} is no share of changed answers, not exact, and no measured variant; "
                    f"there are {', '.join(family.variants)}"
                )
            names.append(asked.variant)
        elif not 0 <= asked.tolerance <= 1:
            raise UsageError(f"--mix: {asked.name} is no share; give one from 0 to 1, such as 0.01")
    return list(dict.fromkeys(names))


def plan_for(
    family: Family, name: str, flows: Sequence[Flow], variants: Sequence[str], wanted: Wanted
) -> dict[str, Any]:
    """One mix: on one machine if that is enough, else on a cluster."""
    asked = mixed(flows)
    setup = Setup(
        family,
        asked,
        dict.fromkeys(_used(family, asked, variants), 1),
        wanted.lengths,
        _config(family, wanted),
        wanted.costs,
        paces=dict.fromkeys(variants, wanted.pace),
    )
    small = _on_one_machine(setup, wanted)
    if small is not None:
        shared, found = small
        return _as_values(name, shared, found, 1, wanted, shared.replicas, 1, kept=True, one_machine=True)
    sized = size(setup, wanted.rate, wanted.objective, wanted.seed, wanted.requests)
    total = {variant: sized.cells * count for variant, count in sized.replicas.items()}
    # Where no class goes by the reference it is there once, for the monitor's comparisons.
    total = {family.manifest.reference: 1, **total}
    routers = sized.cells * sized.routers
    cpus, gpus = needed(setup, total, routers)
    nodes = nodes_for(cpus, gpus, wanted.node)
    made = replace(setup, replicas=sized.replicas)
    return _as_values(name, made, sized.found, nodes, wanted, total, routers, kept=sized.kept)


def _used(family: Family, asked: Sequence[Asked], variants: Sequence[str]) -> list[str]:
    """Those that some class's ways go by."""
    menu = Menu(family, variants)
    return list(dict.fromkeys(variant for each in asked for way in each.ways(menu) for variant in way.variants))


def _config(family: Family, wanted: Wanted) -> ServeConfig:
    device = next(each.measured.latency.device for each in family.variants.values() if each.measured is not None)
    return ServeConfig(
        families=[FamilyConfig(path=str(family.directory))],
        replicas=ReplicaConfig(threads=wanted.threads, device="cuda" if device.startswith("cuda") else "cpu"),
        gears=GearConfig(objective_ms=wanted.objective.latency_ms),
    )


def _on_one_machine(setup: Setup, wanted: Wanted) -> tuple[Setup, Simulated] | None:
    """As `fettle serve` starts it, one replica for each core of every variant, if that keeps the objective."""
    if wanted.rate > ONE_MACHINE_RPS or setup.config.replicas.device != "cpu":
        return None
    cores = wanted.node.cores
    shared = replace(setup, replicas=dict.fromkeys(setup.replicas, max(1, cores // wanted.threads)), cores=float(cores))
    found = simulate(shared, wanted.rate, wanted.seed, wanted.requests)
    return (shared, found) if wanted.objective.kept(found, len(setup.asked)) else None


def _as_values(
    name: str,
    setup: Setup,
    found: Simulated,
    nodes: int,
    wanted: Wanted,
    replicas: Mapping[str, int],
    routers: int,
    *,
    kept: bool,
    one_machine: bool = False,
) -> dict[str, Any]:
    cpus, gpus = needed(setup, replicas, routers)
    price, hourly = wanted.node.price_per_hour, wanted.rate * SECONDS_AN_HOUR / 1e6
    reach = tiers(wanted.rate, routers, sum(replicas.values()), nodes, setup.costs)
    return {
        "mix": name,
        "kept": kept,
        "one_machine": one_machine,
        "nodes": nodes,
        "cores": wanted.node.cores if one_machine else cpus,
        "gpus": gpus,
        "routers": routers,
        "rate_a_router": round(wanted.rate / routers, 1),
        "replicas": dict(replicas),
        "points": shares_by_point(found, setup.asked),
        "latency_ms": {
            each.name: {f"p{rank:g}": round(percentile(found.of(number), rank), 2) for rank in RANKS}
            for number, each in enumerate(setup.asked)
        },
        "histogram": histogram(found),
        "refused": round(found.refused, 5),
        "busy": {part: round(value, 3) for part, value in found.busy.items() if value},
        "rows_a_batch": {part: round(value, 2) for part, value in found.rows_a_batch.items() if value},
        "node_hours_per_million": round(nodes / hourly, 4),
        "cost_per_million": None if price is None else round(nodes * price / hourly, 4),
        "router_rps": round(reach.router_rps, 1),
        "proxy_rps": round(reach.proxy_rps, 1),
        "clusters": reach.clusters,
        "limits": reach.words,
    }


def histogram(found: Simulated, bins: int = 30) -> dict[str, list[float]]:
    """Of all latencies: the edges of bins that grow evenly in their logarithm, ms, and the share in each."""
    ms = found.ms[~np.isnan(found.ms)]
    if not len(ms):
        return {"edges_ms": [], "share": []}
    edges = np.geomspace(max(ms.min(), 1e-3) * 0.999, ms.max() * 1.001, bins + 1)
    counted, _ = np.histogram(ms, edges)
    return {
        "edges_ms": [round(float(edge), 3) for edge in edges],
        "share": [round(float(n) / len(ms), 5) for n in counted],
    }
