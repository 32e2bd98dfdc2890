"""The GPU suite's figures as a Markdown table: a row for each way to run a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpu_models import HALF_TFLOPS, Model
from parts import Outcomes
from roofline import missed

HEAD = (
    "model",
    "with",
    "step ms",
    "steps/s",
    "of the floor",
    "to eager",
    "to recorded",
    "to compiled",
    "picture p50 ms",
    "p95",
    "outside",
    "GPU MiB",
    "error",
)
WITHIN = ("pass", "one_step", "decoder")  # what a part looked into beside its main figures
PEERS = ("torch eager", "torch recorded", "torch compiled", "diffusers eager", "diffusers compiled")


def format_table(models: Mapping[str, Model], backends: Sequence[str], outcomes: Outcomes) -> str:
    """Return the table. A ratio to torch is of the same run; empty where that peer did not run."""
    rate = measured_tflops(outcomes)
    lines = [list(HEAD), ["---"] * len(HEAD)]
    for name, model in models.items():
        for backend in backends:
            lines += [_our_row(name, model, backend, way, outcomes, rate) for way in _ways(name, backend, outcomes)]
        lines += [_peer_row(name, model, way, outcomes, rate) for way in PEERS if f"{name}: {way}" in outcomes.parts]
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def format_insides(outcomes: Outcomes) -> str:
    """Return what takes the time inside, largest first: operators or kernels of each part that looked."""
    return "".join(_insides(outcomes))


def _insides(outcomes: Outcomes) -> Iterator[str]:
    for name in outcomes.parts:
        figures = outcomes.figures(name)
        for what, found in {"": figures, **{key: figures[key] for key in WITHIN if key in figures}}.items():
            for kind in ("operators", "kernels"):
                if rows := found.get(kind):
                    head = [", ".join(filter(None, (name, what, kind))), "count", "ms"]
                    cells = [[_label(row), str(row["count"]), f"{row['ms']:.3f}"] for row in rows]
                    yield "\n" + _markdown([head, ["---"] * len(head), *cells])
        if "kernels_ms" in figures and (text := _missed(name, figures, outcomes)):
            yield f"\n{text}\n"


def _missed(name: str, figures: Mapping[str, Any], outcomes: Outcomes) -> str | None:
    """Return what a model's kernels took beside what they had to; None where that is not known."""
    rate = outcomes.figures("ceilings").get("bytes_per_s")
    return None if rate is None else missed(name.partition(":")[0], rate, figures)


def _label(row: Mapping[str, Any]) -> str:
    return " ".join(str(row[key]) for key in ("operator", "provider", "kernel") if key in row).replace("|", "/")[:120]


def measured_tflops(outcomes: Outcomes) -> float:
    """Return the half-precision rate that the floors are counted against: this run's own, if it was measured."""
    return float(outcomes.figures("ceilings").get("tflops", HALF_TFLOPS))


def _ways(name: str, backend: str, outcomes: Outcomes) -> list[str]:
    start = f"{name}: bench {backend}"
    return [part.removeprefix(start).strip() for part in outcomes.parts if f"{part} ".startswith(f"{start} ")]


def _our_row(name: str, model: Model, backend: str, way: str, outcomes: Outcomes, rate: float) -> list[str]:
    report, checked = (
        outcomes.figures(f"{name}: bench {backend} {way}".strip()),
        outcomes.figures(f"{name}: verify {backend}"),
    )
    label = f"latentrt, {backend}{f', {way}' if way else ''}"
    errors = [row["error"] for row in checked.get("components", {}).values() if row["error"] is not None]
    error = f"{max(errors):.1e}" if errors else ""
    if not report:
        return [name, label, _status(outcomes, name, backend, way), *[""] * (len(HEAD) - 4), error]
    (variant,) = report["variants"]
    step, whole = variant["seconds"]["step"]["summary"], variant["seconds"]["total"]["summary"]
    memory = variant["device_bytes"]
    return [
        name,
        label,
        *_step_cells(step["p50"], name, model, outcomes, rate),
        f"{1e3 * whole['p50']:.2f}",
        f"{1e3 * whole['p95']:.2f}",
        f"{variant['outside_engines']['summary']['p50']:.2%}",
        "" if memory is None else f"{memory / 2**20:.0f}",
        error,
    ]


def _status(outcomes: Outcomes, name: str, backend: str, way: str) -> str:
    for verb in ("bundle", f"build {backend}", f"bench {backend} {way}".strip()):
        part = outcomes.parts.get(f"{name}: {verb}")
        if part is not None and part["status"] != "ok":
            return f"{verb}: {part['status']}, {str(part['why'])[:120]}".replace("|", "/")
    return ""


def _peer_row(name: str, model: Model, way: str, outcomes: Outcomes, rate: float) -> list[str]:
    part = outcomes.parts[f"{name}: {way}"]
    figures = part["figures"] or {}
    if not figures:
        why = f"{part['status']}, {str(part['why'])[:120]}".replace("|", "/")
        return [name, way, why, *[""] * (len(HEAD) - 3)]
    memory = figures.get("device_bytes")
    step, whole = figures.get("step_s"), figures.get("picture_s")
    return [
        name,
        way,
        *(_step_cells(step["p50"], name, model, outcomes, rate) if step else [""] * 6),
        *([f"{1e3 * whole['p50']:.2f}", f"{1e3 * whole['p95']:.2f}"] if whole else ["", ""]),
        "",
        "" if memory is None else f"{memory / 2**20:.0f}",
        "",
    ]


def _step_cells(step_s: float, name: str, model: Model, outcomes: Outcomes, rate: float) -> list[str]:
    floor = model.floor_s(rate)
    share = "" if floor is None else f"{floor / step_s:.1%}"
    peers = [_step_of(outcomes, f"{name}: torch {how}") for how in ("eager", "recorded", "compiled")]
    ratios = ["" if peer is None else f"{peer / step_s:.2f}" for peer in peers]
    return [f"{1e3 * step_s:.3f}", f"{1 / step_s:.1f}", share, *ratios]


def _step_of(outcomes: Outcomes, part: str) -> float | None:
    step: dict[str, Any] = outcomes.figures(part).get("step_s", {})
    return step.get("p50")
