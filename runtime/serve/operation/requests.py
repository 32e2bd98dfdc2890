"""What surrounds every request: its id, its line in the log, its time."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentrt.runtime.serve.operation.metrics import Metrics
from latentrt.runtime.serve.operation.notes import CURRENT, Note

if TYPE_CHECKING:
    from latentrt.runtime.serve.operation.tracing import Tracing

logger = logging.getLogger(__name__)
NOBODY = 499  # of the client that went away before its answer began
QUIET = ("/healthz", "/readyz", "/metrics")  # asked for every few seconds: in the log only where they fail


class Requests:
    """Gives every request an id, a note for whoever works on it, a line in the log and its place in the metrics."""

    def __init__(
        self, app: ASGIApp, *, routes: Sequence[BaseRoute], metrics: Metrics, tracing: Tracing | None, prompts: bool
    ) -> None:
        self._prompts = prompts
        self._app, self._routes, self._metrics, self._tracing = app, routes, metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = NOBODY
        number = scope.setdefault("state", {}).setdefault("request_id", f"req_{secrets.token_hex(12)}")
        note = Note(request_id=number, began=time.perf_counter())  # an application around this one may have given it
        note.prompts = [] if self._prompts else None
        if self._tracing is not None:
            note.span = self._tracing.begin(scope["method"], Headers(scope=scope), note.request_id)

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = note.request_id
            await send(message)

        token = CURRENT.set(note)
        try:
            await self._app(scope, receive, numbered)
        finally:
            CURRENT.reset(token)
            for end in note.ends:
                end()
            self._tell(scope, note, status)

    def _tell(self, scope: Scope, note: Note, status: int) -> None:
        seconds = time.perf_counter() - note.began
        route = next((one for one in self._routes if one.matches(scope)[0] is not Match.NONE), None)
        path = getattr(route, "path", "") or "none"
        self._metrics.answered(path, status, seconds)
        if note.first_look_s is not None:
            self._metrics.looked(note.first_look_s)
        if self._tracing is not None:
            self._tracing.end(note.span, scope["method"], path, status)
        if path in QUIET and status < 400:
            return
        client = scope.get("client")
        fields = {
            "request_id": note.request_id,
            "method": scope["method"],
            "route": path,
            "status": status,
            "seconds": round(seconds, 4),
            "models": note.models,
            "pictures": note.pictures,
            "client": client[0] if client else None,
        }
        if note.prompts:
            fields["prompts"] = note.prompts
        logger.info("%s %s %d", scope["method"], path, status, extra={"fields": fields})
