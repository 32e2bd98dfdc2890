"""Server-sent events: heartbeats, an error at the end where there is one, and an end to readers that do not read."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import msgspec
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from latentrt.runtime.serve.openai.kept import Reader
from latentrt.runtime.serve.web_errors import web_error

logger = logging.getLogger(__name__)
HEARTBEAT_S = 8.0  # proxies cut a connection on which nothing comes for a minute
DRAIN_S = 24 * 3600.0  # a stream that has begun ends by itself: the server's end does not cut it


class Events(EventSourceResponse):
    """The events of an answer in the making, which is left when the stream ends, however it does.

    reader_s: for which a client may take nothing of what it was sent
    """

    def __init__(self, reader: Reader, *, reader_s: float) -> None:
        super().__init__(
            _events(reader),
            ping=HEARTBEAT_S,
            ping_message_factory=lambda: ServerSentEvent(comment="still drawing", sep="\n"),
            send_timeout=reader_s,
            sep="\n",
            shutdown_grace_period=DRAIN_S,
        )
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.info("a stream was cut: its client took nothing for %g s", self.send_timeout)
        finally:
            self._reader.leave()


async def _events(reader: Reader) -> AsyncIterator[bytes]:
    try:
        async for part in reader.parts():
            yield part
    except Exception as error:
        yield _error_frame(error)


def frame(kind: str, data: bytes) -> bytes:
    """Return an event as it is sent."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


def _error_frame(error: Exception) -> bytes:
    """Return the event with which a stream ends that fails."""
    return frame("error", msgspec.json.encode({"type": "error", **web_error(error).body}))
