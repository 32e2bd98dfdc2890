"""From `python` to the first picture: two versions of latentrt in fresh processes, in turn.

    git worktree add /tmp/before COMMIT
    python benchmarks/cold_start.py /tmp/before demo/shapes [--rounds 40] [--check size] [--first]

Each version's wheel is installed with its bytecode, as whoever uses it has it, and has a copy of the bundle (hard
links) with the CPU's engines that it builds itself. In each round both start once, in an order that is drawn anew, and
so does an interpreter that only imports NumPy and ONNX Runtime: nothing here can start sooner than that. What is said
is the median over rounds of the ratio now / before, with its 95 % interval, and the medians of the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from import_time import environment, install
from page_tables import place
from paired import paired_ratio

from latentrt.runtime.bench.machine import describe, now

HERE = Path(__file__).parent.parent
LIBRARIES = "numpy, onnxruntime"
RESULTS = HERE / "benchmarks" / "results"
PLACE = "cold starts"  # of the table in docs/figures.md
PARTS = ("interpreter", "import", "load", "picture")
# The clock counts from the machine's start, for all processes.
CHILD = """
import time; marks = [time.monotonic()]
import json, sys
root, check, steps, size, told = sys.argv[1], sys.argv[2], int(sys.argv[3]), *map(json.loads, sys.argv[4:])
from latentrt import Pipeline, Request
marks.append(time.monotonic())
first = Request(prompt="a large red circle", steps=steps, guidance=3.0, seed=1, size=size)
with Pipeline.load(root, "cpu", check=check, **({"first": first} if told else {})) as pipe:
    marks.append(time.monotonic())
    drawn = pipe.draw(first)
    marks.append(time.monotonic())
    print(json.dumps({"marks": marks, "pixels": int(drawn.pixels.sum())}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="A checkout of the version to compare with.")
    parser.add_argument("bundle", type=Path, help="One that both versions can open.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--check", choices=("hash", "size"), default="hash")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=lambda text: [int(part) for part in text.split("x")], help="WIDTHxHEIGHT")
    parser.add_argument("--first", action="store_true", help="Tell this version what it will draw when it loads.")
    parser.add_argument("--json", type=Path, help="A new benchmarks/results/cold-start-NAME.json.")
    parser.add_argument("--page", type=Path, help="docs/figures.md: write the table of all those results into it.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.bundle.resolve().parent, prefix=".cold-") as folder:
        sides = {
            "before": prepare(arguments.before, arguments.bundle, Path(folder) / "before"),
            "now": prepare(HERE, arguments.bundle, Path(folder) / "now"),
        }
        rounds = [one_round(sides, arguments) for _ in range(arguments.rounds + 1)][1:]
    found = {"created": now(), "command": sys.argv[1:], "machine": describe(), "rounds": len(rounds), **figures(rounds)}
    show(found)
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    if arguments.page:
        arguments.page.write_text(place(arguments.page.read_text(), PLACE, cold_table()))


def prepare(tree: Path, bundle: Path, folder: Path) -> Path:
    """Install a version and give it the bundle with engines of its own. Returns the folder: `site` and `bundle`."""
    install(folder / "site", tree)
    shutil.copytree(bundle.resolve(), folder / "bundle", copy_function=os.link)
    command = [sys.executable, "-m", "latentrt", "build", str(folder / "bundle"), "--backend", "cpu", "--json"]
    subprocess.run(command, check=True, env=environment(folder / "site"), stdout=subprocess.DEVNULL)
    return folder


def one_round(sides: dict[str, Path], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Start both versions and the libraries alone, once each. Returns seconds by part, `total` and `processor`."""
    found: dict[str, dict[str, Any]] = {}
    for name in random.sample([*sides, LIBRARIES], len(sides) + 1):
        if name == LIBRARIES:
            code, given, site = f"import {LIBRARIES}", [], None
        else:
            site = sides[name] / "site"
            told = json.dumps(arguments.first and name == "now")
            settings = [arguments.check, str(arguments.steps), json.dumps(arguments.size), told]
            code, given = CHILD, [str(sides[name] / "bundle"), *settings]
        found[name] = start([sys.executable, "-c", code, *given], environment(site))
    return found


def start(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a process to its end. Returns when it was where, from its start on, and the processors' time."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    ended = time.monotonic()
    if status:
        sys.exit(f"`{' '.join(command[:2])} …` failed")
    answer = json.loads(said) if said else {"marks": [], "pixels": None}
    marks = [began, *(answer["marks"] or [ended])]
    parts = {part: after - before for part, before, after in zip(PARTS, marks[:-1], marks[1:], strict=False)}
    return {
        **parts,
        "total": marks[-1] - began,
        "processor": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "pixels": answer["pixels"],
    }


def figures(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    ratios = {
        what: msgspec.to_builtins(
            paired_ratio([one["before"][what] for one in rounds], [one["now"][what] for one in rounds])
        )
        for what in ("total", "processor", "peak_mib")
    }
    medians = {
        name: {
            what: statistics.median(one[name][what] for one in rounds) for what in rounds[0][name] if what != "pixels"
        }
        for name in rounds[0]
    }
    same = sum(one["before"]["pixels"] == one["now"]["pixels"] for one in rounds)
    return {"ratios": ratios, "medians": medians, "same": same, "samples": rounds}


def show(found: dict[str, Any]) -> None:
    for what, ratio in found["ratios"].items():
        low, high = ("–" if end is None else f"{end:.3f}" for end in (ratio["low"], ratio["high"]))
        print(f"{what}: now / before {ratio['estimate']:.3f} ({low} to {high})")
    for name in ("before", "now", LIBRARIES):
        seconds = found["medians"][name]
        parts = ", ".join(f"{part} {1e3 * seconds[part]:.0f}" for part in PARTS if part in seconds)
        print(f"{name}: {1e3 * seconds['total']:.0f} ms ({parts}); {1e3 * seconds['processor']:.0f} ms of processors")
    print(f"the same pictures: {found['same']} of {found['rounds']}")


def cold_table() -> str:
    """Return a row for each result: the seconds of either version by part, and their ratio."""
    head = [
        "bundle",
        *(f"{side}: {what}, ms" for side in ("before", "now") for what in (*PARTS, "all")),
        "now / before",
    ]
    rows = [head, ["---"] * len(head), *(row(path) for path in sorted(RESULTS.glob("cold-start-*.json")))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(result: Path) -> list[str]:
    """Return the cells of a result."""
    found = json.loads(result.read_text())
    medians, ratio = found["medians"], found["ratios"]["total"]
    times = [f"{1e3 * medians[side][part]:.0f}" for side in ("before", "now") for part in (*PARTS, "total")]
    interval = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio["low"] is not None else ""
    return [result.stem.removeprefix("cold-start-"), *times, f"{ratio['estimate']:.2f}{interval}"]


if __name__ == "__main__":
    main()
