"""What is known of the request that is being answered, wherever in the service: its id, its models, its pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import msgspec


class Note(msgspec.Struct, eq=False, kw_only=True):
    """What a log or a trace says of a request.

    began: on the clock of time.perf_counter; first_look_s: from then to the first look at a picture, None before
    models: that it named; pictures: that were taken on for it; prompts: None where logs may not hold them
    span: of OpenTelemetry; None where nothing is traced
    ends: what to do once it is answered
    """

    request_id: str
    began: float
    first_look_s: float | None = None
    models: list[str] = msgspec.field(default_factory=list)
    pictures: int = 0
    prompts: list[str] | None = None
    span: Any = None
    ends: list[Callable[[], None]] = msgspec.field(default_factory=list)


CURRENT: ContextVar[Note | None] = ContextVar("latentrt_note", default=None)


def note_prompt(prompt: str | Sequence[str]) -> None:
    """Note what the request that is being answered wants drawn, where logs may hold that."""
    note = CURRENT.get()
    if note is not None and note.prompts is not None:
        note.prompts += [prompt] if isinstance(prompt, str) else prompt


def note_look() -> None:
    """Note that the request that is being answered has a picture to look at, if that is the first."""
    note = CURRENT.get()
    if note is not None and note.first_look_s is None:
        note.first_look_s = time.perf_counter() - note.began
