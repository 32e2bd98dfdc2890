"""Our speed beside other libraries': same machine, same weights, same run, as ratios.

    python benchmarks/peers.py demo|middle|sd15|turbo|tiny [--batch 1] [--steps 8] [--size 256x256] [--threads 2]
        [--seconds 300] [--peers latentrt,diffusers,openvino] [--cache .cache/peers] [--output benchmarks/results]
    python benchmarks/peers.py sd15 --prepare       # installs, exports and draws the pictures; measures nothing
    python benchmarks/peer_report.py                # writes the tables of docs/figures.md

Each peer lives in an environment of its own, made once below --cache, and in a process of its own. The peers take
turns in random order; a ratio is the median over the rounds of each round's own ratio, with its 95 % interval. Where
memory does not hold all at once, they take turns in groups, and we in each of them. All draw with Euler, in fp32 where
the table does not say otherwise; the picture of each, from the same noise, is compared with ours. A peer that cannot
be installed, or cannot run the model, is in the table with the reason. Sizes of installation and times of import are
measured too.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from paired import paired_ratio
from peer_install import install, measure_install, say
from peer_models import convert, make_job
from peer_process import Array, Worker, decibels, draw_picture
from peer_report import format_table
from peer_tables import MODELS, PEERS, ROOT, Model, PeerError

from latentrt.runtime.bench.cold import measured
from latentrt.runtime.bench.machine import Watch, describe, now
from latentrt.runtime.bench.rounds import take_turns, warm_up

OURS = "latentrt"
Drawn = dict[str, list[tuple[float | None, float | None]]]  # by peer, by round: seconds of the batch, of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, or a shape of random_checkpoint.py.")
    parser.add_argument("--size", default=None, help="256x256. Default: the checkpoint's own.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, default=None, help="Default: the model's own, 1 for turbo and 8 elsewhere."
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=300.0, help="For the rounds of all peers.")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--imports", type=int, default=5, help="Fresh interpreters for each import time.")
    parser.add_argument("--prepare", action="store_true", help="Install, convert and draw the pictures, and no more.")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "peers")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    names = list(dict.fromkeys([OURS, *arguments.peers.split(",")]))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        parser.error(f"there is no peer '{unknown[0]}'; choose of {', '.join(PEERS)}")
    if arguments.prepare:
        cache = arguments.cache.resolve()
        prepare_all(names, make_job(arguments, cache), cache, arguments.imports)
        return
    document = compare(arguments, names)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"peers-{arguments.model}-batch{arguments.batch}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    file.with_suffix(".md").write_text(document["table"])
    print(f"\n{document['table']}\n{file}")


def compare(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Install, load and measure. Returns the whole result."""
    cache = arguments.cache.resolve()
    job = make_job(arguments, cache)
    watch = Watch()  # a process that ended counts as ours: so from before the first one to after the last one
    prepared = prepare_all(names, job, cache, arguments.imports)
    pictures, missing = prepared.pictures, prepared.missing
    results: dict[str, Any] = {}
    ours = Worker(OURS, job, cache)
    try:
        pictures[OURS] = draw_picture(OURS, job, cache, ours)
        warm_up(ours.seconds, most_seconds=arguments.seconds / 8)
        others = [name for name in names if name not in (OURS, *missing)]
        groups = list(split(others, MODELS.get(arguments.model, Model()).together)) or [[]]
        for group in groups:
            seconds = arguments.seconds / len(groups)
            found = measure_group(group, ours, job, cache, missing, rounds=arguments.rounds, seconds=seconds)
            results |= {name: one for name, one in found.items() if name not in results}
    finally:
        ours.close()
    conditions = watch.conditions()
    for name, one in results.items():
        one["precision"] = PEERS[name].precision
        one["decibels"] = None if name == OURS else compared(pictures.get(OURS), pictures.get(name))
    document = {
        "kind": "latentrt peers",
        "created": now(),
        "command": f"python benchmarks/peers.py {' '.join(sys.argv[1:])}",
        "machine": describe(),
        "conditions": {name: getattr(conditions, name) for name in ("load_before", "others_share", "stolen_share")},
        "job": {key: value for key, value in job.items() if key not in ("checkpoint", "bundle", "cache", "tiny")},
        "model": arguments.model,
        "groups": [[OURS, *group] for group in groups],
        "peers": results,
        "installs": prepared.installs,
        "missing": missing,
    }
    return document | {"table": format_table(document)}


@dataclass(slots=True, kw_only=True)
class Prepared:
    """What there is before the first measurement: pictures, figures of installations, and who cannot and why."""

    pictures: dict[str, Array | None] = field(default_factory=dict)
    installs: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def prepare_all(names: Sequence[str], job: Mapping[str, Any], cache: Path, imports: int) -> Prepared:
    """Install every peer, measure that, convert the model for it and draw its picture."""
    prepared = Prepared()
    once = functools.cache(install)
    for name in names:
        environment, draws = PEERS[name].environment, PEERS[name].draws
        try:
            python = once(environment, cache)
            prepared.installs[name] = measure_install(environment, python, cache, imports)
            for what in PEERS[name].needs:
                convert(what, job, cache)
            if draws is not None:
                once(draws, cache)
            if name != OURS:  # ours is drawn by the code of today, while it is measured
                prepared.pictures[name] = draw_picture(name, job, cache)
        except PeerError as error:
            prepared.missing[name] = str(error)
            say(f"{name}: left out: {error}")
    return prepared


def split(names: Sequence[str], together: int | None) -> Iterator[list[str]]:
    """Yield the names in groups of so many."""
    size = together or max(1, len(names))
    for start in range(0, len(names), size):
        yield list(names[start : start + size])


def measure_group(
    names: Sequence[str],
    ours: Worker,
    job: Mapping[str, Any],
    cache: Path,
    missing: dict[str, str],
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Load peers, let them take turns with us, and end them. Returns their figures, and ours beside them."""
    workers = {OURS: ours}
    try:
        for name in names:
            try:
                workers[name] = Worker(name, job, cache)
                warm_up(workers[name].seconds, most_seconds=seconds / 8)
            except PeerError as error:
                missing[name] = str(error)
                say(f"{name}: left out: {error}")
        drawn = take_rounds(workers, missing, rounds=rounds, seconds=seconds)
    finally:
        for worker in list(workers.values())[1:]:
            worker.close()
    return {name: summarise_peer(name, workers[name], drawn) for name in drawn}


def take_rounds(workers: Mapping[str, Worker], missing: dict[str, str], *, rounds: int, seconds: float) -> Drawn:
    """Let the peers take turns. One that fails on the way is left out of all rounds."""
    start = time.monotonic()
    drawn: Drawn = {name: [] for name in workers if name not in missing}
    for round_, name in take_turns(list(drawn), rounds=rounds, most_seconds=seconds, seed=0):
        if name in missing:
            continue
        try:
            whole, steps = workers[name].draw()
        except PeerError as error:
            missing[name] = f"in round {round_ + 1}: {error}"
            continue
        drawn[name].append((whole, statistics.median(steps) if steps else None))
    say(f"{', '.join(drawn)}: {len(drawn[OURS])} rounds in {time.monotonic() - start:.0f} s")
    return {name: kept for name, kept in drawn.items() if name not in missing}


def summarise_peer(name: str, worker: Worker, drawn: Drawn) -> dict[str, Any]:
    """Return a peer's figures, and its ratios to ours: above 1 it takes longer."""
    figures: dict[str, Any] = {"load_s": worker.load_s, "peak_rss_bytes": worker.peak_rss_bytes}
    for index, kind in enumerate(("batch", "step")):
        theirs, ours = ([one[index] for one in drawn[which]] for which in (name, OURS))
        one = measured([float(value) for value in theirs if value is not None]) if None not in theirs else None
        ratio = paired_ratio(ours, theirs) if None not in (*theirs, *ours) else None  # type: ignore[arg-type]
        figures[kind] = None if one is None else {"summary": _plain(one.summary), "samples": one.samples}
        figures[f"{kind}_ratio"] = None if ratio is None else _plain(ratio)
    return figures


def compared(ours: Array | None, theirs: Array | None) -> float | None:
    """Return the decibels of a peer's picture against ours; None where there is none."""
    return None if ours is None or theirs is None else decibels(ours, theirs)


def _plain(record: Any) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain


if __name__ == "__main__":
    main()
