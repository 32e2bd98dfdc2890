"""Cold starts: a fresh process imports, loads and draws, and tells when each was done and how much memory it took."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from latentrt.engines.errors import EngineError
from latentrt.engines.progress import Report as Progress
from latentrt.runtime.bench.result import ColdStart, Measured, Settings
from latentrt.runtime.bench.rounds import take_turns
from latentrt.runtime.bench.samples import summarise

PARTS = ("interpreter", "import", "load", "first", "second")


def cold_starts(
    bundle: str,
    named: Sequence[tuple[str, Settings]],
    *,
    device: int,
    count: int,
    prompt: str,
    seed: int,
    progress: Progress,
) -> tuple[ColdStart, ...]:
    """Start `count` fresh processes for each of the settings, in turns. Raises EngineError if one fails."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name, _ in named}
    memory: dict[str, list[tuple[int, int]]] = {name: [] for name, _ in named}
    turns = take_turns(list(named), rounds=count, most_seconds=float("inf"), seed=seed)
    for done, (_, (name, settings)) in enumerate(turns):
        progress("cold starts", done, count * len(named))
        parts, peaks = start_once(bundle, settings, prompt, device)
        seconds[name].append(parts)
        memory[name].append(peaks)
    progress("cold starts", 1, 1)
    return tuple(
        ColdStart(
            name=name,
            settings=settings,
            seconds={part: measured([one[part] for one in seconds[name]]) for part in (*PARTS, "total")},
            loaded_rss_bytes=measured([float(loaded) for loaded, _ in memory[name]]),
            peak_rss_bytes=measured([float(peak) for _, peak in memory[name]]),
        )
        for name, settings in named
        if seconds[name]
    )


def start_once(bundle: str, settings: Settings, prompt: str, device: int) -> tuple[dict[str, float], tuple[int, int]]:
    """Start one process. Returns its seconds by part, and its resident bytes after loading and at the end."""
    asked = json.dumps({"bundle": bundle, "prompt": prompt, "device": device, **msgspec.structs.asdict(settings)})
    start = time.monotonic()
    command = [sys.executable, "-m", "latentrt.runtime.bench.cold_child", asked]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise EngineError(f"a fresh process could not draw: {last[0]}")
    answer = json.loads(child.stdout.splitlines()[-1])
    marks = [start, *answer["marks"]]
    parts = {part: after - before for part, before, after in zip(PARTS, marks[:-1], marks[1:], strict=True)}
    parts["total"] = marks[-2] - marks[0]
    loaded, peak = answer["memory"]
    return parts, (loaded, peak)


def measured(samples: Sequence[float]) -> Measured:
    """Return samples with their summary."""
    return Measured(summary=summarise(samples), samples=tuple(float(sample) for sample in samples))
