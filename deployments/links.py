"""A router's connections to one deployment's replicas: opened as they come, closed as they go, the next call's choice.

Replicas that no connection reaches are still asked, through Ray. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from deployments.link import Link
from deployments.wire import Endpoint

logger = logging.getLogger("ray.serve.fettle")

# Of replicas, by their ids, where they listen; called in a thread. Not all need be known.
Find: TypeAlias = Callable[[Collection[str]], Mapping[str, Endpoint]]
# So often in turn a connection that fails is tried again at once; later every so manyth time that replicas are told.
EAGER_TRIES, SELDOM = 5, 30


@dataclass(slots=True)
class _Replica:
    endpoint: Endpoint | None = None
    link: Link | None = None
    tries: int = 0

    def is_turn(self) -> bool:
        """Whether to try again what has failed so often."""
        self.tries += 1
        return self.tries <= EAGER_TRIES or self.tries % SELDOM == 0


@dataclass(slots=True)
class Links:
    """All methods run on one event loop. `find` None: there are no connections, all goes through Ray."""

    find: Find | None = None
    silent_after_s: float = math.inf
    through_ray: int = 0
    _replicas: dict[str, _Replica] = field(default_factory=dict)
    _leaving: set[Link] = field(default_factory=set)

    @property
    def silent(self) -> int:
        """Replicas that are connected and say nothing."""
        return sum(link.silent for link in self._open())

    def pick(self) -> Link | None:
        """Where the next call goes: the replica with the fewest; None for one that is reached through Ray.

        Where all that are connected are silent it is one of them, whose call is lost in due time.
        """
        links = self._open()
        speaking = [link for link in links if not link.silent] or links
        if not speaking:
            return None
        least = min(link.load for link in speaking)
        unreached = len(self._replicas) - len(links)
        if unreached and self.through_ray / unreached < least:
            return None
        return random.choice([link for link in speaking if link.load == least])

    async def meet(self, running: Collection[str]) -> None:
        """Be told which replicas are running: connect to new ones, let go of those that are no more."""
        if self.find is None:
            return
        for gone in self._replicas.keys() - set(running):
            link = self._replicas.pop(gone).link
            if link is not None:
                # What is under way there is still answered: whoever stops a replica waits for that.
                self._leaving.add(link)
        self._leaving = {link for link in self._leaving if not link.lost and not _close_if_idle(link)}
        for new in set(running) - self._replicas.keys():
            self._replicas[new] = _Replica()
        unknown = [id for id, replica in self._replicas.items() if replica.endpoint is None and replica.is_turn()]
        found = await asyncio.to_thread(self.find, unknown) if unknown else {}
        for id, endpoint in found.items():
            self._replicas[id].endpoint, self._replicas[id].tries = endpoint, 0
        await asyncio.gather(*(self._connect(each, each.endpoint) for each in self._replicas.values() if each.endpoint))

    async def _connect(self, replica: _Replica, endpoint: Endpoint) -> None:
        if (replica.link is not None and not replica.link.lost) or not replica.is_turn():
            return
        try:
            replica.link = await Link.open(endpoint, self.silent_after_s)
            replica.tries = 0
        except OSError as error:
            where = f"{endpoint.host}:{endpoint.port}"
            logger.warning("no connection to a replica at %s, it is asked through Ray: %r", where, error)

    def _open(self) -> list[Link]:
        return [each.link for each in self._replicas.values() if each.link is not None and not each.link.lost]


def _close_if_idle(link: Link) -> bool:
    if link.idle:
        link.abort()
    return link.idle
