"""docs/figures.md says what benchmarks/results/ says: each figure is computed from its result and looked for there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "figures.md").read_text()
ON_A_GPU = {
    "latentrt, `cuda`, recorded (`cuda_graphs=True`)": "sd15: bench cuda graphs",
    "latentrt, `cuda`": "sd15: bench cuda",
    "latentrt, `cuda`, without the rewrites for its kernels (`--recipe plain`)": "sd15: bench cuda plain",
    "PyTorch, recorded": "sd15: torch recorded",
    "PyTorch, eager": "sd15: torch eager",
}
UNET_TFLOP = 0.80327  # of one row at 512x512, see benchmarks/gpu_models.py
MIB = 1 << 20
PEERS = {
    "latentrt": "latentrt",
    "plain": "ONNX Runtime, plain loop (steps alone)",
    "diffusers": "diffusers, eager",
    "diffusers-compiled": "diffusers, torch.compile",
    "optimum": "optimum-onnx",
    "openvino": "OpenVINO GenAI",
}
RUNS = ("demo-batch1", "middle-batch1", "middle-batch4", "sd15-batch1")
SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "lcm": "LCM (on a model that was not distilled)",
}


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def line_with(start: str) -> str:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    return line


def table_of(name: str) -> dict[str, list[str]]:
    """Return the rows of a Markdown table in the results, by their first cell."""
    lines = (RESULTS / f"{name}.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def ratio(cells: list[str]) -> str:
    """Return times ours, of a batch where it was measured and of a step elsewhere."""
    return cells[1] or cells[3]


@pytest.mark.parametrize("way", ON_A_GPU)
def test_a_gpu_takes_as_long_as_was_measured(way: str) -> None:
    parts = result("gpu-h200")["parts"]
    assert parts[ON_A_GPU[way]]["status"] == "ok"
    floor_s = 2 * UNET_TFLOP / parts["ceilings"]["figures"]["tflops"]
    eager_s, (step_s, picture_s) = parts["sd15: torch eager"]["figures"]["step_s"]["p50"], gpu_seconds(ON_A_GPU[way])
    picture = "–" if picture_s is None else f"{1e3 * picture_s:.0f}"
    speed = row(way, f"{1 / step_s:.1f}", f"{eager_s / step_s:.2f}", f"{floor_s / step_s:.0%}", picture)
    assert speed in PAGE.splitlines()


def test_a_pass_at_the_ceilings_is_what_was_computed() -> None:
    found = result("roofline-sd15")["components"]["unet"]
    assert sum(cost["operations"] for cost in found["costs"]) / 2e12 == pytest.approx(UNET_TFLOP, rel=1e-5)
    assert f"takes {1e3 * found['seconds']:.1f} ms with one node after another" in PAGE
    assert f"and {1e3 * found['fused_s']:.1f} ms if what only moves" in PAGE
    step_s, _ = gpu_seconds("sd15: bench cuda graphs")
    assert f"the recorded one takes {1e3 * step_s:.1f} ms" in PAGE


def test_keys_and_values_of_the_text_are_worth_what_was_measured() -> None:
    names = {"demo": "demo, 128x128", "middle": "random weights, a fifth of SD 1.5's width, 256x256"}
    for name, start in names.items():
        found = result(f"cross-attention-{name}")["ways"]["once a picture"]["ratio"]
        assert f"{found['estimate']:.3f} ({found['low']:.3f} to {found['high']:.3f})" in line_with(start)


def test_the_contract_with_cuda_was_met_as_often_as_is_said() -> None:
    seam = result("gpu-h200")["parts"]["seam"]["figures"]
    assert f"{seam['passed']} of its {seam['passed'] + seam['failed']} tests passed" in PAGE


def test_the_readme_says_what_a_gpu_gave() -> None:
    eager_s, (step_s, _) = gpu_seconds("sd15: torch eager")[0], gpu_seconds("sd15: bench cuda graphs")
    assert f"{eager_s / step_s:.1f} times the steps a second of eager PyTorch" in (ROOT / "README.md").read_text()


def gpu_seconds(part: str) -> tuple[float, float | None]:
    """Return the median seconds of a step, and of a picture where one was drawn."""
    figures = result("gpu-h200")["parts"][part]["figures"]
    if "variants" not in figures:
        return figures["step_s"]["p50"], None
    (variant,) = figures["variants"]
    step, total = (variant["seconds"][name]["summary"]["p50"] for name in ("step", "total"))
    return step, total


def test_the_demo_is_as_right_as_it_was_counted() -> None:
    found = result("accuracy")
    right = round(found["right"]["right"] * found["prompts"])
    assert f"{right} of {found['prompts']}" in line_with("demo: held-out prompts")


def test_imports_take_as_long_as_was_measured() -> None:
    seconds: Mapping[str, float] = result("import_time")["seconds"]
    base, theirs = seconds["numpy, onnxruntime"], seconds["diffusers' StableDiffusionPipeline"]
    (ours,) = [value for name, value in seconds.items() if name.startswith("latentrt")]
    assert f" {ours / base:.1f} times" in line_with("importing the runtime")
    assert f" {theirs / base:.0f} times" in line_with("importing diffusers")


def test_exports_and_builds_are_as_large_as_was_measured() -> None:
    export = result("full-size-export-sdxl-fp16")["export"]
    peak = f"{export['peak_rss_over_largest']:.2f} times"
    assert peak in line_with("SDXL at full size")
    assert f"{export['components']['unet']['weights_bytes'] / 1e9:.2f} GB" in line_with("SDXL at full size")
    assert f"{export['bytes'] / 1e9:.2f} GB on disk" in PAGE
    error = max(part["error"] for part in export["components"].values())
    assert f"{error:.1e}".replace("e-0", "e-") in line_with("the same: largest error")
    build = result("full-size-build-sd15")
    assert f"{build['engine_bytes'] / 1e9:.2f} GB" in line_with("SD 1.5's UNet as the fused stage")
    assert f"{build['peak_bytes'] / 1e9:.1f} GB" in line_with("the same: peak memory of building")


@pytest.mark.parametrize("peer", PEERS)
def test_other_libraries_take_as_long_as_was_measured(peer: str) -> None:
    tables = [table_of(f"peers-{run}").get(PEERS[peer].removesuffix(" (steps alone)")) for run in RUNS]
    ratios = ["not run" if cells is None else ratio(cells) for cells in tables]
    expected = ["1.00"] * len(RUNS) if peer == "latentrt" else ratios
    *_, last = [cells for cells in tables if cells is not None]
    peak = last[4] if tables[-1] is not None else "–"
    assert row(PEERS[peer], *expected, peak, *last[5:]) in PAGE.splitlines()


def test_memory_is_what_was_measured() -> None:
    for run, start in (
        ("demo-batch1", "demo |"),
        ("middle-batch1", "`middle`: "),
        ("sd15-batch1", "SD 1.5, full size |"),
    ):
        peak = result(f"peers-{run}")["peers"]["latentrt"]["peak_rss_bytes"] / MIB
        assert line_with(start).endswith(f"| {peak:.0f} |")


def test_loras_take_as_long_as_was_measured() -> None:
    medians = {one["count"]: one["adapt"]["p50"] * 1e3 for one in result("scaling")["loras"]}
    assert f"with one LoRA takes {medians[1]:.0f} ms, with eight {medians[8]:.0f} ms." in PAGE
    assert f"Going back takes {medians[0]:.1f} ms" in PAGE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_are_as_accurate_as_was_counted(sampler: str) -> None:
    variants = [one for one in result("curves-demo")["variants"] if one["settings"]["sampler"] == sampler]
    right = {one["settings"]["steps"]: one["prompts"]["right"] for one in variants}
    assert row(SAMPLERS[sampler], *(right[steps] for steps in (1, 2, 4, 8, 20, 50))) in PAGE.splitlines()


def test_guidance_for_part_of_the_steps_is_what_was_measured() -> None:
    for one in result("guidance")["intervals"]:
        first, last = (f"{end:g}" for end in one["interval"])
        share, seconds = (f"{value:.{digits}f}".rstrip("0").rstrip(".") for value, digits in _figures(one))
        assert row(f"{first} – {last}", f"{share} %", seconds) in PAGE.splitlines()


def _figures(one: Mapping[str, float]) -> tuple[tuple[float, int], tuple[float, int]]:
    return (one["right"] * 100, 1), (one["ratio"], 2)
