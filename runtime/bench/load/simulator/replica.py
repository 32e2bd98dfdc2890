"""One machine, simulated event by event: a batcher's loop, or a pipeline that draws one batch after the other.

Who joins is decided by the batcher's own functions (`may_join`), by the times that it would know. All of it is
arithmetic on moments: nothing is drawn and no clock is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import msgspec

from latentrt.engines.spec import Document
from latentrt.runtime.batching.stage_times import Owed, StageTimes, may_join

NEVER = math.inf
Points = tuple[tuple[int, float], ...]
"""(how many, seconds): measured ones; between them and beyond lies what `StageTimes` makes of them"""


class Times(Document, frozen=True, kw_only=True):
    """What the simulator is given: how long a bundle's parts take on a machine, each by itself.

    stage_s: (model rows, seconds) of a denoiser's stage; encode_s, decode_s: (pictures, seconds)
    call_s: (pictures, seconds) of a call beside those; between_s: what a batcher takes between two stages
    shared: how much of an encoding or decoding beside the loop the loop is delayed by, 0 to 1 where it runs on the same
        cores, more where the two hinder each other
    """

    stage_s: Points
    encode_s: Points
    decode_s: Points
    call_s: Points
    between_s: float
    shared: float


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that is asked for. at: when; stages, rows: model rows in each; like: what may share a static batch"""

    number: int
    at: float
    stages: int
    rows: int
    like: object = None


class Costs:
    """Seconds of everything, looked up by whole numbers. most: pictures together"""

    def __init__(self, times: Times, most: int) -> None:
        rows = range(2 * most + 1)
        self.known = _table(times.stage_s, rows)
        self.stage = [seconds + times.between_s for seconds in self.known]
        self.encode, self.decode, self.call = (
            _table(points, range(most + 1)) for points in (times.encode_s, times.decode_s, times.call_s)
        )
        self.delay_encode, self.delay_decode = times.shared * self.encode[1], times.shared * self.decode[1]
        self.most = most

    def together(self, stages: int, rows: int, pictures: int) -> float:
        """Return the seconds of a call that draws pictures from beginning to end. rows: of each"""
        beside = self.encode[pictures] + self.decode[pictures] + self.call[pictures]
        return stages * self.known[rows * pictures] + beside


def _table(points: Points, places: range) -> list[float]:
    known = StageTimes()
    for place, seconds in points:
        known.note(None, place, seconds)
    return [known.estimate(None, place) or 0.0 for place in places]


class Replica(Protocol):
    """A machine. next_at: when something happens there next, NEVER if nothing does until another request comes"""

    next_at: float

    def arrive(self, ask: Ask, at: float) -> bool:
        """Take a picture at a moment, which is not before the last `next_at` that passed; False: the line is full."""

    def happen(self) -> Sequence[tuple[int, float]]:
        """Do what happens at `next_at`; return the pictures that leave, with the moments of their delivery."""


class _Waiting(msgspec.Struct, eq=False):
    urgency: tuple[float, int]
    owed: Owed
    ready_at: float = NEVER
    encoding: bool = False


class SharedReplica:
    """A batcher's loop: pictures join and leave between stages, within promises; text and pixels are done beside it.

    multiple: of a picture's own time, by which it is promised; None for no promise
    """

    def __init__(self, costs: Costs, *, waiting: int, multiple: float | None) -> None:
        self._costs, self._room, self._multiple = costs, waiting, multiple
        self._line: list[_Waiting] = []
        self._left: list[int] = []  # stages, of each picture that is drawn
        self._drawn: list[_Waiting] = []
        self._rows = 0
        self._boundary, self._stages, self._delay = 0.0, 0, 0.0  # the last one, stages until the next look, its delay
        self._encoder_free = self._decoder_free = 0.0
        self.next_at = NEVER

    def arrive(self, ask: Ask, at: float) -> bool:
        """Take a picture. It is seen at the next boundary, or at once where nothing is drawn."""
        if len(self._line) >= self._room:
            return False
        costs = self._costs
        own = ask.stages * costs.known[ask.rows] + costs.decode[1]
        due = None if self._multiple is None else at + self._multiple * own
        owed = Owed(stages=ask.stages, rows=ask.rows, after_s=costs.decode[1], due=due)
        self._line.append(_Waiting((NEVER if due is None else due, ask.number), owed))
        if not self._drawn:
            self._encode(at)
            self.next_at = min(one.ready_at for one in self._line)
        elif self._stages > 1:
            stage = costs.stage[self._rows]
            passed = max(0, math.floor((at - self._boundary - self._delay) / stage)) + 1
            if passed < self._stages:
                self._stages = passed
                self.next_at = self._boundary + self._delay + passed * stage
        return True

    def _encode(self, at: float) -> None:
        """Begin to encode what may join soon, one after the other."""
        costs = self._costs
        for one in sorted(self._line, key=lambda one: one.urgency)[: 2 * costs.most]:
            if not one.encoding:
                busy = bool(self._drawn)
                begin = max(at, self._encoder_free)
                self._encoder_free = begin + costs.encode[1] + busy * costs.delay_encode
                one.ready_at, one.encoding = self._encoder_free, True
                self._delay += busy * costs.delay_encode

    def happen(self) -> list[tuple[int, float]]:
        """Come to a boundary: those that are done leave, those that may join."""
        at, self._delay = self.next_at, 0.0
        leaving = self._leave(at) if self._drawn else []
        if self._line:
            self._encode(at)
            self._join(at)
        self._boundary = at
        if self._drawn:
            self._stages = 1 if self._line else min(self._left)
            self.next_at = at + self._delay + self._stages * self._costs.stage[self._rows]
        else:
            self.next_at = min((one.ready_at for one in self._line), default=NEVER)
        return leaving

    def _leave(self, at: float) -> list[tuple[int, float]]:
        left = [stages - self._stages for stages in self._left]
        self._left = left
        if min(left) > 0:
            return []
        done = [one for one, stages in zip(self._drawn, left, strict=True) if stages <= 0]
        self._drawn = [one for one, stages in zip(self._drawn, left, strict=True) if stages > 0]
        self._left = [stages for stages in left if stages > 0]
        self._rows = sum(one.owed.rows for one in self._drawn)
        return [(one.urgency[1], self._decode(at)) for one in done]

    def _decode(self, at: float) -> float:
        costs = self._costs
        busy = bool(self._drawn or self._line)
        self._decoder_free = max(at, self._decoder_free) + costs.decode[1] + busy * costs.delay_decode
        self._delay += busy * costs.delay_decode
        return self._decoder_free

    def _join(self, at: float) -> None:
        ready = [one for one in self._line if one.ready_at <= at]
        if not ready:
            return
        ready.sort(key=lambda one: one.urgency)
        drawn = [
            msgspec.structs.replace(one.owed, stages=left) for one, left in zip(self._drawn, self._left, strict=True)
        ]
        costs = self._costs
        count = may_join(drawn, [one.owed for one in ready], costs.known.__getitem__, now=at, most=costs.most)
        for one in ready[:count]:
            self._line.remove(one)
            self._drawn.append(one)
            self._left.append(one.owed.stages)
            self._rows += one.owed.rows


class BatchReplica:
    """A pipeline that draws from beginning to end: the first that waits, and up to `together` of its kind."""

    def __init__(self, costs: Costs, *, waiting: int, together: int) -> None:
        self._costs, self._room, self._together = costs, waiting, together
        self._line: list[Ask] = []
        self._drawn: list[Ask] = []
        self.next_at = NEVER

    def arrive(self, ask: Ask, at: float) -> bool:
        """Take a picture; it is begun at once where nothing is drawn."""
        if len(self._line) >= self._room:
            return False
        self._line.append(ask)
        if not self._drawn:
            self._begin(at)
        return True

    def _begin(self, at: float) -> None:
        first = self._line[0]
        self._drawn = [one for one in self._line if one.like == first.like][: self._together]
        self._line = [one for one in self._line if one not in self._drawn]
        self.next_at = at + self._costs.together(first.stages, first.rows, len(self._drawn))

    def happen(self) -> list[tuple[int, float]]:
        """End a batch, and begin the next."""
        at, done = self.next_at, self._drawn
        self._drawn, self.next_at = [], NEVER
        if self._line:
            self._begin(at)
        return [(one.number, at) for one in done]
