"""Where one router, one node's proxy, one cluster and one head node end, and how to go on.

From the measured processor time of a request and from what Ray's own release tests run; said, never enforced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fettle.plan.cell import ServingCosts
from fettle.plan.sizing import ROUTER_LOAD

# What Ray's release benchmarks run: `many_nodes_tests` 2,000 nodes, `many_actors` 10,000 actors. Replicas and routers
# are actors, and the head node keeps the books of them all.
MOST_NODES = 2_000
MOST_ACTORS = 10_000
# A proxy has one core in the end, whatever its threads: the node's other cores are the replicas'.
PROXY_LOAD = 0.7


@dataclass(frozen=True, slots=True)
class Tiers:
    """What the deployment has of each tier, how much one of it bears, and whether one cluster is enough."""

    router_rps: float
    proxy_rps: float
    routers: int
    proxies: int
    clusters: int
    cluster_rps: float
    words: list[str]


def tiers(rate: float, routers: int, replicas: int, nodes: int, costs: ServingCosts) -> Tiers:
    """How far each tier of this deployment goes."""
    router_rps = 1000 * ROUTER_LOAD / costs.request_ms
    proxy_rps = 1000 * PROXY_LOAD / max(costs.proxy, 1e-9)
    proxies = math.ceil(rate / proxy_rps)
    actors = routers + replicas
    clusters = max(1, math.ceil(nodes / MOST_NODES), math.ceil(actors / MOST_ACTORS))
    used = max(nodes / MOST_NODES, actors / MOST_ACTORS)
    cluster_rps = rate / used
    words = [
        f"a router is one process and bears about {router_rps:.0f} requests/s ({costs.request_ms:.2f} ms each): "
        f"{routers} of them",
        f"HAProxy runs on every node and bears about {proxy_rps:.0f} requests/s with a core: "
        + (
            f"spread clients over at least {proxies} nodes with a load balancer in front of them"
            if proxies > 1
            else "one is enough"
        ),
        f"a cluster is known to work with {MOST_NODES:,} nodes and {MOST_ACTORS:,} actors (Ray's release tests), which "
        f"is about {cluster_rps:,.0f} requests/s of this load; its one head node keeps account of them",
    ]
    if clusters > 1:
        each = math.ceil(nodes / clusters)
        words.append(
            f"so take {clusters} clusters, each with its own head node and {each:,} nodes, behind "
            "a balancer that knows only which of them is ready (`/ready`); they share nothing but the family's files"
        )
    return Tiers(router_rps, proxy_rps, routers, proxies, clusters, cluster_rps, words)
