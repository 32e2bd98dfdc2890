"""How near forecasts come to a long run's pictures, and the sampler's own few steps: decibels, and right prompts.

python benchmarks/forecast.py demo/shapes
python benchmarks/forecast.py demo/shapes --samplers euler
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from page_tables import place

from latentrt.export.demo.scoring import held_out_prompts
from latentrt.export.quantisation.quantise import decibels
from latentrt.runtime.bench.machine import describe
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.sampling.catalogue import SAMPLERS, find

STEPS, CALLS, BATCH, GUIDANCE = 50, (19, 10), 8, 3.0
RESULT = Path("benchmarks/results/forecast.json")
PAGE, PLACE = Path("docs/samplers.md"), "forecast"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m_karras", "unipc"])
    arguments = parser.parse_args()
    with Pipeline.load(arguments.bundle, build=True) as pipe:
        for sampler in arguments.samplers:
            measured = measure(pipe, sampler, arguments.prompts)
            known = json.loads(RESULT.read_text())["samplers"] if RESULT.exists() else {}
            same = {name: one for name, one in known.items() if one["prompts"] == arguments.prompts}
            document = {"steps": STEPS, "guidance": GUIDANCE, "samplers": same | {sampler: measured}}
            RESULT.write_text(json.dumps(document, indent=1) + "\n")
            print(sampler, json.dumps(measured), flush=True)
    PAGE.write_text(place(PAGE.read_text(), PLACE, forecast_table(json.loads(RESULT.read_text()))))


def measure(pipe: Pipeline, sampler: str, count: int) -> dict[str, Any]:
    """Draw held-out prompts, seeds 0, 1, 2, …, with all steps, and with fewer calls of the denoiser in both ways."""
    texts, judge = held_out_prompts(count)

    def drawn(**how: int) -> tuple[np.ndarray, int]:
        pixels = np.concatenate(
            [
                pipe(texts[first : first + BATCH], seed=first, sampler=sampler, guidance=GUIDANCE, **how).pixels
                for first in range(0, count, BATCH)
            ]
        )
        return pixels, sum(judge(number, one) for number, one in enumerate(pixels))

    def compared(**how: int) -> dict[str, Any]:
        pixels, right = drawn(**how)
        near = decibels(pixels, long)
        return {"median": float(np.median(near)), "least": float(near.min()), "right": right}

    long, right = drawn(steps=STEPS)
    calls = {
        str(number): {"forecast": compared(steps=STEPS, forecast=number), "fewer steps": compared(steps=number)}
        for number in CALLS
    }
    return {"machine": describe(), "prompts": count, "right": right, "calls": calls}


def forecast_table(found: Mapping[str, Any]) -> str:
    """Return a row for each sampler and number of calls."""
    head = ["sampler", "calls", "forecast, dB", "as many steps, dB", "right: 50 steps", "forecast", "as many steps"]
    rows = [head, ["---"] * len(head)]
    for sampler, one in found["samplers"].items():
        for calls, ways in one["calls"].items():
            near = [f"{way['median']:.1f} ({way['least']:.1f})" for way in ways.values()]
            right = [one["right"], *(way["right"] for way in ways.values())]
            rows.append([title(sampler), calls, *near, *(f"{number} of {one['prompts']}" for number in right)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def title(sampler: str) -> str:
    name = find(sampler)
    return " ".join([SAMPLERS[name.sampler].title, *([name.spacing.title()] if name.spacing else [])])


if __name__ == "__main__":
    main()
