"""The application behind uvicorn, until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import uvicorn

from latentrt.engines.errors import NotInstalledError, RequestError
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.operation.connections import Connections
from latentrt.runtime.serve.options import ConnectionLimits

if TYPE_CHECKING:
    from latentrt.runtime.serve.operation.tracing import Tracing

logger = logging.getLogger(__name__)
BACKLOG = 1024
OWN_FILES = 200  # descriptors that are no connections: engines, weights, logs
SENDING_S = 10  # for what is drawn to reach those who asked, once everything is
ENDS = (signal.SIGINT, signal.SIGTERM)


def run(models: Models, listener: socket.socket, *, ready: Callable[[], None]) -> None:
    """Serve on a socket until SIGINT or SIGTERM, and end what was accepted; a second signal ends the process at once.

    ready: called when the models are loaded, which it does itself. Raises what loading one raises
    """
    server = Server(models, ready)
    server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure


def bind(host: str, port: int) -> socket.socket:
    """Return the one socket of the service.

    Raises RequestError where the address cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OverflowError:
        listener.close()
        raise RequestError(f"port: found {port}, expected 0 to 65535") from None
    except OSError as error:
        listener.close()
        raise RequestError(
            f"port: '{host}' with port {port} cannot be listened on ({error.strerror}); choose another --port (0 "
            "for any that is free) or --host"
        ) from error
    return listener


def address(listener: socket.socket) -> str:
    """Return where a socket is reached, `http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_options(connections: Connections, proxies: Sequence[str] = ()) -> dict[str, Any]:
    """Return how uvicorn is to serve: with our deadlines, and without logs of its own. proxies: who is believed"""
    return {
        "http": connections.protocol,
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": bool(proxies),  # otherwise who asks is whom the socket names
        "forwarded_allow_ips": list(proxies),
        "backlog": BACKLOG,
        "timeout_keep_alive": connections.limits.idle_s,
        "timeout_graceful_shutdown": SENDING_S,
    }


class Server(uvicorn.Server):
    """uvicorn's, which says when it is ready and ends when all that it accepted has been drawn."""

    def __init__(self, models: Models, ready: Callable[[], None]) -> None:
        self._connections = Connections(within_files(models.options.connecting))
        options = uvicorn_options(self._connections, models.options.access.proxies)
        super().__init__(uvicorn.Config(build(models, self._connections, _tracing()), **options))
        self._models, self._ready = models, ready
        self.failure: Exception | None = None
        self._opening: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until it is told to end."""
        await super().serve(sockets)
        if self._opening is not None and not self._opening.done():
            os._exit(0)  # what is being loaded serves nobody, and nobody is waited for

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, and to load."""
        await super().startup(sockets)
        if self.started:
            self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        try:
            await asyncio.to_thread(self._models.load)
            self._ready()
        except Exception as error:
            self.failure, self.should_exit = error, True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Answer signals while it serves. uvicorn's own way ends the process by the signal, not with exit code 0."""
        loop = asyncio.get_running_loop()
        for number in ENDS:
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            yield
        finally:
            for number in (*ENDS, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _end(self, number: signal.Signals) -> None:
        if self._ending is not None:
            logger.warning("a second signal ends the service at once, with what it has in hand")
            os._exit(128 + number)
        logger.info("the service ends what it has in hand, and takes nothing more")
        self._ending = asyncio.get_running_loop().create_task(self._drain())

    def _reload(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self._models.reload)

    async def _drain(self) -> None:
        """Have all that was accepted drawn, while whoever asks for more is told to come again; then end."""
        if not await asyncio.to_thread(self._models.drain):
            logger.warning("not all was drawn in %s s; the rest is cancelled", self._models.options.drain_s)
        self.should_exit = True


def _tracing() -> Tracing | None:
    """Return what writes spans, where the environment asks for it. Raises NotInstalledError."""
    if not any(name.startswith("OTEL_EXPORTER_OTLP") for name in os.environ):
        return None
    try:
        from latentrt.runtime.serve.operation.tracing import from_environment

        return from_environment()
    except ModuleNotFoundError as error:
        raise NotInstalledError(
            f"the environment asks for OpenTelemetry, which needs '{error.name}'",
            install="pip install 'latentrt[otel]'",
        ) from error


def within_files(limits: ConnectionLimits) -> ConnectionLimits:
    """Return limits with no more connections than the process may open files for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = limits.connections if files == resource.RLIM_INFINITY else max(1, files - OWN_FILES)
    return msgspec.structs.replace(limits, connections=min(limits.connections, room))
