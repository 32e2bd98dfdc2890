"""Every call that writes fails once: what is left, what is said, and whether the next run completes."""

from __future__ import annotations

import collections
import errno
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from benchmarks.torture.sources import Sources, sources
from benchmarks.torture.writing.layer import CACHE, Call, Layer, layer
from benchmarks.torture.writing.scenes import SCENES, Scene

from latentrt.engines.bundle.files import atomic_write

ERRORS = {  # what each kind of call can meet
    "create": (errno.ENOSPC, errno.EACCES, errno.EIO),
    "open": (errno.EIO, errno.EACCES),
    "write": (errno.ENOSPC, errno.EIO),
    "sync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EACCES, errno.EIO, errno.ENOSPC),
    "link": (errno.EIO, errno.ENOSPC),
    "mkdir": (errno.ENOSPC, errno.EACCES, errno.EIO),
}
SAID = re.compile(r"^latentrt: (?!waiting)", flags=re.MULTILINE)
NAMES = tuple(SCENES)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One call that fails. stays: and so do all later ones that take room"""

    number: int
    kind: str
    path: str
    error: int
    stays: bool


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What should not have come of a fault."""

    scene: str
    fault: Fault
    what: str
    said: str


class Tally(msgspec.Struct, kw_only=True):
    """What came of the faults of one scene.

    calls: that the scene makes; distinct: those that can fail in a way of their own
    refused: ended with one sentence; passed: did its work all the same
    """

    seed: int
    calls: int
    distinct: int
    tried: int = 0
    refused: int = 0
    passed: int = 0
    found: list[Found] = []


def distinct(calls: Sequence[Call]) -> list[Call]:
    """Return the calls that can fail in ways of their own: all that write, and the first and last read of a file."""
    reads: dict[str, list[Call]] = collections.defaultdict(list)
    for call in calls:
        if call.kind == "open":
            reads[call.path].append(call)
    kept = {call.number for first, *rest in reads.values() for call in (first, *rest[-1:])}
    return [call for call in calls if call.kind != "open" or call.number in kept]


def faults(calls: Sequence[Call], chance: random.Random) -> list[Fault]:
    """Return one fault for each call, in random order; which error it is, and whether it stays, is drawn."""
    drawn = [
        Fault(
            number=call.number,
            kind=call.kind,
            path=call.path,
            error=chance.choice(ERRORS[call.kind]),
            stays=chance.random() < 0.5,
        )
        for call in calls
    ]
    return chance.sample(drawn, len(drawn))


def names(folder: Path) -> set[str]:
    """Return what lies in a folder, without what differs from run to run.

    Where a bundle's folder takes no engines, they go into the cache, and count as if they were in the bundle. Graphs
    that an export keeps there count for nothing once they are whole.
    """
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    placed = {re.sub(rf"^{CACHE}/engines/[0-9a-f]{{32}}", "b/engines", name) for name in found}
    kept = {name for name in placed if f"/{name}".startswith(f"/{CACHE}") and "/." not in name}
    return {re.sub(r"picture-[\w-]{43}", "picture", name) for name in placed - kept}


def start_anew(scene: Scene, given: Sources, folder: Path) -> None:
    """Put what lies there before into an empty folder. Graphs that an export has kept stay: tracing takes seconds."""
    for path in folder.iterdir():
        place = path / "engines" if path.name == CACHE else path
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
    scene.prepare(given, folder)


class Trial:
    """One scene: what it does undisturbed, and what it does when one of its calls fails."""

    def __init__(self, name: str, given: Sources, there: Layer) -> None:
        self.name, self.scene, self.given, self.there = name, SCENES[name], given, there
        self.words = self.scene.command(given, there.folder)
        if self.scene.torch:  # what it keeps in the cache is there when its calls are counted
            start_anew(self.scene, given, there.folder)
            there.run(*self.words)
        start_anew(self.scene, given, there.folder)
        self.before = self.scene.state(there.folder)
        ended, said, self.calls = there.run(*self.words)
        assert ended.code == 0, said
        self.after, self.names = self.scene.state(there.folder), names(there.folder)

    def check(self, fault: Fault) -> Iterator[tuple[str, str]]:
        """Let one call fail, then run again. Yield what is wrong; first what the command did, `refused` or `passed`."""
        start_anew(self.scene, self.given, self.there.folder)
        ended, said, _ = self.there.run(*self.words, fail=fault.number, error=fault.error, stays=fault.stays)
        yield ("passed" if ended.code == 0 else "refused"), said
        if (wrong := self._wrong_words(ended.code, said)) is not None:
            yield wrong, said
        try:
            state = self.scene.state(self.there.folder)
            allowed = {self.after} if ended.code == 0 else {self.before, self.after, "absent"}
            if state not in allowed and not self.scene.partly:
                yield f"{state} lies there, {self.before} before", said
        except AssertionError as error:
            yield str(error), said
        yield from self._again()

    def _wrong_words(self, code: int, said: str) -> str | None:
        if "Traceback" in said:
            return "a traceback"
        if code not in (0, 2):
            return f"exit code {code}"
        lines = said.strip().splitlines()
        if code == 2 and (len(SAID.findall(said)) != 1 or not lines[-1].startswith("latentrt: ")):
            return "not one sentence"
        return None

    def _again(self) -> Iterator[tuple[str, str]]:
        ended, said, _ = self.there.run(*self.words)
        if ended.code != 0:
            yield f"the rerun ended with {ended.code}", said
            return
        try:
            state = self.scene.state(self.there.folder)
            if state != self.after and not self.scene.adds:
                yield f"after the rerun: {state}, expected {self.after}", said
        except AssertionError as error:
            yield f"after the rerun: {error}", said
        there = names(self.there.folder)
        left = {name for name in there if "/." in f"/{name}"} if self.scene.adds else there - self.names
        if left or self.names - there:
            yield f"after the rerun: left {sorted(left)[:3]}, missing {sorted(self.names - there)[:3]}", said


def begun(anew: Tally, kept: Path) -> Tally:
    """Return how far an earlier run of the same faults has come, or that none of them was tried yet."""
    if not kept.is_file():
        return anew
    before = msgspec.json.decode(kept.read_bytes(), type=Tally)
    return before if (before.seed, before.distinct) == (anew.seed, anew.distinct) else anew


def try_scene(trial: Trial, seed: int, kept: Path, until: float) -> Tally:
    """Let calls of a scene fail, each in a run of its own, until all have or the time is over; one more in any case.

    kept: a file with what came of them so far, for a later run to go on from
    """
    all_of_them = faults(distinct(trial.calls), random.Random(f"{seed} {trial.name}"))
    tally = begun(Tally(seed=seed, calls=len(trial.calls), distinct=len(all_of_them)), kept)
    for fault in all_of_them[tally.tried :]:
        (first, _), *wrong = trial.check(fault)
        tally.tried += 1
        tally.refused += first == "refused"
        tally.passed += first == "passed"
        for what, said in wrong:
            tally.found.append(Found(scene=trial.name, fault=fault, what=what, said=said[-2000:]))
        with atomic_write(kept) as file:
            file.write_bytes(msgspec.json.encode(tally))
        if time.monotonic() > until:
            break
    return tally


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of all faults, in all and by scene."""

    counts: dict[str, int]
    scenes: dict[str, dict[str, int]]
    found: list[Found]


def run(work: Path, *, seed: int, seconds: float, short: bool, only: Sequence[str] = ()) -> Result:
    """Let each call of each scene fail, as far as the time goes: scenes share it, and what one leaves is for the next.

    In the long form a later run of the same seed goes on from here.
    short: without the scenes that export, which load PyTorch
    only: names of scenes, all if empty
    """
    chosen = [name for name, scene in SCENES.items() if (name in only) or not (only or (short and scene.torch))]
    given, left_s = sources(work / "sources"), seconds
    tallies = dict[str, Tally]()
    with layer(work, with_torch=any(SCENES[name].torch for name in chosen)) as there:
        for name in sorted(chosen, key=lambda name: SCENES[name].torch):
            trial = Trial(name, given, there)
            start, share_s = time.monotonic(), left_s / (len(chosen) - len(tallies))
            kept = work / "writes" / f"{name.replace(' ', '-')}.json"
            if short:
                kept.unlink(missing_ok=True)
            tallies[name] = try_scene(trial, seed, kept, start + share_s)
            left_s = max(0.0, left_s - (time.monotonic() - start))
    counted = ("calls", "distinct", "tried", "refused", "passed")
    scenes = {name: {what: getattr(tally, what) for what in counted} for name, tally in tallies.items()}
    return Result(
        counts={what: sum(scene[what] for scene in scenes.values()) for what in counted},
        scenes=scenes,
        found=[one for tally in tallies.values() for one in tally.found],
    )
