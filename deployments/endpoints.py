"""Where replicas listen for calls: each leaves a note in Ray's own key-value store, and routers read it.

The store is the cluster's, and whoever may read it may run anything there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass

import ray
from ray import serve
from ray.exceptions import RayError
from ray.experimental import internal_kv

from deployments.wire import Endpoint
from deployments.wire_server import WireServer

logger = logging.getLogger("ray.serve.fettle")

NAMESPACE = b"fettle"


@dataclass(slots=True)
class Listening:
    """A replica's port of its own, from when Serve first asks how it is to when Serve stops it; None: it has none."""

    server: WireServer | None
    _begun: bool = False

    async def begin(self) -> None:
        """Listen on this node's address, and note where that is. Where that cannot be, calls come through Ray."""
        if self.server is None or self._begun:
            return
        self._begun = True
        try:
            endpoint = await self.server.start(ray.util.get_node_ip_address())
        except OSError as error:
            logger.warning("this replica has no port of its own, its calls come through Ray: %r", error)
            return
        note = json.dumps([endpoint.host, endpoint.port, endpoint.secret.hex()])
        internal_kv._internal_kv_put(_own_key(), note.encode(), namespace=NAMESPACE)

    async def end(self) -> None:
        """Take the note back, and wait until what is under way is answered."""
        if self.server is not None and self._begun:
            internal_kv._internal_kv_del(_own_key(), namespace=NAMESPACE)
            await self.server.close()


def find(replicas: Collection[str]) -> dict[str, Endpoint]:
    """Of replicas by their ids, those that left a note and whose note could be read."""
    found = {}
    try:
        for id in replicas:
            noted = internal_kv._internal_kv_get(_key(id), namespace=NAMESPACE)
            if noted is not None:
                host, port, secret = json.loads(noted)
                found[id] = Endpoint(host, port, bytes.fromhex(secret))
    except RayError as error:
        # The head is away; who asks does so again.
        logger.warning("Ray's store does not answer: %r", error)
    return found


def _own_key() -> bytes:
    return _key(serve.get_replica_context().replica_id.unique_id)


def _key(replica: str) -> bytes:
    return f"endpoint/{replica}".encode()
