"""Plots of saved results as PNG, for the README: of `latentrt bench`, peers.py and scaling.py, told by their kind.

    python benchmarks/plots.py benchmarks/results/scaling.json docs/scaling.png

Needs matplotlib: pip install 'latentrt[bench]'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

COLOURS = ("#2a78d6", "#1baf7a", "#eda100", "#008300", "#4a3aa7", "#e34948")
INK, SOFT, RULE = "#1d1d1b", "#66655f", "#e4e3de"
STYLE = {
    "font.size": 9,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}
Result = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    if result.get("kind") not in KINDS:
        parser.error(f"{arguments.result} is no result that can be plotted; expected one of {', '.join(KINDS)}")
    draw(result, arguments.picture)
    print(arguments.picture)


def draw(result: Result, picture: Path) -> None:
    """Plot a result into a PNG file."""
    with pyplot.rc_context(STYLE):
        figure = KINDS[result["kind"]](result)
        figure.text(0.01, 0.01, _footer(result), fontsize=7, color=SOFT)
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture)
        pyplot.close(figure)


def _footer(result: Result) -> str:
    machine, gpu = result["machine"], result["machine"].get("gpu")
    where = f"{gpu['name']}, " if gpu else ""
    return f"{where}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {result['created']}"


def bench(report: Result) -> Figure:
    """Accuracy against time where prompts were scored, else the stages of each variant."""
    scored = [variant for variant in report["variants"] if variant["prompts"]]
    return _accuracy(scored) if len(scored) > 1 else _stages(report["variants"])


def _accuracy(variants: list[Any]) -> Figure:
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    curves: dict[str, list[Any]] = {}
    for variant in sorted(variants, key=_picture_ms):
        curves.setdefault(variant["settings"]["sampler"], []).append(variant)
    for i, (name, points) in enumerate(curves.items()):
        times, scores = [_picture_ms(v) for v in points], [v["prompts"] for v in points]
        shares = [100 * score["share"] for score in scores]
        spans = [[100 * (s["share"] - s["low"]) for s in scores], [100 * (s["high"] - s["share"]) for s in scores]]
        axes.errorbar(times, shares, yerr=spans, marker="o", markersize=4, capsize=2, elinewidth=1, label=name)
        for time, share, variant in zip(times, shares, points, strict=True):
            place = (4, -11 - 8 * i) if share > 20 else (4, 6)
            axes.annotate(
                str(variant["settings"]["steps"]),
                (time, share),
                place,
                textcoords="offset points",
                fontsize=7,
                color=SOFT,
            )
    axes.set(xscale="log", xlabel="milliseconds a picture, median", ylim=(-3, 105))
    axes.set_title("Prompts drawn right, %, with 95 % intervals; the numbers are steps")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("{x:.0f}")
    axes.legend(loc="lower right")
    return _with_footer(figure)


def _picture_ms(variant: Any) -> float:
    return 1e3 * float(variant["seconds"]["end_to_end"]["summary"]["p50"]) / int(variant["settings"]["batch"])


def _stages(variants: list[Any]) -> Figure:
    figure, axes = pyplot.subplots(figsize=(7.5, 1.4 + 0.4 * len(variants)), layout="constrained")
    left = [0.0] * len(variants)
    names = [variant["name"] for variant in variants]
    for stage in ("tokenize", "encode", "denoise", "decode", "encode_image"):
        widths = [1e3 * variant["seconds"][stage]["summary"]["p50"] for variant in variants]
        axes.barh(names, widths, left=left, height=0.6, label=stage.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="milliseconds, median")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    return _with_footer(figure)


def peers(result: Result) -> Figure:
    """How many times our time each peer takes."""
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.42 * len(result["peers"])), layout="constrained")
    rows = [
        (name, one["batch_ratio"] or one["step_ratio"], one["batch_ratio"] is None)
        for name, one in result["peers"].items()
    ]
    for i, (name, ratio, steps_alone) in enumerate(rows):
        colour = COLOURS[0] if name == "latentrt" else COLOURS[2] if ratio["estimate"] < 1 else SOFT
        axes.barh(i, ratio["estimate"], height=0.6, color=colour)
        if ratio["low"] is not None:
            axes.plot([ratio["low"], ratio["high"]], [i, i], color=INK, linewidth=1)
        end = ratio["high"] or ratio["estimate"]
        axes.annotate(f"{ratio['estimate']:.2f}", (end, i), (5, -3), textcoords="offset points", fontsize=8)
        rows[i] = (f"{name} (steps alone)" if steps_alone else name, ratio, steps_alone)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.margins(x=0.12)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    job = result["job"]
    what = f"{result['model']}, {job['width']}x{job['height']}, batch {job['batch']}, {job['steps']} steps"
    axes.set_title(f"Times latentrt's time, prompt to pixels: {what}, {job['threads']} threads, fp32")
    return _with_footer(figure)


def scaling(result: Result) -> Figure:
    """The time against size, batch, steps, threads and LoRAs; export against parameters; load against bytes."""
    figure, grid = pyplot.subplots(2, 4, figsize=(13, 6), layout="constrained")
    places = iter(grid.flat)
    values: dict[str, tuple[str, Callable[[Any], float]]] = {
        "size": ("megapixels", lambda s: s["width"] * s["height"] / 1e6),
        "batch": ("pictures in a batch", lambda s: s["batch"]),
        "steps": ("steps", lambda s: s["steps"]),
        "threads": ("CPU threads", lambda s: s["threads"]),
    }
    for name, (title, value) in values.items():
        _curve(next(places), result["curves"][name], title, value)
    _exports(next(places), result["exports"], "seconds", 1.0, "seconds to export it")
    _exports(next(places), result["exports"], "peak_rss_bytes", 2**-20, "MiB resident at most meanwhile")
    _loads(next(places), result["exports"])
    _loras(next(places), result.get("loras", ()))
    return _with_footer(figure)


def _loras(axes: Axes, points: Sequence[Any]) -> None:
    """The change of weights and a step after it, against the number of LoRAs; nothing where it was not measured."""
    if not points:
        axes.set_axis_off()
        return
    counts = [point["count"] for point in points]
    for name, label in (("adapt", "change of weights"), ("step", "a step")):
        axes.plot(counts, [1e3 * point[name]["p50"] for point in points], marker="o", markersize=4, label=label)
    axes.set(xlabel="LoRAs at once", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(frameon=False)
    axes.set_title("milliseconds")


def _curve(axes: Axes, points: list[Any], title: str, value: Callable[[Any], float]) -> None:
    xs = [value(point["settings"]) for point in points]
    medians = [1e3 * point["end_to_end"]["p50"] for point in points]
    spans = [1e3 * point["end_to_end"]["p95"] for point in points]
    axes.fill_between(xs, [1e3 * point["end_to_end"]["lowest"] for point in points], spans, alpha=0.15)
    axes.plot(xs, medians, marker="o", markersize=4)
    axes.set(xlabel=title, ylim=(0, 1.08 * max(spans)), xlim=(0, 1.05 * max(xs)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=all(x == int(x) for x in xs)))
    axes.set_title("milliseconds, end to end")


def _exports(axes: Axes, exports: Mapping[str, Any], key: str, unit: float, title: str) -> None:
    components = [component for one in exports.values() for component in one["components"].values()]
    rows = sorted((component["parameters"] / 1e6, component[key] * unit) for component in components)
    axes.scatter([x for x, _ in rows], [y for _, y in rows], s=16)
    axes.set(xlabel="million parameters of a component", xscale="log", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title)


def _loads(axes: Axes, exports: Mapping[str, Any]) -> None:
    for check, label in (("hash", "hashing every file"), ("size", "comparing sizes")):
        rows = sorted((one["bytes"] / 1e6, 1e3 * one["load_s"][check]["p50"]) for one in exports.values())
        axes.plot([x for x, _ in rows], [y for _, y in rows], marker="o", markersize=4, label=label)
    axes.set(xlabel="megabytes of the bundle", xlim=(0, None))
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_title("milliseconds to load it")
    axes.legend()


def _with_footer(figure: Figure) -> Figure:
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))  # type: ignore[union-attr, call-arg]
    return figure


KINDS: dict[str, Callable[[Result], Figure]] = {
    "latentrt bench": bench,
    "latentrt peers": peers,
    "latentrt scaling": scaling,
}


if __name__ == "__main__":
    main()
