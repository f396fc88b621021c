"""Clients that come at once are let in at once: several connections in one turn of the event loop.

libuv (1.52, of uvloop 0.23) accepts one connection of a listening socket in each turn. A turn of a router takes tens of
milliseconds, so that the last of 512 clients that had come together was let in after 9 s, while those before it were
answered again and again. A copy of the listening socket is another socket to libuv, and has a connection of its own.
"""

from __future__ import annotations

import socket
from functools import wraps

import uvicorn

# Of each listening socket, itself among them.
COPIES = 16


def accept_many() -> None:
    """Of uvicorn's servers that start in this process from now on; Ray starts the router's when the router is made."""
    startup = uvicorn.Server.startup
    if hasattr(startup, "__wrapped__"):
        return

    @wraps(startup)
    async def with_copies(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        more = [each.dup() for each in sockets or [] for _ in range(COPIES - 1)]
        await startup(server, sockets=[*sockets, *more] if sockets else sockets)

    # Ray makes the server itself, and takes no other class of server.
    uvicorn.Server.startup = with_copies  # type: ignore[method-assign, assignment]
