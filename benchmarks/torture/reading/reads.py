"""Every reader is given what nobody should write: it reads it, or refuses it in one sentence of the right kind.

Execution number n of a seed is always the same, so that a run goes on where an earlier one stopped. What is found is
kept in `kept/`, and read again by tests/test_torture.py. Where atheris is installed,
`python -m benchmarks.torture.reading.search TARGET WORK` searches with coverage instead, from the same seeds.
"""

from __future__ import annotations

import hashlib
import random
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec
from benchmarks.torture.reading.mutate import mutate
from benchmarks.torture.reading.targets import TARGETS, Target
from benchmarks.torture.sources import sources

KEPT = Path(__file__).parent / "kept"
SLOW_S = 10.0  # of the processor, for one input
ALL = 1_000_000  # executions of each reader in the long form
NAMES = tuple(TARGETS)


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """An input that a reader neither reads nor refuses as it must. file: its name in `kept/`"""

    target: str
    number: int
    what: str
    file: str


class State(msgspec.Struct, kw_only=True):
    """How far a reader has come. read: how many were no error"""

    seed: int
    executions: int = 0
    read: int = 0
    seconds: float = 0.0
    found: list[Found] = []


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of all inputs, by reader."""

    counts: dict[str, int]
    targets: dict[str, State]
    found: list[Found]


def kept_name(target: str, data: bytes) -> str:
    """Return the name under which an input is kept."""
    return f"{target.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"


def attempt(target: Target, data: bytes) -> tuple[bool, str | None]:
    """Give a reader an input. Return whether it read it, and what is wrong, in words that are the same for each bug."""
    start = time.process_time()
    try:
        target.read(data)
        was_read, wrong = True, None
    except target.refusals as error:
        was_read, wrong = False, None
        if "\n" in str(error) or not str(error).isprintable():
            wrong = f"not one line: {type(error).__name__}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        was_read = False
        last = traceback.extract_tb(error.__traceback__)[-1]
        wrong = f"{type(error).__name__} in {Path(last.filename).name}:{last.name}"
    if time.process_time() - start > SLOW_S:
        wrong = "slow"
    return was_read, wrong


def drawn(target: Target, seed: int, number: int) -> bytes:
    """Return the input of an execution."""
    chance = random.Random(f"{seed} {number}")
    return mutate(chance.choice(target.seeds), chance, target.kind)


def note(state: State, name: str, number: int, wrong: str, data: bytes) -> None:
    """Keep an input that shows something new."""
    if wrong in {one.what for one in state.found}:
        return
    KEPT.mkdir(exist_ok=True)
    (KEPT / kept_name(name, data)).write_bytes(data)
    state.found.append(Found(target=name, number=number, what=wrong, file=kept_name(name, data)))


def try_target(name: str, target: Target, state: State, *, until: float, most: int) -> None:
    """Go on with a reader until a time or a number of executions."""
    start = time.monotonic()
    while state.executions < most and time.monotonic() < until:
        data = drawn(target, state.seed, state.executions)
        was_read, wrong = attempt(target, data)
        if wrong is not None:
            note(state, name, state.executions, wrong, data)
        state.executions += 1
        state.read += was_read
    state.seconds = round(state.seconds + time.monotonic() - start, 1)


def run(work: Path, *, seed: int, seconds: float, short: bool, only: Sequence[str] = ()) -> Result:
    """Give every reader inputs; they share the time equally. In the long form a later run goes on from here."""
    chosen = [name for name in TARGETS if name in only or not only]
    given, states = sources(work / "sources"), dict[str, State]()
    for name in chosen:
        folder = work / "reads" / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        kept, state = folder / "state.json", State(seed=seed)
        if kept.is_file() and not short:
            before = msgspec.json.decode(kept.read_bytes(), type=State)
            state = before if before.seed == seed else state
        target = TARGETS[name](given, folder)
        try_target(name, target, state, until=time.monotonic() + seconds / len(chosen), most=ALL)
        if not short:
            kept.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
        states[name] = state
    counts = {what: sum(getattr(state, what) for state in states.values()) for what in ("executions", "read")}
    return Result(counts=counts, targets=states, found=[one for state in states.values() for one in state.found])
