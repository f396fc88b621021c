"""Where replicas listen for calls: each leaves a note in Ray's own key-value store, and routers read it.

The store is the cluster's, and whoever may read it may run anything there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection

import ray
from ray import serve
from ray.experimental import internal_kv

from deployments.wire import Endpoint
from deployments.wire_server import WireServer

logger = logging.getLogger("ray.serve.fettle")

NAMESPACE = b"fettle"


async def listen(server: WireServer) -> None:
    """Start the server on this node's address, and note where it is. Where that cannot be, calls come through Ray."""
    context = serve.get_replica_context()
    try:
        endpoint = await server.start(ray.util.get_node_ip_address())
    except OSError as error:
        logger.warning("this replica has no port of its own, its calls come through Ray: %r", error)
        return
    key = _key(context.replica_id.unique_id)
    note = json.dumps([endpoint.host, endpoint.port, endpoint.secret.hex()])
    internal_kv._internal_kv_put(key, note.encode(), namespace=NAMESPACE)


async def leave(server: WireServer) -> None:
    """Take the note back, and wait until what is under way is answered."""
    internal_kv._internal_kv_del(_key(serve.get_replica_context().replica_id.unique_id), namespace=NAMESPACE)
    await server.close()


def find(replicas: Collection[str]) -> dict[str, Endpoint]:
    """Of replicas by their ids, those that left a note. Raises RuntimeError where Ray's store does not answer."""
    found = {}
    for id in replicas:
        noted = internal_kv._internal_kv_get(_key(id), namespace=NAMESPACE)
        if noted is not None:
            host, port, secret = json.loads(noted)
            found[id] = Endpoint(host, port, bytes.fromhex(secret))
    return found


def _key(replica: str) -> bytes:
    return f"endpoint/{replica}".encode()
