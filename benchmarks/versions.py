"""Two versions of latentrt on the same bundle, drawing in turn: is a picture slower than it was?

    git worktree add /tmp/before COMMIT
    python benchmarks/versions.py /tmp/before demo/shapes [--rounds 60] [--steps 8] [--threads 1] [--json R.json]

Each version runs in a process of its own, on a copy of the bundle for which it built the CPU's engines itself. In each
round both draw the same request, in an order that is drawn anew; what is said is the median over rounds of the ratio
now / before, of the wall's clock and of the processor's, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from paired import paired_ratio

from latentrt.runtime.bench.machine import describe, now

HERE = Path(__file__).parent.parent
WORKER = """
import json, sys, time
from latentrt import Pipeline, Request
root, steps, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Pipeline.load(root, "cpu", threads=threads, build=True) as pipe:
    print("ready", flush=True)
    for line in sys.stdin:
        request = Request(prompt="a large red circle", steps=steps, guidance=3.0, seed=int(line))
        wall, cpu = time.perf_counter(), time.process_time()
        pixels = pipe.draw(request).pixels
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, int(pixels.sum())]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="A checkout of the version to compare with.")
    parser.add_argument("bundle", type=Path, help="One that both versions can open.")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: start(name, tree, arguments, Path(folder)) for name, tree in trees(arguments.before).items()}
        rounds = [one_round(sides, seed) for seed in range(arguments.rounds + 3)][3:]
        for side in sides.values():
            side.communicate()
    found = {"machine": describe(), "created": now(), "rounds": len(rounds), "command": sys.argv, **ratios(rounds)}
    for clock in ("wall", "processor"):
        ratio = found[clock]
        print(f"{clock}: now / before {ratio['estimate']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    print(f"the same pictures: {found['same']} of {len(rounds)}")
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")


def trees(before: Path) -> dict[str, Path]:
    return {"before": before, "now": HERE}


def start(name: str, tree: Path, arguments: argparse.Namespace, folder: Path) -> subprocess.Popen[str]:
    """Start a version on its own copy of the bundle, and wait until it is ready."""
    root = folder / name
    shutil.copytree(arguments.bundle, root, ignore=shutil.ignore_patterns("engines"))
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "LATENTRT_CACHE": str(folder / f"{name}-cache")}
    command = [sys.executable, "-c", WORKER, str(root), str(arguments.steps), str(arguments.threads)]
    side = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert side.stdout is not None
    if side.stdout.readline().strip() != "ready":
        sys.exit(f"{name} ({tree}) did not start")
    return side


def one_round(sides: dict[str, subprocess.Popen[str]], seed: int) -> dict[str, list[float]]:
    """Have both draw one seed; return the seconds and the sum of the pixels of each."""
    found = {}
    for name in random.sample(sorted(sides), len(sides)):
        side = sides[name]
        assert side.stdin is not None and side.stdout is not None
        side.stdin.write(f"{seed}\n")
        side.stdin.flush()
        found[name] = json.loads(side.stdout.readline())
    return found


def ratios(rounds: list[dict[str, list[float]]]) -> dict[str, Any]:
    clocks = {
        clock: msgspec.to_builtins(
            paired_ratio([one["before"][i] for one in rounds], [one["now"][i] for one in rounds])
        )
        for i, clock in enumerate(("wall", "processor"))
    }
    return {**clocks, "same": sum(one["before"][2] == one["now"][2] for one in rounds)}


if __name__ == "__main__":
    main()
