"""Connections that hold a service up without asking for anything: cut after their time, and bounded in number.

uvicorn waits for a head, a body or a slow reader for as long as they like.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentrt.runtime.serve.options import ConnectionLimits
from latentrt.runtime.serve.web_errors import WebError

logger = logging.getLogger(__name__)
Phase = Literal["head", "body", "rest"]
LEAST_BYTES_S = 1024  # a reader must take so many a second, in the mean over its time


class Connections:
    """The open connections of a service. cut: how many were ended, by what they made it wait for

    Where there is no room for another, the oldest one makes room that no request is answered on; where all are
    answered on, the new one is cut. So half-open connections never keep anybody out.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.cut: Counter[str] = Counter()
        self._open: dict[Connection, str] = {}  # with their addresses, the oldest first
        self._each: Counter[str] = Counter()

    @property
    def protocol(self) -> Callable[..., asyncio.Protocol]:
        """Return what makes uvicorn's protocol of a new connection."""
        return partial(Connection, shared=self)

    @property
    def count(self) -> int:
        """Return how many are open."""
        return len(self._open)

    def enter(self, new: Connection, address: str) -> None:
        """Count a connection in, and cut one where that is one too many."""
        self._open[new] = address
        self._each[address] += 1
        if self._each[address] > self.limits.per_address:
            self._make_room([one for one, its in self._open.items() if its == address])
        elif len(self._open) > self.limits.connections:
            self._make_room(list(self._open))

    def _make_room(self, among: list[Connection]) -> None:
        # A new connection is the last of them, and waits for its head as they all do.
        idle = next((one for one in among if one.waits), None)
        (idle or next((one for one in among if one.phase == "body"), among[-1])).end("room")

    def leave(self, gone: Connection) -> None:
        """Count a connection out."""
        address = self._open.pop(gone, None)
        if address is not None:
            self._each[address] -= 1
            if not self._each[address]:
                del self._each[address]


class Connection(H11Protocol):
    """A connection with deadlines: for a request's head, for its body, and for a reader of its answer.

    phase: what is waited for, None while a request is answered or none has begun
    """

    def __init__(self, *args: Any, shared: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared, self._limits = shared, shared.limits
        self.phase: Phase | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        """Tell whether no request is being sent or answered on it."""
        return self.phase != "body" and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._expect("head")
        self._shared.enter(self, self.client[0] if self.client else "")

    def connection_lost(self, exc: Exception | None) -> None:
        """End all waiting."""
        self._expect(None)
        self.resume_writing()
        self._shared.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, and see what there is to wait for now."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Wait for the rest of a body that was refused, or for another request."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._expect("rest")
        elif self.conn.their_state is not h11.IDLE:
            self._look()
        else:
            self._expect(None)  # uvicorn's own deadline for the next request runs

    def pause_writing(self) -> None:
        """Give the reader time for what has been written."""
        super().pause_writing()
        if self._reading is None:
            self._look_at_reader(self.transport.get_write_buffer_size() + LEAST_BYTES_S * self._limits.reader_s)

    def resume_writing(self) -> None:
        """End waiting for the reader."""
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _look_at_reader(self, before: float) -> None:
        left = self.transport.get_write_buffer_size()
        if left > before - LEAST_BYTES_S * self._limits.reader_s:
            self.end("reader")
        else:
            self._reading = self.loop.call_later(self._limits.reader_s, self._look_at_reader, left)

    def _look(self) -> None:
        state = self.conn.their_state
        if state is h11.IDLE:
            self._expect("head")
        elif state is h11.SEND_BODY:
            self._expect("body")
        else:
            self._expect(None)

    def _expect(self, phase: Phase | None) -> None:
        """Wait for something from now on; what is waited for already keeps its deadline."""
        if phase == self.phase:
            return
        self.phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if phase is not None:
            seconds = {"head": self._limits.head_s, "body": self._limits.body_s, "rest": self._limits.rest_s}[phase]
            self._deadline = self.loop.call_later(seconds, self.end, phase)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP with OpenAI's error object, and end. An answer that has begun is cut."""
        if self.conn.our_state is not h11.IDLE:
            self.transport.abort()
            return
        error = WebError("this is not an HTTP request", code="invalid_http")
        body = json.dumps(error.body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        parts = (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
        self.transport.close()

    def end(self, reason: str) -> None:
        """Cut the connection: nobody waits for it any more."""
        self._shared.cut[reason] += 1
        self._shared.leave(self)  # now: it is told of the loss later, and until then others would find it again
        logger.debug("cut a connection of %s: %s", self.client[0] if self.client else "a client", reason)
        self.transport.abort()
