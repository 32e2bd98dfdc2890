"""docs/figures.md says what benchmarks/results/ says: each figure is computed from its result and looked for there."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from cold_start import PLACE, cold_table  # noqa: E402
from forecast import PLACE as FORECASTS  # noqa: E402
from forecast import forecast_table  # noqa: E402
from peer_report import tables as peer_tables  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "figures.md").read_text()
SD3 = (ROOT / "docs" / "sd3.md").read_text()
ON_A_GPU = {
    "SD 1.5, 512x512, guided, 20 steps: latentrt, `cuda`": ("gpu-h200", "sd15: bench cuda fused"),
    "the same, built with `--recipe plain`": ("gpu-h200", "sd15: bench cuda plain"),
    "the same: PyTorch, recorded": ("gpu-h200", "sd15: torch recorded"),
    "the same: PyTorch, eager": ("gpu-h200", "sd15: torch eager"),
    "the same: diffusers, eager": ("gpu-h200", "sd15: diffusers eager"),
    "SD-Turbo, 512x512, 1 step: latentrt, `cuda`, without the fused sums": ("gpu-h200", "turbo: bench cuda graphs"),
    "SD-Turbo: PyTorch, recorded": ("gpu-h200", "turbo: torch recorded"),
    "SD 1.5, 512x512, guided: latentrt, `cuda`, with biases": ("gpu-h200-4", "sd15: bench cuda"),
    "SD 1.5: PyTorch, recorded, with biases": ("gpu-h200-4", "sd15: torch recorded"),
    "SD 3.5 medium without T5, 1024x1024, guided: latentrt, `cuda`": ("gpu-h200-4", "sd35: bench cuda"),
    "SD 3.5 medium: PyTorch, recorded": ("gpu-h200-4", "sd35: torch recorded"),
    "SD 1.5 an hour before: each convolution's bias in a pass of its own": ("gpu-h200-3", "sd15: bench cuda"),
    "SD 1.5 an hour before: `fuse_conv_bias`": ("gpu-h200-3", "sd15: bench cuda fused-bias"),
    "SD 1.5 an hour before: cuDNN's attention": ("gpu-h200-3", "sd15: bench cuda cudnn-attention"),
    "SD 1.5 an hour before: ONNX Runtime's flash attention": ("gpu-h200-3", "sd15: bench cuda flash"),
    "SD 1.5 an hour before: memory-efficient attention": ("gpu-h200-3", "sd15: bench cuda efficient"),
    "SD 1.5 an hour before: cuDNN's kernels without a search": ("gpu-h200-3", "sd15: bench cuda heuristic"),
}
LATER_ON_A_GPU = {
    "SD 1.5, 512x512, guided: latentrt, `cuda`, later": "sd15: bench cuda",
    "SD 1.5: PyTorch, recorded, later": "sd15: torch recorded",
    "SD 1.5: PyTorch, compiled, later": "sd15: torch compiled",
    "SDXL, 1024x1024, guided: latentrt, `cuda`": "sdxl: bench cuda",
    "SDXL: PyTorch, recorded": "sdxl: torch recorded",
}
STEP_TFLOP = {
    "sd15": 2 * 0.80327,
    "turbo": 0.80426,
    "sdxl": 2 * 6.76124,
    "sd35": 2 * 11.24957,
}  # see benchmarks/gpu_models.py
SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "lcm": "LCM (on a model that was not distilled)",
}


# Where the simulator is further than 15 % from what was measured, and how far it may be.
TOO_HIGH = {("load-demo", "continuous"): 0.2}


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def line_with(start: str) -> str:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    return line


def test_a_picture_takes_as_long_as_before_the_workspace_as_was_measured() -> None:
    wall = result("versions-demo")["wall"]
    ratio = f"{wall['estimate']:.2f} ({wall['low']:.2f} to {wall['high']:.2f})"
    assert ratio in line_with("a picture of the demo, 8 steps")


@pytest.mark.parametrize("way", ON_A_GPU)
def test_a_gpu_takes_as_long_as_was_measured(way: str) -> None:
    session, part = ON_A_GPU[way]
    parts, model = result(session)["parts"], part.partition(":")[0]
    assert parts[part]["status"] == "ok"
    floor_s = STEP_TFLOP[model] / parts["ceilings"]["figures"]["tflops"]
    (recorded_s, _), (step_s, picture_s) = gpu_seconds(f"{model}: torch recorded", session), gpu_seconds(part, session)
    assert recorded_s is not None
    speed = (
        ["–"] * 3 if step_s is None else [f"{1 / step_s:.1f}", f"{recorded_s / step_s:.2f}", f"{floor_s / step_s:.0%}"]
    )
    assert row(way, *speed, "–" if picture_s is None else f"{1e3 * picture_s:.0f}") in PAGE.splitlines()


@pytest.mark.parametrize("way", LATER_ON_A_GPU)
def test_a_gpu_takes_as_long_as_was_measured_later(way: str) -> None:
    parts, model = result("gpu-h200-2")["parts"], LATER_ON_A_GPU[way].partition(":")[0]
    floor_s = STEP_TFLOP[model] / parts["ceilings"]["figures"]["tflops"]
    step_s, picture_s = gpu_seconds(LATER_ON_A_GPU[way], "gpu-h200-2")
    assert step_s is not None
    ratios = []
    for peer in ("recorded", "compiled"):
        measured = parts.get(f"{model}: torch {peer}")
        ratios.append(f"{measured['figures']['step_s']['p50'] / step_s:.2f}" if measured else "–")
    picture = "–" if picture_s is None else f"{1e3 * picture_s:.0f}"
    assert row(way, f"{1 / step_s:.1f}", *ratios, f"{floor_s / step_s:.0%}", picture) in PAGE.splitlines()


def test_every_kind_of_model_was_the_cpus_picture_on_a_gpu() -> None:
    drawn = {}
    for session in ("gpu-h200", "gpu-h200-2", "gpu-h200-3", "gpu-h200-4"):
        parts = result(session)["parts"]
        drawn |= {name: part for name, part in parts.items() if name.endswith("pictures cuda")}
    assert len(drawn) == 10 and {part["status"] for part in drawn.values()} == {"ok"}
    means = [each["mean"] for part in drawn.values() for how in HOWS for each in part["figures"][how].values()]
    assert max(means) < 0.3 and "within 0.3 of 255" in PAGE
    second = {name: part for name, part in result("gpu-h200-2")["parts"].items() if name in drawn}
    tiny = [part for name, part in second.items() if name.startswith("tiny") and part["status"] == "ok"]
    means = [each["mean"] for part in tiny for how in HOWS for each in part["figures"][how].values()]
    assert len(tiny) == 7 and max(means) < 0.2 and "within 0.2" in PAGE
    requests = result("gpu-h200-4")["parts"]["demo: pictures cuda"]["figures"]
    assert len(requests["recorded"]) == 13 and "The 13 kinds of request of the demo" in PAGE


HOWS = ("launched", "recorded")


def test_every_component_of_full_size_was_within_its_limit_on_a_gpu() -> None:
    parts = result("gpu-h200-4")["parts"]
    for name in ("sd15: verify cuda", "sd35: verify cuda"):
        assert all(component["ok"] for component in parts[name]["figures"]["components"].values())


def test_sharing_on_a_gpu_took_as_long_as_was_measured() -> None:
    def ratios(session: str, part: str) -> list[tuple[float, float]]:
        shared = result(session)["parts"][part]["figures"]["shared"]
        assert all(each["pictures are"]["ok"] and each["pictures"] == 32 for each in shared)
        both = ((each["seconds"]["shared"], each["seconds"]["alone"]) for each in shared)
        return [(ours[0] / theirs[0], ours[1] / theirs[1]) for ours, theirs in both]

    (first4, second4), (first8, second8) = ratios("gpu-h200-4", "sd15: batcher cuda")
    assert f"took {second4:.2f} times the time" in PAGE and f"of 8 slots {second8:.2f} times" in PAGE
    assert f"graphs are recorded, {first4:.2f} and {first8:.2f} times" in PAGE
    demo = [ratio for both in ratios("gpu-h200-3", "demo: batcher cuda") for ratio in both]
    assert f"{min(demo):.1f} to {max(demo):.1f} times" in PAGE


def test_the_contract_with_cuda_was_met_as_often_as_is_said() -> None:
    seam = result("gpu-h200-3")["parts"]["seam"]["figures"]
    assert not seam["failed"] and f"all {seam['passed']} tests passed" in PAGE


def test_the_readme_says_what_a_gpu_gave() -> None:
    def speed(model: str) -> float:
        ours, theirs = (gpu_seconds(f"{model}: {part}", "gpu-h200-4")[0] for part in ("bench cuda", "torch recorded"))
        assert ours is not None and theirs is not None
        return theirs / ours

    recorded, compiled = (gpu_seconds(f"sd15: torch {how}", "gpu-h200-2")[0] for how in ("recorded", "compiled"))
    assert recorded is not None and compiled is not None
    said = f"{speed('sd15'):.2f} times the steps a second of PyTorch"
    assert said in (readme := (ROOT / "README.md").read_text())
    assert f"`torch.compile` gave {recorded / compiled:.2f}" in readme
    assert f"on SD 3.5 medium {speed('sd35'):.2f} times" in readme


def gpu_seconds(part: str, session: str = "gpu-h200") -> tuple[float | None, float | None]:
    """Return the median seconds of a step and of a picture, None for what was not measured."""
    figures = result(session)["parts"][part]["figures"]
    if "variants" not in figures:
        return tuple((figures.get(name) or {}).get("p50") for name in ("step_s", "picture_s"))  # type: ignore[return-value]
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


def test_sd3_is_exported_as_was_measured() -> None:
    export = result("full-size-export-sd35-medium-no-t5-fp16")["export"]
    line, error = line_with("SD 3.5 medium at full size"), max(one["error"] for one in export["components"].values())
    assert f"{export['components']['transformer']['weights_bytes'] / 1e9:.2f} GB" in line
    assert f"{export['peak_rss_over_largest']:.2f} times" in line
    assert f"{error:.1e}".replace("e-0", "e-") in line_with("its largest error")
    assert f"{export['seconds']:.0f} s" in SD3 and f"{export['peak_rss_bytes'] / 1e9:.2f} GB" in SD3


def test_text_encoders_on_demand_take_what_was_measured() -> None:
    from benchmarks.text_encoders import table

    found = result("text-encoders")
    assert table(found) in SD3
    assert f"{found['weights_bytes']['text_encoder_3'] / 1e9:.2f} GB" in SD3


def test_other_libraries_take_as_long_and_as_much_as_was_measured() -> None:
    from benchmarks.page_tables import place

    for name, table in peer_tables().items():
        assert f"<!-- {name} -->" in PAGE and place(PAGE, name, table) == PAGE


def test_loras_take_as_long_as_was_measured() -> None:
    medians = {one["count"]: one["adapt"]["p50"] * 1e3 for one in result("scaling")["loras"]}
    assert f"with one LoRA takes {medians[1]:.0f} ms, with eight {medians[8]:.0f} ms." in PAGE
    assert f"Going back takes {medians[0]:.1f} ms" in PAGE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_are_as_accurate_as_was_counted(sampler: str) -> None:
    variants = [one for one in result("curves-demo")["variants"] if one["settings"]["sampler"] == sampler]
    right = {one["settings"]["steps"]: one["prompts"]["right"] for one in variants}
    assert row(SAMPLERS[sampler], *(right[steps] for steps in (1, 2, 4, 8, 20, 50))) in PAGE.splitlines()


def test_a_cold_start_takes_as_long_as_was_measured() -> None:
    ratio = result("cold-start-demo")["ratios"]["total"]
    assert f"{ratio['estimate']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" in PAGE


def test_pngs_take_as_long_and_are_as_large_as_was_measured() -> None:
    pictures = result("png")["pictures"]
    for setting in next(iter(pictures.values())):
        cells = list[str]()
        for rows in pictures.values():
            time = rows[setting]["time"]
            interval = f"({time['low']:.2f} to {time['high']:.2f})"
            cells += [f"{time['estimate']:.2f} {interval}", f"{rows[setting]['bytes_ratio']:.3f}"]
        assert row(setting, *cells) in PAGE
    ours = [rows["latentrt"] for rows in pictures.values()]
    assert max(one["time"]["high"] for one in ours) < 0.5
    assert round(100 * max(one["bytes_ratio"] for one in ours) - 100) == 11


def test_8_bits_cost_what_was_measured() -> None:
    page, found = (ROOT / "docs" / "quantisation.md").read_text().splitlines(), result("quantised")
    for kind in ("fp8", "int8"):
        one = found["bundles"][f"shapes-{kind}"]
        told, lost = one["told"]["unet"], one["decibels"]
        far = f"{lost['median']:.1f} ({lost['least']:.1f} to {lost['most']:.1f})"
        right = f"{one['right']} of {found['prompts']}"
        assert row(kind, f"{told['nodes']} of {told['of']}", f"{told['noise']:.4f}", far, right) in page
        assert one["right"] == found["prompts"] == 100 and lost["median"] >= 35


def test_int8_on_the_cpu_takes_as_long_as_was_measured() -> None:
    found = {name: result(f"cpu-int8-{name}") for name in ("demo", "middle")}
    for way, lost in found["demo"]["decibels"].items():
        ratios = [one["ways"][way]["ratio"] for one in found.values()]
        cells = [f"{one['estimate']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in ratios]
        assert row(way, *cells, f"{lost['median']:.1f} dB") in PAGE.splitlines()
    best = found["demo"]["ways"]["linear layers and convolutions"]["ratio"]["estimate"]
    assert f"{1 / best:.2f} times as fast" in PAGE and 1 / best < 1.3


def test_cold_starts_take_as_long_as_was_measured() -> None:
    from benchmarks.page_tables import place

    if any(RESULTS.glob("cold-start-*.json")):
        assert place(PAGE, PLACE, cold_table()) == PAGE


def ways_of(sampler: Any) -> list[Any]:
    return [way for ways in sampler["calls"].values() for way in ways.values()]


def test_forecasts_come_as_near_as_was_measured() -> None:
    from benchmarks.page_tables import place

    page = (ROOT / "docs" / "samplers.md").read_text()
    found = result("forecast")
    assert "| Euler | 19 |" in page and place(page, FORECASTS, forecast_table(found)) == page
    for calls in ("19", "10"):
        ways = [one["calls"][calls] for one in found["samplers"].values()]
        nearer = [way["forecast"]["median"] - way["fewer steps"]["median"] for way in ways]
        assert f"{calls} calls{' come' if calls == '19' else ''} {min(nearer):.0f} to {max(nearer):.0f} dB" in page
    assert all(one["right"] == way["right"] for one in found["samplers"].values() for way in ways_of(one))


def test_guidance_for_part_of_the_steps_is_what_was_measured() -> None:
    for one in result("guidance")["intervals"]:
        first, last = (f"{end:g}" for end in one["interval"])
        share, seconds = (f"{value:.{digits}f}".rstrip("0").rstrip(".") for value, digits in _figures(one))
        assert row(f"{first} – {last}", f"{share} %", seconds) in PAGE.splitlines()


def _figures(one: Mapping[str, float]) -> tuple[tuple[float, int], tuple[float, int]]:
    return (one["right"] * 100, 1), (one["ratio"], 2)


def test_the_tables_of_loads_are_those_of_their_results() -> None:
    from benchmarks.load import tables
    from benchmarks.page_tables import place

    page = PAGE
    for name, table in tables().items():
        page = place(page, name, table)
    assert page == PAGE


@pytest.mark.parametrize(("name", "over_one", "over_static"), [("load-demo", 2.5, 2.5), ("load-demo-20", 1.25, 1.0)])
def test_sharing_stages_gives_what_is_asked_of_it_and_what_was_predicted(
    name: str, over_one: float, over_static: float
) -> None:
    if not (RESULTS / f"{name}.json").is_file():
        pytest.skip(f"it was not measured: python benchmarks/load.py, which writes {name}.json")
    servings = {serving["name"]: serving for serving in result(name)["servings"]}
    assert all(len(serving["seeds"]) >= 5 for serving in servings.values())
    assert servings["one"]["better"]["median"] >= over_one
    assert servings["static"]["better"]["median"] >= over_static
    for way, serving in servings.items():
        most = TOO_HIGH.get((name, way), 0.15)
        assert serving["prediction"]["median"] == pytest.approx(1.0, abs=most), serving["name"]


def test_the_page_says_where_the_simulator_is_not_as_near_as_it_should_be() -> None:
    for name, way in TOO_HIGH:
        (serving,) = [serving for serving in result(name)["servings"] if serving["name"] == way]
        assert f"{serving['prediction']['median'] - 1:.0%}".replace("%", " %") + " too high" in PAGE


def test_a_fleet_is_simulated_from_what_the_gpu_gave() -> None:
    (variant,) = result("gpu-h200")["parts"]["sd15: bench cuda fused"]["figures"]["variants"]
    seconds = {name: measured["summary"]["p50"] for name, measured in variant["seconds"].items()}
    times = result("fleet-times")
    (one, stage_s), (eight, batch_s) = times["stage_s"]
    assert (one, eight) == (2, 16)
    assert stage_s == pytest.approx(seconds["step"], rel=1e-3)
    assert batch_s == pytest.approx(8 / 3.14 * seconds["step"], rel=1e-3)
    assert times["decode_s"][0][1] == pytest.approx(seconds["decode"], rel=1e-3)
    assert times["encode_s"][0][1] == pytest.approx(seconds["tokenize"] + seconds["encode"], rel=1e-3)


def test_what_gives_first_in_a_fleet_is_what_was_simulated() -> None:
    found = result("fleet")
    rows, assumed = {row["machines"]: row for row in found["rows"]}, found["assumed"]
    store = assumed["store"]
    assert f"more than {store['total_s'] / store['link_s']:.0f} machines" in PAGE
    assert f"10,000 cold ones take {rows[10_000]['cold_s'] / 60:.0f} minutes" in PAGE
    decided = 1 / assumed["decide_s"]
    assert f"from {round(1000 * decided / rows[1000]['goodput']['two choices'], -1):.0f} machines on" in PAGE
    assert f"10,000 take {rows[10_000]['routers']} of them" in PAGE
    late, known = (rows[1000]["goodput"][name] for name in ("least loaded, 250 ms late", "two choices"))
    assert 0.08 < late / known < 0.12
    assert all(row["overloaded"]["8"] > row["overloaded"]["64"] for row in rows.values() if row["overloaded"])
