"""A real server on a socket of its own, in a thread, for tests of the service."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from latentrt.runtime.serve.operation.connections import Connections
from latentrt.runtime.serve.options import ConnectionLimits
from latentrt.runtime.serve.server import uvicorn_options


@contextmanager
def served(app: ASGIApp, connections: Connections | None = None, *, proxies: Sequence[str] = ()) -> Iterator[str]:
    """Serve an application as `latentrt serve` does, without its signals; give its address, `http://127.0.0.1:PORT`."""
    listener = socket.create_server(("127.0.0.1", 0))
    options = uvicorn_options(connections if connections is not None else Connections(ConnectionLimits()), proxies)
    server = uvicorn.Server(uvicorn.Config(app, **{**options, "timeout_graceful_shutdown": 5}))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
