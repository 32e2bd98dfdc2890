"""The tables of what peers.py measured: one for each result, and those of docs/figures.md.

python benchmarks/peer_report.py      # writes docs/figures.md from benchmarks/results/peers-*.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from page_tables import place
from peer_tables import PEERS, ROOT

from latentrt.runtime.bench.report.text import milliseconds

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures.md"
MIB = 1 << 20
SAME = 99.0  # decibels, of pictures that do not differ
NOT_RUN = "–"
Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A column of the page. memory: what the page's table of memory calls the model; None where it is not in it"""

    result: str
    title: str
    memory: str | None = None


RUNS = (
    Run(result="demo-batch1", title="demo, 128x128, 8 steps", memory="demo"),
    Run(
        result="middle-batch1",
        title="`middle`, 256x256, 8 steps",
        memory="`middle`: SD 1.5's layout at a fifth of its width",
    ),
    Run(result="middle-batch4", title="`middle`, four pictures, 4 steps"),
    Run(result="sd15-batch1", title="SD 1.5, full size, 256x256, 2 steps", memory="SD 1.5, full size"),
    Run(
        result="turbo-batch1",
        title="SD-Turbo's shape, 512x512, 1 step, tiny decoder",
        memory="SD-Turbo's shape with a tiny decoder, full size",
    ),
)


def main() -> None:
    page = PAGE.read_text()
    for name, table in tables().items():
        page = place(page, name, table)
    PAGE.write_text(page)


def tables() -> dict[str, str]:
    """Return the page's tables by the names of their places."""
    found = [
        (run, json.loads(file.read_text())) for run in RUNS if (file := RESULTS / f"peers-{run.result}.json").is_file()
    ]
    return {
        "peers' speed": f"{_by_run(found, speed_cell)}\n\n{how([result for _, result in found])}",
        "peers' pictures": _by_run(found, picture_cell, leave_out=("latentrt", "plain")),
        "peers' memory": _by_run(found, memory_cell),
        "peers' installations": installations([result for _, result in found]),
        "peers left out": left_out(found),
        "memory": own_memory(found),
    }


def _by_run(
    found: Sequence[tuple[Run, Result]], cell: Callable[[Result, str], str], *, leave_out: Sequence[str] = ()
) -> str:
    """Return a table with a row for each peer and a column for each run. It leaves out rows without a figure."""
    names = [name for name in PEERS if name not in leave_out]
    rows = [[PEERS[name].title, PEERS[name].precision, *(cell(one, name) for _, one in found)] for name in names]
    head = ["", "computes in", *(run.title for run, _ in found)]
    return markdown(head, [row for row in rows if any(each != NOT_RUN for each in row[2:])])


def speed_cell(result: Result, name: str) -> str:
    """Return times ours, of a batch or of its steps; bold where the peer is faster, and no interval has 1 in it."""
    if name not in result["peers"]:
        return "cannot" if name in result["missing"] else NOT_RUN
    one = result["peers"][name]
    if name == "latentrt":
        return "1.00"
    ratio = one["batch_ratio"] or one["step_ratio"]
    if ratio is None:
        return NOT_RUN
    said = f"{_times(ratio)}{'' if one['batch_ratio'] else ', steps alone'}"
    if PEERS[name].precision != "fp32":
        said += f"; {picture_cell(result, name)} dB"
    return f"**{said}**" if (ratio["high"] or ratio["estimate"]) < 1 else said


def picture_cell(result: Result, name: str) -> str:
    """Return the decibels of a peer's picture against ours."""
    found = result["peers"].get(name, {}).get("decibels")
    return NOT_RUN if found is None else _decibels(found)


def memory_cell(result: Result, name: str) -> str:
    """Return the most memory that a peer had, in MiB."""
    found = result["peers"].get(name, {}).get("peak_rss_bytes")
    return NOT_RUN if found is None else f"{found / MIB:.0f}"


def how(results: Sequence[Result]) -> str:
    """Return each run's command, with the machine and the day."""
    told = []
    for one in results:
        machine, day = one["machine"], one["created"].partition("T")[0]
        told.append(f"- `{one['command']}`: {machine['processor']}, {machine['cores']} cores, {day}")
    return "\n".join(["The commands, each with its machine and day. A ratio is of one run on one machine:", "", *told])


def installations(results: Sequence[Result]) -> str:
    """Return megabytes and seconds of import of each peer, from the last run that timed it."""
    last: dict[str, Result] = {}
    for result in results:
        for name in result["peers"]:
            if name not in last or result["installs"][name]["import_s"] is not None:
                last[name] = result["installs"][name]
    rows = [
        [PEERS[name].title, f"{last[name]['install_bytes'] / 1e6:.0f}", _seconds(last[name]["import_s"])]
        for name in PEERS
        if name in last
    ]
    return markdown(["", "installs MB", "imports s"], rows)


def left_out(found: Sequence[tuple[Run, Result]]) -> str:
    """Return a line for each peer that could not run a model, with its own last words."""
    lines = [
        f"- {PEERS[name].title}, {run.title}: `{why.replace('`', '')}`"
        for run, result in found
        for name, why in result["missing"].items()
    ]
    return "\n".join(lines) or "Every library that was asked ran."


def own_memory(found: Sequence[tuple[Run, Result]]) -> str:
    """Return our own most memory, by model."""
    rows = [
        [run.memory, f"{result['job']['width']}x{result['job']['height']}", memory_cell(result, "latentrt")]
        for run, result in found
        if run.memory is not None
    ]
    return markdown(["model", "size", "peak MiB"], rows)


def format_table(document: Result) -> str:
    """Return one result as Markdown: a row for each peer, those left out too."""
    head = ["", "computes in", "batch ms", "times ours", "step ms", "times ours", "picture, dB", "peak MiB"]
    head += ["installs MB", "imports s"]
    rows = []
    for name, one in document["peers"].items():
        cells = [PEERS[name].title, one["precision"]]
        for kind in ("batch", "step"):
            cells += _cells(one[kind], one[f"{kind}_ratio"])
        installs = document["installs"][name]
        cells.append("" if one["decibels"] is None else _decibels(one["decibels"]))
        cells += [memory_cell(document, name), f"{installs['install_bytes'] / 1e6:.0f}", _seconds(installs["import_s"])]
        rows.append(cells)
    for name, why in document["missing"].items():
        rows.append([PEERS[name].title, f"left out: {why}".replace("|", "/"), *[""] * (len(head) - 2)])
    return markdown(head, rows) + "\n"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows))


def _cells(figures: Result | None, ratio: Result | None) -> list[str]:
    return [
        "" if figures is None else milliseconds(figures["summary"]["p50"]),
        "" if ratio is None else _times(ratio),
    ]


def _times(ratio: Result) -> str:
    between = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{ratio['estimate']:.2f}{between}"


def _decibels(found: float) -> str:
    return "the same" if found >= SAME else f"{found:.1f}"


def _seconds(found: float | None) -> str:
    return "" if found is None else f"{found:.2f}"


if __name__ == "__main__":
    main()
