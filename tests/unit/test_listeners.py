"""Clients that come at once are let in at once, however long the turns of the router's event loop are."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
import uvicorn
import uvloop

from deployments.listeners import COPIES, accept_many

CLIENTS = 64
TURN_S = 0.01


async def _hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _turns_until_all_are_in(listener: socket.socket) -> int:
    """Turns of a loop that is busy in each of them."""
    server = uvicorn.Server(uvicorn.Config(_hello, lifespan="off", log_config=None))
    server.install_signal_handlers = lambda: None
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    clients = [socket.create_connection(listener.getsockname()) for _ in range(CLIENTS)]
    turns = 0
    while len(server.server_state.connections) < CLIENTS and turns < 2 * CLIENTS:
        time.sleep(TURN_S)
        turns += 1
        await asyncio.sleep(0)
    for client in clients:
        client.close()
    server.should_exit = True
    await serving
    return turns


def test_clients_that_come_together_are_let_in_together(monkeypatch: pytest.MonkeyPatch):
    # Whatever this process has done to it before.
    startup = uvicorn.Server.startup
    monkeypatch.setattr(uvicorn.Server, "startup", getattr(startup, "__wrapped__", startup))
    accept_many()
    accept_many()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            turns = runner.run(_turns_until_all_are_in(listener))
        assert turns <= 2 * CLIENTS / COPIES + 4
        # No copy listens on.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
