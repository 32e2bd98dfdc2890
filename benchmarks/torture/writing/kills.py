"""kill -9 at random moments, of one command and of two on one path: what is left, and whether the next run works."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from benchmarks.torture.sources import sources
from benchmarks.torture.writing.layer import layer
from benchmarks.torture.writing.scenes import SCENES
from benchmarks.torture.writing.writes import Trial, names, start_anew

KILLED = ("build", "build --force", "publish", "export", "export --overwrite")
SHORT = KILLED[:3]  # without PyTorch
MOST = 200  # moments in the long form, alone and of two
NAMES = KILLED
IN_A_ROW = 4  # kills before one run is left to finish


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What should not have been. after_s: the moments at which commands were killed; None for one that was left"""

    scene: str
    after_s: tuple[float | None, ...]
    what: str
    said: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How many commands were killed while they were at work, by scene, and what should not have come of it.

    counts: `killed` alone, `killed_of_two`, `survivors` of two, which must succeed, and `finished` runs after kills
    """

    counts: dict[str, int]
    scenes: dict[str, int]
    found: list[Found]


class Killer:
    """Kills one scene's command again and again."""

    def __init__(self, trial: Trial, chance: random.Random, counts: dict[str, int]) -> None:
        self.trial, self.chance, self.counts = trial, chance, counts
        start_anew(trial.scene, trial.given, trial.there.folder)
        (ended,), _ = trial.there.together((trial.words, None))
        self.lasts_s = ended.seconds
        self.allowed = {trial.before, trial.after, "absent"}

    def row(self) -> Iterator[Found]:
        """Kill a few on what the one before has left, alone and in pairs; then let one finish. Yield what is wrong."""
        start_anew(self.trial.scene, self.trial.given, self.trial.there.folder)
        for _ in range(IN_A_ROW):
            yield from self._kill(self._moment())
            yield from self._kill(self._moment(), self.chance.choice((self._moment(), None)))
        yield from self._finish()

    def _moment(self) -> float:
        return self.chance.uniform(0, 1.05 * self.lasts_s)

    def _kill(self, *moments: float | None) -> Iterator[Found]:
        ended, said = self.trial.there.together(*((self.trial.words, moment) for moment in moments))
        for end, text, moment in zip(ended, said, moments, strict=True):
            if end.code == -9 and moment is not None:
                self.counts["killed" if len(moments) == 1 else "killed_of_two"] += 1
            elif end.code != 0:
                yield self._found(moments, f"exit code {end.code}", text)
            else:
                self.counts["survivors"] += 1
        yield from self._state(moments, self.allowed, said[0])

    def _finish(self) -> Iterator[Found]:
        (ended,), (said,) = self.trial.there.together((self.trial.words, None))
        self.counts["finished"] += 1
        if ended.code != 0:
            yield self._found((None,), f"the run after it ended with {ended.code}", said)
            return
        yield from self._state((None,), {self.trial.after}, said)
        if (left := names(self.trial.there.folder)) != self.trial.names:
            yield self._found((None,), f"left or missing: {sorted(left ^ self.trial.names)[:4]}", said)

    def _state(self, moments: Sequence[float | None], allowed: set[str], said: str) -> Iterator[Found]:
        try:
            state = self.trial.scene.state(self.trial.there.folder)
        except AssertionError as error:
            yield self._found(moments, str(error), said)
            return
        if state not in allowed and not self.trial.scene.partly:
            yield self._found(moments, f"{state} lies there", said)

    def _found(self, moments: Sequence[float | None], what: str, said: str) -> Found:
        return Found(scene=self.trial.name, after_s=tuple(moments), what=what, said=said[-2000:])


def run(work: Path, *, seed: int, seconds: float, short: bool, only: Sequence[str] = ()) -> Result:
    """Kill commands until each was killed often enough, or the time is over.

    short: without those that export; only: names of scenes, all if empty
    """
    chosen = tuple(only) or (SHORT if short else KILLED)
    given = sources(work / "sources")
    counts = dict.fromkeys(("killed", "killed_of_two", "survivors", "finished"), 0)
    scenes, found = dict.fromkeys(chosen, 0), list[Found]()
    with layer(work, with_torch=any(SCENES[name].torch for name in chosen)) as there:
        killers = {name: Killer(Trial(name, given, there), random.Random(f"{seed} {name}"), counts) for name in chosen}
        end = time.monotonic() + seconds
        while time.monotonic() < end and min(scenes.values()) < MOST:
            for name, killer in killers.items():
                before = counts["killed"] + counts["killed_of_two"]
                found += killer.row()
                scenes[name] += counts["killed"] + counts["killed_of_two"] - before
    return Result(counts=counts, scenes=scenes, found=found)
