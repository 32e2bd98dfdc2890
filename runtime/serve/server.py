"""The application behind uvicorn, until a signal ends it."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from latentrt.engines.errors import RequestError
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models

BACKLOG = 1024


def run(models: Models, listener: socket.socket, *, ready: Callable[[], None]) -> None:
    """Serve on a socket until SIGINT or SIGTERM. ready: called when requests are answered"""
    config = uvicorn.Config(build(models), log_config=None, server_header=False, access_log=False, ws="none")
    Server(config, ready).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return the one socket that the service listens on. Raises RequestError where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise RequestError(f"port: '{host}' with port {port} cannot be listened on: {error}") from error


def address(listener: socket.socket) -> str:
    """Return where a socket is reached, `http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, which says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        await super().startup(sockets)
        if self.started:
            self._ready()
