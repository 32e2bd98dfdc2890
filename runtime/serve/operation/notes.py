"""What is known of the request that is being answered, wherever in the service: its id, its models, its pictures."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import msgspec


class Note(msgspec.Struct, eq=False, kw_only=True):
    """What a log or a trace says of a request.

    began: on the clock of time.perf_counter; first_look_s: from then to the first look at a picture, None before
    models: that it named; pictures: that were taken on for it; prompts: only where logs may hold them
    span: of OpenTelemetry; None where nothing is traced
    ends: what to do once it is answered
    """

    request_id: str
    began: float
    first_look_s: float | None = None
    models: list[str] = msgspec.field(default_factory=list)
    pictures: int = 0
    prompts: list[str] = msgspec.field(default_factory=list)
    span: Any = None
    ends: list[Callable[[], None]] = msgspec.field(default_factory=list)


CURRENT: ContextVar[Note | None] = ContextVar("latentrt_note", default=None)
