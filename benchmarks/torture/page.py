"""`python -m benchmarks.torture.page`: the tables of docs/reliability.md, from benchmarks/results/torture-*.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.page_tables import place

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "reliability.md"
SOAK_COLUMNS = (
    "asked",
    "threads",
    "right pictures",
    "of each thread",
    "memory, MiB an hour",
    "drift, MiB",
    "swing, MiB",
    "handles an hour",
    "median wait, s",
    "longest",
)
SOAK_HEAD = f"| {' | '.join(SOAK_COLUMNS)} |\n|{'---|' * len(SOAK_COLUMNS)}\n"
HEAD = "| part | what was done | found | run |\n|---|---|---|---|\n"


def done(result: Mapping[str, Any]) -> str:
    """Return what a part did, in figures."""
    counts = result["counts"]
    words = {
        "writes": "{tried:,} of {distinct:,} calls failed once: {refused:,} refusals, {passed:,} that did their work",
        "kills": "{killed:,} commands killed alone, {killed_of_two:,} of two at once; {finished:,} runs after them",
        "reads": "{executions:,} inputs to {readers} readers, at least {least:,} to each; {read:,} of them read",
        "files": "{tried:,} alterations of {families}: {refused:,} refused, {harmless:,} harmless",
        "devices": "{tried:,} of {ways:,} failures of {calls:,} calls",
        "process": "{tried:,} of {programs:,} programs",
        "soak": "{right:,} pictures, each the right one, in {modes}; {others:,} refused, cancelled or over their time",
    }[result["part"]]
    further = {
        "readers": len(result.get("targets", ())),
        "least": min((target["executions"] for target in result.get("targets", {}).values()), default=0),
        "families": ", ".join(result.get("families", ())),
        "modes": ", ".join(f"{mode['mode']} ({mode['threads']})" for mode in result.get("modes", ())),
        "others": sum(counts.values()) - counts.get("right", 0),
    }
    return words.format(**counts, **further)


def duration(result: Mapping[str, Any]) -> str:
    """Return how long a part took: all runs of one that goes on together, or that there were several."""
    if "targets" in result:
        return f", {sum(target['seconds'] for target in result['targets'].values()):.0f} s"
    resumed = result["part"] == "writes" and result["form"] == "long"
    return ", in several runs" if resumed else f", {result['seconds']:.0f} s"


def row(result: Mapping[str, Any]) -> str:
    """Return a result's row."""
    run = f"{result['date']}, seed {result['seed']}, {result['form']}{duration(result)}"
    found = len(result["found"]) or "nothing"
    return f"| `{result['part']}` | {done(result)} | {found} | {run} |\n"


def reports() -> list[dict[str, Any]]:
    """Return the results that are there, by the name of the part."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("torture-*.json"))]


def soak_row(mode: Mapping[str, Any]) -> str:
    """Return the row of one way to ask for long."""
    memory, (fewest, most) = mode["memory_mib"], mode["per_thread"]
    slope = f"{memory['per_hour']:.2f} ({memory['low']:.2f} to {memory['high']:.2f})"
    cells = (
        mode["mode"],
        mode["threads"],
        f"{mode['outcomes']['right']:,}",
        f"{fewest:,} to {most:,}" if fewest != most else f"{fewest:,}",
        slope,
        f"{memory['drift']:.2f}",
        f"{memory['spread']:.2f}",
        f"{mode['handles']['per_hour']:g}",
        f"{mode['median_wait_s']:.3f}",
        f"{mode['longest_wait_s']:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def with_table(page: str) -> str:
    """Return the page with the tables of the results that are there."""
    found = reports()
    modes = [mode for report in found if report["part"] == "soak" for mode in report["modes"]]
    page = place(page, "results", HEAD + "".join(map(row, found)))
    return place(page, "soak", SOAK_HEAD + "".join(map(soak_row, modes)))


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
