"""What Serve says of each deployment: how many replicas run, how many it aims at, how many it has started so far."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(slots=True)
class Standing:
    """One deployment. `started` counts the replicas that were seen for the first time, a crash loop's among them."""

    running: int = 0
    wanted: int = 0
    started: int = 0
    _known: frozenset[str] = frozenset()

    def see(self, running: int, wanted: int, replicas: Collection[str]) -> None:
        """`replicas`: the ids of all that are there, in whatever state."""
        self.running, self.wanted = running, wanted
        self.started += len(set(replicas) - self._known)
        self._known = frozenset(replicas)


@dataclass(slots=True)
class Fleet:
    """By the deployment's name, as a router last heard it."""

    standings: dict[str, Standing] = field(default_factory=dict)

    def of(self, family: str, variant: str, version: str) -> Standing:
        return self.standings.get(deployment_name(family, variant, version), Standing())

    def see(self, deployment: str, running: int, wanted: int, replicas: Collection[str]) -> None:
        self.standings.setdefault(deployment, Standing()).see(running, wanted, replicas)


def deployment_name(family: str, variant: str, version: str) -> str:
    """Of the variant's deployment in Serve. While a new version is beside the old one, its family is NAME@VERSION."""
    return f"{family.partition('@')[0]}.{variant}@{version}"
