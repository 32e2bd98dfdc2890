"""One machine, simulated event by event: a batcher's loop, or a pipeline that draws one batch after the other.

Who shares a stage is decided by the batcher's own function (`sharing`), by the times that it would know. All of it is
arithmetic on moments: nothing is drawn and no clock is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import msgspec

from latentrt.engines.spec import Document
from latentrt.runtime.batching.stage_times import Owed, StageTimes, rank, sharing

NEVER = math.inf
Points = tuple[tuple[int, float], ...]
"""(how many, seconds): measured ones; between them and beyond lies what `StageTimes` makes of them"""


class Times(Document, frozen=True, kw_only=True):
    """What the simulator is given: how long a bundle's parts take on a machine, each by itself.

    stage_s: (model rows, seconds) of a denoiser's stage; encode_s, decode_s: (pictures, seconds)
    call_s: (pictures, seconds) of a call beside those; between_s: what a batcher takes between two stages
    shared: how much of an encoding or decoding beside the loop the loop is delayed by: 0 to 1 where it runs on the same
        cores, more where the two hinder each other; None where stages, encodings and decodings take turns at the cores,
        so that a stage waits for one of each at the most, all of its time
    """

    stage_s: Points
    encode_s: Points
    decode_s: Points
    call_s: Points
    between_s: float
    shared: float | None


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
        self.shared, self.most = times.shared, most

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


class _Picture(msgspec.Struct, eq=False):
    """One that is drawn or waits. left: stages; owed: as it was at first; ready_at: when it can share a stage"""

    owed: Owed
    left: int
    ready_at: float = NEVER
    encoding: bool = False
    begun: bool = False

    @property
    def number(self) -> int:
        return self.owed.urgency[1]

    def owes(self) -> Owed:
        return msgspec.structs.replace(self.owed, stages=self.left, begun=self.begun)


class Beside(Protocol):
    """An encoder and a decoder beside a loop. free_at: when they look for more, NEVER if there is nothing"""

    free_at: float

    def encode(self, picture: _Picture) -> None:
        """Have a picture encoded: `ready_at` is set once that has begun."""

    def decode(self, number: int) -> None:
        """Have a picture decoded."""

    def go(self, at: float, *, busy: bool) -> tuple[float, list[tuple[int, float]]]:
        """Begin what can be begun; return the seconds that a stage is delayed by, and moments of delivery."""


class Threads:
    """Both go on beside the stages, whose cores they share in part."""

    def __init__(self, costs: Costs, shared: float) -> None:
        self._costs, self._shared = costs, shared
        self._encode: list[_Picture] = []
        self._decode: list[int] = []
        self._encoder_free = self._decoder_free = 0.0
        self.free_at = NEVER

    def encode(self, picture: _Picture) -> None:
        self._encode.append(picture)

    def decode(self, number: int) -> None:
        self._decode.append(number)

    def go(self, at: float, *, busy: bool) -> tuple[float, list[tuple[int, float]]]:
        """Begin all: what waits for its thread has its time there."""
        hindered, (encode, decode) = busy * self._shared, (self._costs.encode[1], self._costs.decode[1])
        delay = hindered * (encode * len(self._encode) + decode * len(self._decode))
        for picture in self._encode:
            picture.ready_at = self._encoder_free = max(at, self._encoder_free) + encode * (1 + hindered)
        delivered = []
        for number in self._decode:
            self._decoder_free = max(at, self._decoder_free) + decode * (1 + hindered)
            delivered.append((number, self._decoder_free))
        self._encode, self._decode = [], []
        return delay, delivered


class InTurn:
    """Stages, encodings and decodings run one at a time: before each stage one of each at the most."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._encode: list[_Picture] = []
        self._decode: list[int] = []
        self._until = 0.0
        self.free_at = NEVER

    def encode(self, picture: _Picture) -> None:
        self._encode.append(picture)

    def decode(self, number: int) -> None:
        self._decode.append(number)

    def go(self, at: float, *, busy: bool) -> tuple[float, list[tuple[int, float]]]:
        """Begin one of each, unless one is under way: then a stage waits for its end."""
        delivered = []
        if self._until <= at:
            self._until = at
            if self._decode:
                self._until += self._costs.decode[1]
                delivered.append((self._decode.pop(0), self._until))
            if self._encode:
                self._until += self._costs.encode[1]
                self._encode.pop(0).ready_at = self._until
        self.free_at = self._until if self._encode or self._decode else NEVER
        return self._until - at, delivered


class SharedReplica:
    """A batcher's loop: pictures join, pause and leave between stages; text and pixels are done beside it.

    multiple: of a picture's own time, by which it is promised; None for no promise
    """

    def __init__(self, costs: Costs, *, waiting: int, multiple: float | None) -> None:
        self._costs, self._room, self._multiple = costs, waiting, multiple
        self._beside: Beside = InTurn(costs) if costs.shared is None else Threads(costs, costs.shared)
        self._line: list[_Picture] = []
        self._drawn: list[_Picture] = []
        self._leaving: list[tuple[int, float]] = []
        self._rows = 0
        self._boundary, self._stages, self._delay = 0.0, 0, 0.0  # the last one, stages until the next look, its delay
        self.next_at = NEVER

    def arrive(self, ask: Ask, at: float) -> bool:
        """Take a picture. It is seen at the next boundary, or at once where nothing is drawn."""
        if sum(not one.begun for one in self._line) >= self._room:
            return False
        costs = self._costs
        own = ask.stages * costs.known[ask.rows] + costs.decode[1]
        due = None if self._multiple is None else at + self._multiple * own
        urgency = (NEVER if due is None else due, ask.number)
        owed = Owed(stages=ask.stages, rows=ask.rows, after_s=costs.decode[1], due=due, urgency=urgency)
        self._line.append(_Picture(owed, ask.stages))
        if not self._drawn:
            self._look(at)
        elif self._stages > 1:
            stage = costs.stage[self._rows]
            passed = max(0, math.floor((at - self._boundary - self._delay) / stage)) + 1
            if passed < self._stages:
                self._stages = passed
                self.next_at = self._boundary + self._delay + passed * stage
        return True

    def _look(self, at: float) -> None:
        """Have encoded what may join soon; begin the next stage, or wait for what can be drawn."""
        self._prepare(at)
        self._join(at)
        self._delay, delivered = self._beside.go(at, busy=bool(self._drawn))
        self._leaving += delivered
        self._boundary = at
        if self._drawn:
            looks = self._line or self._beside.free_at < NEVER
            self._stages = 1 if looks else min(one.left for one in self._drawn)
            self.next_at = at + self._delay + self._stages * self._costs.stage[self._rows]
        else:
            self.next_at = min([self._beside.free_at, *(one.ready_at for one in self._line)])

    def _prepare(self, at: float) -> None:
        if all(one.encoding for one in self._line):
            return
        known, new = self._costs.known, [one for one in self._line if not one.begun]
        new.sort(key=lambda one: rank(one.owed, known[one.owed.rows], now=at))
        for one in new[: 2 * self._costs.most]:
            if not one.encoding:
                one.encoding = True
                self._beside.encode(one)

    def happen(self) -> list[tuple[int, float]]:
        """Come to a boundary: those that are done leave, others join, or make way for more urgent ones."""
        at = self.next_at
        for one in self._drawn:
            one.left -= self._stages
            if one.left <= 0:
                self._beside.decode(one.number)
        self._drawn = [one for one in self._drawn if one.left > 0]
        self._rows = sum(one.owed.rows for one in self._drawn)
        self._look(at)
        leaving, self._leaving = self._leaving, []
        return leaving

    def _join(self, at: float) -> None:
        ready = [one for one in self._line if one.ready_at <= at]
        if not ready:
            return
        pictures, costs = [*self._drawn, *ready], self._costs
        drawn, waiting = ([one.owes() for one in some] for some in (self._drawn, ready))
        chosen = sharing(drawn, waiting, costs.known.__getitem__, now=at, most=costs.most)
        self._drawn = [pictures[place] for place in chosen]
        for one in self._drawn:
            one.begun = True
        self._line = [one for one in self._line if one.ready_at > at] + [
            one for place, one in enumerate(pictures) if place not in chosen
        ]
        self._rows = sum(one.owed.rows for one in self._drawn)


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
