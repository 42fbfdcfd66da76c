"""An address of its own for the routes that change what is served, so that a firewall can tell them from the others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from act_serve.errors import ProfileError

_POLL_S = 0.01


@asynccontextmanager
async def listening(app: FastAPI, address: str) -> AsyncIterator[None]:
    """Serves `app` at HOST:PORT as long as the context lasts, in this event loop.

    Routers on one machine share the port (SO_REUSEPORT): each knows what the others change from the store.

    Raises:
        ProfileError: nothing can listen at the address, or the HTTP server ends before it does.
    """
    with _bound(address) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(_POLL_S)
        if not server.started:
            raise ProfileError(
                f"control_address={address}: its HTTP server ended before it listened ({serving.exception()}); "
                "give another address"
            )
        try:
            yield
        finally:
            server.should_exit = True
            await serving


def _bound(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(where)
        except BaseException:
            listener.close()
            raise
    except OSError as exc:
        raise ProfileError(
            f"control_address={address}: cannot listen there ({exc.strerror or exc}); give an address of this machine "
            "and a port that no other program uses"
        ) from exc
    return listener
