"""What a batcher tells whoever measures it: events of pictures, of stages and of the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

logger = logging.getLogger(__name__)
When = Literal["waiting", "drawing", "decoding"]
"""how far a picture had come"""
Reason = Literal["full", "draining", "closed", "lost"]
"""the line is full; no further requests are taken; the batcher is closed; the device is lost"""
Promise = Literal["met", "missed", "none"]
"""what was made of the moment that a picture was promised for, by its deadline or the batcher's `slo`"""


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """A picture was taken. picture: its number, from 1 up; waiting: how many wait now"""

    picture: int
    waiting: int


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A request was not taken, though nothing is wrong with it. pictures: that it asked for"""

    reason: Reason
    pictures: int


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A picture shares stages from now on, for the first time. wait_s: since it was submitted"""

    picture: int
    wait_s: float


class StageDone(msgspec.Struct, frozen=True, kw_only=True):
    """A stage of the pictures that are drawn together.

    used: model rows with a weight; padded: rows that were computed beside them, since engines are compiled for certain
    numbers of rows; capacity: rows if every slot had a picture with all groups of them
    seconds: as measured where the engines run
    """

    pictures: int
    used: int
    padded: int
    capacity: int
    seconds: float


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """A picture was answered.

    seconds: by part, those of its Result: wait, encode, denoise, decode, total
    """

    picture: int
    promise: Promise
    seconds: Mapping[str, float]


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    """Nobody waits for a picture any more. expired: its deadline passed; else it was cancelled"""

    picture: int
    when: When
    expired: bool


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """A picture was answered with an error."""

    picture: int
    when: When
    error: BaseException


class WeightsChanged(msgspec.Struct, frozen=True, kw_only=True):
    """The engines compute with the weights of another group. seconds: what it took"""

    seconds: float


Event = Admitted | Refused | Started | StageDone | Delivered | Cancelled | Failed | WeightsChanged
Observer = Callable[[Event], None]
"""called on the thread of the event, maybe on several at once: it must be quick, and safe to use from threads"""


class Telling:
    """Tells an observer, which cannot do any harm: what it raises is logged, the first time."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self._broken = False

    def __call__(self, event: Event) -> None:
        """Tell of one event."""
        if self._observer is None:
            return
        try:
            self._observer(event)
        except Exception:
            if not self._broken:
                logger.exception("the observer of a batcher failed at %s; more of this is not logged", event)
            self._broken = True
