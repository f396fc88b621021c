"""What a router does when replicas or routers come and go, as `follow_replicas` tells it, and what it says of load."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle

from deployments.demand import Demand
from deployments.lane import Queued
from deployments.scaling import ROUTER
from deployments.served import ServedFamily
from deployments.variant import Followed, ReplicaSlots

# By deployment: the demand of its family, and its variant.
Demands = Mapping[str, tuple[Demand, str]]


@dataclass(frozen=True, slots=True)
class FollowedVariant:
    """One variant's replicas; the first after none ends a start, whose time is noted."""

    slots: Followed
    demand: Demand
    variant: str

    def resize(self, replicas: int) -> None:
        ran = self.demand.batchers[self.variant].is_ready
        self.slots.resize(replicas)
        if replicas and not ran:
            self.demand.started(self.variant)


@dataclass(frozen=True, slots=True)
class FollowedRouters:
    """All routers: each has its part of the replicas' places and time."""

    queues: Sequence[Queued]

    def resize(self, replicas: int) -> None:
        for queue in self.queues:
            queue.routers = max(1, replicas)
            if isinstance(queue.slots, ReplicaSlots):
                queue.slots.share = 1 / queue.routers


def demands_of(
    handles: Mapping[str, Mapping[str, DeploymentHandle]], families: Mapping[str, ServedFamily]
) -> dict[str, tuple[Demand, str]]:
    return {
        handle.deployment_name: (families[name].demand, variant)
        for name, variants in handles.items()
        for variant, handle in variants.items()
    }


def followers(slots: Mapping[str, Followed], demands: Demands) -> dict[str, Followed]:
    """Who is told of each deployment's replicas, the routers' among them."""
    found: dict[str, Followed] = {name: FollowedVariant(slots[name], *wanted) for name, wanted in demands.items()}
    found[ROUTER] = FollowedRouters([demand.batchers[variant] for demand, variant in demands.values()])
    return found


def autoscaling_stats(demands: Demands) -> dict[str, float]:
    """This router's own work, and what is wanted of each deployment, as `deployments.scaling` reads it."""
    requests = sum(demand.requests for demand in {id(demand): demand for demand, _ in demands.values()}.values())
    stats = {"router|work_s": time.process_time(), "router|rows": float(requests)}
    for deployment, (demand, variant) in demands.items():
        stats |= {f"{deployment}|{figure}": value for figure, value in demand.figures(variant).items()}
    return stats
