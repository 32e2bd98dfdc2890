"""A search with atheris (`pip install atheris`) for inputs that a reader fails on: coverage leads it to new branches.

`python -m benchmarks.torture.reading.search "engine record" /tmp/work -runs=1000000 -seed=1`: the options are
libFuzzer's. Its corpus stays in the folder, so that the next run goes on from there.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["latentrt"]):
    from benchmarks.torture.reading.mutate import mutate
    from benchmarks.torture.reading.reads import State, attempt, kept_name, note
    from benchmarks.torture.reading.targets import TARGETS
    from benchmarks.torture.sources import sources

OPTIONS = ("-max_len=65536", "-timeout=60", "-rss_limit_mb=4096")


def search(name: str, work: Path, further: Sequence[str]) -> None:
    """Search for inputs of one reader; what is found is kept, and the search goes on."""
    folder = work / "reads" / name.replace(" ", "-")
    corpus, state = folder / "corpus", State(seed=0)
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["latentrt"]):
        target = TARGETS[name](sources(work / "sources"), folder)
    for data in target.seeds:
        (corpus / kept_name(name, data)).write_bytes(data)

    def once(data: bytes) -> None:
        state.executions += 1
        _, wrong = attempt(target, data)
        known = len(state.found)
        if wrong is not None:
            note(state, name, state.executions, wrong, data)
        if len(state.found) > known:
            print(json.dumps([state.found[-1].what, state.found[-1].file]), file=sys.stderr)

    def change(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        own = chance.random() < 0.5
        return mutate(data, chance, target.kind)[:most] if own else bytes(atheris.Mutate(data, most))

    atheris.Setup([sys.argv[0], *OPTIONS, *further, str(corpus)], once, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    search(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
