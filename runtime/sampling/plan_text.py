"""Plans and samplers for people to read: tables and small plots in plain text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.sampling.catalogue import SAMPLERS
from latentrt.runtime.sampling.plan import SamplingPlan
from latentrt.runtime.sampling.spacings import SPACINGS

BARS = "▁▂▃▄▅▆▇█"
PLOT_WIDTH = 40


def samplers_table() -> list[dict[str, str]]:
    """Return one row for each sampler: its name, title, other names, options and what it costs a step.

    Rows of strings, for a table or for JSON.
    """
    return [
        {
            "name": name,
            "title": sampler.title,
            "aliases": ", ".join(sampler.aliases),
            "spacings": ", ".join(SPACINGS) if sampler.spaced else "",
            "eta": "" if sampler.eta is None else f"{sampler.eta:g}",
            "predicts": ", ".join(sampler.predictions),
            "note": sampler.note,
        }
        for name, sampler in SAMPLERS.items()
    ]


def format_samplers() -> str:
    """Return the samplers as a text table, and below it what is to be known of some."""
    columns, rows = ("name", "title", "eta", "aliases"), samplers_table()
    noted: dict[str, list[str]] = {}
    for row in rows:
        noted.setdefault(row["note"], []).append(row["name"])
    notes = [f"{', '.join(names)}: {note}" for note, names in noted.items() if note]
    return "\n".join([_table(columns, [[row[column] for column in columns] for row in rows]), "", *notes])


def format_plan(plan: SamplingPlan) -> str:
    """Return a plan as text: what it costs, its noise and coefficients as plots, and a line for each stage."""
    head = (
        f"{plan.sampler}: {plan.steps} steps, {plan.stages} model evaluations, {plan.rows} rows of state, "
        f"{int(plan.draws_noise.sum())} draws of noise, first latents × {plan.initial_scale:.5g}"
    )
    weights = {f"row {r}": plan.transitions[:, 0, r] for r in range(plan.rows)}
    weights |= {"output": plan.transitions[:, 0, plan.rows], "noise": plan.transitions[:, 0, plan.rows + 1]}
    plots = [("log sigma", np.log10(np.clip(plan.sigmas[:-1], 1e-4, 1e4))), *weights.items()]
    plotted = [[name, _spark(values), f"{values.min():.4g}", f"{values.max():.4g}"] for name, values in plots]
    stages = [
        [str(k), f"{plan.timesteps[k]:.6g}", f"{plan.sigmas[k]:.5g}", *(f"{w[k]:.5g}" for w in weights.values())]
        for k in range(plan.stages)
    ]
    return "\n\n".join(
        [
            head,
            _table(("next latents", "stages →", "least", "most"), plotted),
            _table(("stage", "timestep", "sigma", *weights), stages),
        ]
    )


def _spark(values: Array) -> str:
    """Return a line of bars, one a value; more than fit are thinned."""
    shown = values[np.linspace(0, len(values) - 1, min(len(values), PLOT_WIDTH)).round().astype(int)]
    spread = float(shown.max() - shown.min())
    if spread == 0:
        return BARS[3] * len(shown)
    heights = (shown - shown.min()) / spread * (len(BARS) - 1)
    return "".join(BARS[round(float(height))] for height in heights)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


VERSION = 1
NUMBERS = ("timesteps", "levels", "input_rows", "transitions")


def plan_to_json(plan: SamplingPlan) -> str:
    """Write a plan as JSON, whose numbers read back to the same bits of float32."""
    document = {"version": VERSION, "sampler": plan.sampler, "steps": plan.steps, "initial_scale": plan.initial_scale}
    document |= {name: getattr(plan, name).tolist() for name in ("draws_noise", *NUMBERS)}
    return json.dumps(document, allow_nan=False) + "\n"
