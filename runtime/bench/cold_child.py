"""Run in a fresh process by `cold.py`: import, load, draw twice, and print when each was done."""

import time

STARTED = time.monotonic()  # the parent reads the same clock: it counts from the machine's start

import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    """Take the bundle and the settings as JSON in the first argument; print marks and memory as JSON."""
    asked = json.loads(sys.argv[1])
    from latentrt.runtime.pipeline import Pipeline

    marks, memory = [STARTED, time.monotonic()], []
    from latentrt.runtime.bench.meters import peak_rss

    with Pipeline.load(asked["bundle"], asked["backend"], threads=asked["threads"], device=asked["device"]) as pipe:
        marks.append(time.monotonic())
        memory.append(peak_rss())
        for _ in range(2):
            _draw(pipe, asked)
            marks.append(time.monotonic())
    memory.append(peak_rss())
    sys.stdout.write(json.dumps({"marks": marks, "memory": memory}) + "\n")


def _draw(pipe: Any, asked: dict[str, Any]) -> None:
    pipe(
        asked["prompt"],
        n=asked["batch"],
        steps=asked["steps"],
        sampler=asked["sampler"],
        guidance=asked["guidance"],
        size=(asked["width"], asked["height"]),
        seed=0,
    )


if __name__ == "__main__":
    main()
