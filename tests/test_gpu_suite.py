"""The GPU suite: its plain UNets are diffusers', its packed bundles grow back, no part takes the others down."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.cuda.gpus import find_gpu
from latentrt.engines.errors import BundleError
from latentrt.engines.verify.verify import verify

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_models import HALF_TFLOPS, MODELS  # noqa: E402
from gpu_pictures import LARGEST, compare  # noqa: E402
from gpu_pieces import cut  # noqa: E402
from gpu_probes import operators, run_tests  # noqa: E402
from gpu_suite import BACKEND_NAMES, Plan, chosen  # noqa: E402
from gpu_table import format_insides, format_table  # noqa: E402
from packed_bundle import Hole, pack, record_goldens, sow, unpack  # noqa: E402
from parts import Outcomes, Part, run_parts  # noqa: E402
from plain_unet import SHAPES, UNet, UNetShape  # noqa: E402
from torch_networks import make_denoiser, pass_flops, sizes_of  # noqa: E402


def diffusers_unet(shape: UNetShape) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    more = {}
    if shape.pooled:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape.pooled,
        }
    return UNet2DConditionModel(
        block_out_channels=shape.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in shape.depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(shape.depths)),
        cross_attention_dim=shape.context,
        attention_head_dim=list(shape.heads),
        use_linear_projection=shape.linear,
        transformer_layers_per_block=[depth or 1 for depth in shape.depths],
        **more,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_plain_unet_has_the_weights_of_diffusers_unet(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(SHAPES[name]), diffusers_unet(SHAPES[name])
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


SMALL = {
    "sd15": SHAPES["tiny"],
    "turbo": UNetShape(channels=(32, 64), depths=(1, 0), heads=(2, 4), context=24, linear=True),
    "sdxl": UNetShape(channels=(32, 64, 64), depths=(0, 1, 2), heads=(2, 2, 4), context=24, linear=True, pooled=1600),
}


@pytest.mark.parametrize("layout", SMALL)
def test_the_plain_unet_computes_what_diffusers_unet_computes(layout: str) -> None:
    shape = SMALL[layout]
    torch.manual_seed(0)
    ours, theirs = UNet(shape).eval(), diffusers_unet(shape).eval()
    ours.load_state_dict(theirs.state_dict())
    sample, timestep, text = torch.randn(2, 4, 16, 24), torch.tensor([7.0, 800.0]), torch.randn(2, 9, shape.context)
    pooled, added = None, {}
    if shape.pooled:  # 1600 = a pooled text of 64 and six sizes of 256
        added = {"text_embeds": torch.randn(2, 64), "time_ids": torch.randint(0, 1024, (2, 6)).float()}
        sizes = theirs.add_time_proj(added["time_ids"].flatten()).reshape(2, -1)
        pooled = torch.cat([added["text_embeds"], sizes], dim=1)
    with torch.no_grad():
        expected = theirs(sample, timestep, text, added_cond_kwargs=added).sample
        assert torch.allclose(ours(sample, timestep, text, pooled), expected, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.tflop])
def test_the_floors_are_the_arithmetic_that_torch_counts(name: str) -> None:
    model = MODELS[name]
    assert model.tflop is not None and model.shape is not None
    assert pass_flops(model.shape, model.size // 8) / 1e12 == pytest.approx(model.tflop, rel=1e-4)
    assert model.floor_s() == pytest.approx(model.rows * model.tflop / HALF_TFLOPS)
    assert model.floor_s(394.0) == pytest.approx(2 * model.rows * model.tflop / HALF_TFLOPS)


def test_sd3s_transformer_takes_what_the_loop_gives_it() -> None:
    sizes = sizes_of("sd35")
    assert (sizes.channels, sizes.tokens, sizes.width, sizes.pooled) == (16, 333, 4096, 2048)
    with torch.device("meta"):
        sample, text = torch.empty(2, 16, 8, 8), torch.empty(2, sizes.tokens, sizes.width)
        found = make_denoiser("sd35")(sample, torch.empty(2), text, torch.empty(2, sizes.pooled))
    assert found.shape == sample.shape


def test_the_plain_unet_is_traced_whole_by_the_compiler() -> None:
    torch.manual_seed(0)
    unet = UNet(SHAPES["tiny"]).eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3.0, 3.0]), torch.randn(2, 5, 32), None)
    with torch.inference_mode():
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(*inputs), unet(*inputs), atol=1e-5)


def test_a_packed_bundle_grows_back_to_the_byte_and_computes_its_goldens(sd1_half_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "sown"
    shutil.copytree(sd1_half_bundle, root)
    before = Bundle.open(root).manifest
    holes = sow(root)
    record_goldens(root, lambda *_: None)
    packed = pack(root, holes, tmp_path / "packed.tar.gz")
    grown = unpack(packed, tmp_path / "grown")
    files = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    assert files == {path.relative_to(grown) for path in grown.rglob("*") if path.is_file()}
    assert all((root / file).read_bytes() == (grown / file).read_bytes() for file in files)
    assert Bundle.open(grown).manifest.graphs_digest() != before.graphs_digest()
    build_engines(Bundle.open(grown), "cpu")
    assert all(row.ok for row in verify(Bundle.open(grown), backend="cpu"))


def test_packing_leaves_the_sown_weights_away(sd1_half_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "sown"
    shutil.copytree(sd1_half_bundle, root)
    holes = sow(root)
    with tarfile.open(pack(root, holes, tmp_path / "packed.tar.gz")) as archive:
        kept = sum(member.size for member in archive.getmembers() if member.name != "recipe.json")
    whole = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert whole - kept == sum(hole.bytes for hole in holes) > 0.5 * whole


def test_a_seed_that_is_another_is_found_when_it_grows(sd1_half_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "sown"
    shutil.copytree(sd1_half_bundle, root)
    holes = sow(root)
    wrong = [Hole(**{**{f: getattr(holes[0], f) for f in Hole.__dataclass_fields__}, "seed": 999}), *holes[1:]]
    with pytest.raises(BundleError, match="SHA-256"):
        unpack(pack(root, wrong, tmp_path / "packed.tar.gz"), tmp_path / "grown")


def test_sown_numbers_have_the_weights_own_mean_and_deviation() -> None:
    hole = Hole(file="x", offset=0, count=100_000, dtype="float16", mean=0.5, deviation=0.1, seed=3)
    numbers = np.concatenate(list(hole.blocks())).astype(np.float64)
    assert (numbers.size, hole.bytes) == (100_000, 200_000)
    assert numbers.mean() == pytest.approx(0.5, abs=0.002)
    assert numbers.std() == pytest.approx(0.1, abs=0.002)


def part(name: str, code: str, **limits: object) -> Part:
    lines = f"import sys, json, os, time; result = sys.argv[1]\n{code}"
    defaults = {"most_s": 20.0, **limits}
    return Part(name=name, command=(sys.executable, "-c", lines), **defaults)  # type: ignore[arg-type]


GOOD = "json.dump({'figure': 1}, open(result, 'w'))"


def test_no_part_takes_the_others_down_and_every_one_is_saved(tmp_path: Path) -> None:
    parts = [
        part("raises", f"{GOOD}\nraise SystemError('this went wrong')"),
        part("dies", "os.abort()"),
        part("hangs", f"{GOOD}\ntime.sleep(60)", most_s=1.5),
        part("hangs with children", "import subprocess; subprocess.run(['sleep', '60'])", most_s=1.0),
        part("writes nonsense", "open(result, 'w').write('{')"),
        part("depends", GOOD, needs=("raises",)),
        part("is not here", GOOD, missing="no such library"),
        part("works", GOOD),
    ]
    saved: list[list[str]] = []
    outcomes = run_parts(
        parts, seconds=60, folder=tmp_path, save=lambda so_far: saved.append(list(so_far.parts)), say=lambda _: None
    )
    status = {name: one["status"] for name, one in outcomes.parts.items()}
    assert status == {
        "raises": "failed",
        "dies": "failed",
        "hangs": "cut off",
        "hangs with children": "cut off",
        "writes nonsense": "ok",
        "depends": "skipped",
        "is not here": "skipped",
        "works": "ok",
    }
    assert [len(names) for names in saved] == list(range(1, len(parts) + 1))
    assert outcomes.figures("raises") == outcomes.figures("hangs") == outcomes.figures("works") == {"figure": 1}
    assert outcomes.figures("writes nonsense") == {}
    assert "this went wrong" in outcomes.parts["raises"]["why"]
    assert "SIGABRT" in outcomes.parts["dies"]["why"]
    assert outcomes.parts["depends"]["why"] == "needs raises"
    assert "Traceback (most recent call last):" in outcomes.parts["raises"]["last_lines"]
    assert outcomes.parts["works"]["last_lines"] == outcomes.parts["depends"]["last_lines"] == []


def test_what_there_is_no_time_for_is_skipped_not_begun(tmp_path: Path) -> None:
    parts = [part("first", "time.sleep(1.2)"), part("long", GOOD, least_s=30.0), part("short", GOOD, least_s=0.1)]
    outcomes = run_parts(parts, seconds=6, folder=tmp_path, save=lambda _: None, say=lambda _: None)
    assert [one["status"] for one in outcomes.parts.values()] == ["ok", "skipped", "ok"]
    assert re.search(r"\d s\b", outcomes.parts["long"]["why"])
    assert Outcomes().figures("nothing") == {}


def test_chosen_parts_come_in_the_order_asked_for_after_what_they_need() -> None:
    parts = [
        part("ceilings", ""),
        part("sd15: bundle", ""),
        part("sd15: build cuda", "", needs=("sd15: bundle",)),
        part("sd15: bench cuda", "", needs=("sd15: build cuda",)),
        part("sd15: bench cuda launched", "", needs=("sd15: build cuda",)),
        part("sd15: torch eager", ""),
    ]
    names = [one.name for one in chosen(parts, ["sd15 torch", "sd15 bench cuda", "ceilings", "bench"])]
    assert names == [
        "sd15: torch eager",
        "sd15: bundle",
        "sd15: build cuda",
        "sd15: bench cuda",
        "ceilings",
        "sd15: bench cuda launched",
    ]
    with pytest.raises(SystemExit, match="nothing"):
        chosen(parts, ["sd15", "nothing"])


def test_build_options_are_compared_in_one_run_each_with_engines_of_its_own(tmp_path: Path) -> None:
    present = dict.fromkeys((*BACKEND_NAMES, "torch", "diffusers", "onnx", "pynvml", "pytest"))
    plan = Plan({"sd15": MODELS["sd15"]}, BACKEND_NAMES, present, tmp_path, tmp_path, rehearsal=False)
    parts = {part.name: json.loads(part.command[2]) for part in plan.parts()}
    for backend, ways in {"cuda": ["plain"], "tensorrt": ["level-5", "separate-skips", "aux-streams"]}.items():
        roots = [parts[f"sd15: build {backend} {way}".strip()]["root"] for way in ("", *ways)]
        assert len(set(roots)) == len(roots)
        for way, root in zip(ways, roots[1:], strict=True):
            built = parts[f"sd15: build {backend} {way}"]
            assert built["options"] and BuildOptions(**built["options"]) != BuildOptions()
            assert parts[f"sd15: bench {backend} {way}"]["root"] == root
    assert "sd15: build cuda level-5" not in parts and "sd15: bench tensorrt plain" not in parts


def test_kernels_stand_beside_the_least_that_their_operators_take() -> None:
    kernels = [
        {"kernel": "sm90_xmma_fprop_implicit_gemm_f16", "count": 30, "ms": 6.0},
        {"kernel": "cuApplyLayerNorm<__half>", "count": 144, "ms": 3.0},
        {"kernel": "something_new", "count": 3, "ms": 1.5},
    ]
    found = outcome(steps=3, kernels_ms=12.0, launches=180, kernels=kernels)
    outcomes = Outcomes(parts={"ceilings": outcome(bytes_per_s=4.2e12), "sd15: kernels cuda": found})  # type: ignore[arg-type]
    lines = format_insides(outcomes).split("sd15 on h200: what")[1].splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:] if line}
    convolutions = next(cost for cost in _unet_on("h200")["costs"] if cost["operator"] == "Conv")["seconds"]
    assert cells["convolutions"] == ["10", "2.00", f"{1e3 * convolutions:.2f}", f"{1e3 * convolutions / 2:.0%}"]
    assert cells["all else"][:2] == ["1", "0.50"] and cells["shorter kernels, not listed"][1] == "0.50"
    assert cells["a step"][:3] == ["60", "4.00", f"{1e3 * _unet_on('h200')['fused_s']:.2f}"]


def _unet_on(gpu: str) -> Any:
    return json.loads((BENCHMARKS / "results/roofline.json").read_text())["models"]["sd15"]["unet"][gpu]["fp16"]


def event(name: str, ms: float, operator: str) -> dict[str, object]:
    args = {"op_name": operator, "provider": "CUDAExecutionProvider", "input_type_shape": [{"float16": [2, 4]}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": 1e3 * ms, "args": args}


def test_a_profile_is_summed_up_by_operator_over_its_last_runs() -> None:
    events: list[dict[str, object]] = [{"cat": "Session", "name": "session_initialization", "dur": 9e9, "args": {}}]
    for first, second, cast in [(90.0, 9.0, 5.0), (2.0, 1.0, 0.5), (4.0, 1.0, 0.5), (3.0, 1.0, 0.5)]:
        events += [event("a", first, "Conv"), event("b", second, "Conv"), event("c", cast, "Cast")]
    events.append({"cat": "Kernel", "name": "gemm", "dur": 700.0, "args": {}})
    found = operators(events, last=3)
    assert (found["run_ms"], found["nodes"]) == (pytest.approx(4.5), 3)
    assert [(row["operator"], row["count"], row["ms"]) for row in found["operators"]] == [
        ("Conv", 2, pytest.approx(4.0)),
        ("Cast", 1, pytest.approx(0.5)),
    ]
    assert [row["node"] for row in found["largest_nodes"]] == ["a", "b", "c"]
    assert found["kernels"] == [{"kernel": "gemm", "count": 1, "ms": pytest.approx(0.7)}]


def test_a_test_file_is_run_as_a_part_and_what_it_prints_as_json_is_kept(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_few.py"
    file.write_text(
        "import json, pytest\n"
        "def test_tells(): print(json.dumps({'copy_s': 0.5}))\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_skipped(): pass\n"
    )
    report = run_tests(file)
    assert (report["exit_code"], report["passed"], report["failed"], report["skipped"]) == (1, 1, 1, 1)
    assert report["told"] == [{"copy_s": 0.5}]
    assert any("assert 1 == 2" in line for line in report["tests"]["test_fails"]["why"])
    assert report["tests"]["test_tells"]["why"] is None


def test_pictures_that_differ_or_were_not_drawn_are_told() -> None:
    black = np.zeros((1, 4, 4, 3), np.uint8)
    expected = {"same": black, "far": black, "other shape": black, "not drawn": black}
    found = {"same": black, "far": black + 90, "other shape": black[:, :2], "not drawn": "EngineError: no"}
    rows = compare(expected, found)
    assert [rows[name]["ok"] for name in expected] == [True, False, False, False]
    assert (rows["far"]["mean"], rows["far"]["largest"], rows["not drawn"]["error"]) == (90.0, 90, "EngineError: no")


def outcome(**figures: object) -> dict[str, object]:
    return {"status": "ok", "seconds": 1.0, "why": None, "last_lines": [], "figures": figures}


def test_speed_is_told_beside_torchs_in_the_same_run_and_the_measured_ceiling() -> None:
    def report(step_s: float) -> dict[str, object]:
        seconds = {name: {"summary": {"p50": step_s, "p95": step_s}} for name in ("step", "total")}
        variant = {"seconds": seconds, "outside_engines": {"summary": {"p50": 0.01}}, "device_bytes": 2**20}
        return outcome(variants=[variant])

    parts = {
        "ceilings": outcome(tflops=400.0),
        "sd15: bench cuda": report(0.008),
        "sd15: bench cuda launched": report(0.005),
        "sd15: torch eager": outcome(step_s={"p50": 0.010}),
        "sd15: torch recorded": outcome(step_s={"p50": 0.004}),
        "sd15: profile cuda": outcome(
            operators=[{"operator": "Conv", "provider": "CUDAExecutionProvider", "count": 2, "ms": 4.0}], kernels=[]
        ),
    }
    outcomes = Outcomes(parts=parts)  # type: ignore[arg-type]
    assert format_insides(outcomes).splitlines()[3:] == ["| Conv CUDAExecutionProvider | 2 | 4.000 |"]
    table = format_table({"sd15": MODELS["sd15"]}, ("cuda", "tensorrt"), outcomes)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert len({len(row) for row in rows}) == 1
    assert [row[1:8] for row in rows[2:]] == [
        ["latentrt, cuda", "8.000", "125.0", "50.2%", "1.25", "0.50", ""],
        ["latentrt, cuda, launched", "5.000", "200.0", "80.3%", "2.00", "0.80", ""],
        ["torch eager", "10.000", "100.0", "40.2%", "1.00", "0.40", ""],
        ["torch recorded", "4.000", "250.0", "100.4%", "2.50", "1.00", ""],
    ]


def suite(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(find_gpu() is not None, reason="an NVIDIA GPU answers here")
def test_without_a_gpu_the_suite_says_so_and_exits_with_2(tmp_path: Path) -> None:
    result = suite("--output", tmp_path / "gpu.json")
    assert (result.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "--cpu" in result.stderr.splitlines()[-1]


# Takes the place of the finder of installed packages: those that a bare machine lacks are not found.
HIDING = """
import sys
from importlib.machinery import PathFinder
class Without:
    find_spec = staticmethod(lambda name, path=None, target=None: None
        if name.partition(".")[0] in {"diffusers", "accelerate", "onnxscript", "scipy"}
        else PathFinder.find_spec(name, path, target))
    find_distributions, invalidate_caches = PathFinder.find_distributions, PathFinder.invalidate_caches
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.skipif(find_gpu() is not None, reason="an NVIDIA GPU answers here")
def test_the_rehearsal_runs_every_kind_of_part_where_a_bare_machines_packages_are_all(
    demo_bundle: Path, tmp_path: Path
) -> None:
    trees = {name: tmp_path / name for name in ("bundles", "wheels")}
    for name, tree in trees.items():
        tree.mkdir()
        if name == "bundles":
            pack(demo_bundle, [], tree / "demo.tar.gz")
        else:
            (tree / "sitecustomize.py").write_text(HIDING)
        cut(tree, name, tmp_path / "pieces")
    places = {"KEPT": tmp_path / "kept", "OUT": tmp_path / "out", "PIECES": tmp_path / "pieces"}
    environment = {**os.environ, "PYTHON": sys.executable, **{name: str(place) for name, place in places.items()}}
    command = ["bash", str(BENCHMARKS / "gpu_machine.sh"), "rehearse", "1500"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "out" / "gpu.json").read_text())
    parts = document["parts"]
    assert not [name for name, part in parts.items() if part["status"] in ("failed", "cut off")], result.stdout
    ours = ["bundle", "build cpu", "bench cpu", "bench cpu launched", "verify cpu", "pictures cpu", "profile cpu"]
    assert [parts[f"demo: {name}"]["status"] for name in ours] == ["ok"] * len(ours), result.stdout
    assert [parts[name]["status"] for name in ("ceilings", "tiny: torch eager")] == ["ok", "ok"]
    assert parts["tiny: diffusers eager"]["why"] == "diffusers is not installed"
    same = parts["demo: pictures cpu"]["figures"]
    assert {row["mean"] for row in same["recorded"].values()} == {0.0}
    assert same["differs from text by"]["a LoRA"] > 2 * LARGEST  # so that one that does nothing is found
    (variant,) = parts["demo: bench cpu"]["figures"]["variants"]
    assert variant["prompts"]["share"] >= 0.75
    assert parts["demo: verify cpu"]["figures"]["components"]["unet"]["ok"]
    assert {row["operator"] for row in parts["demo: profile cpu"]["figures"]["operators"]} >= {"Conv", "MatMul"}
    assert document["present"]["cpu"] is None
    assert document["machine"]["versions"]["latentrt"] and document["machine"]["nvml"] == {}
    assert "| demo | latentrt, cpu |" in document["table"]
    assert (tmp_path / "out" / "gpu.md").read_text().startswith(document["table"])


def test_what_went_well_before_is_kept_and_not_run_again(tmp_path: Path) -> None:
    def run(*parts: Part, before: Outcomes | None = None) -> Outcomes:
        return run_parts(parts, seconds=60, folder=tmp_path, save=lambda _: None, say=lambda _: None, before=before)

    first = run(part("well", GOOD), part("badly", "sys.exit(1)"))
    needy = part("needy", GOOD, needs=("well",))
    second = run(part("well", "sys.exit(1)"), part("badly", GOOD), needy, before=first)
    assert {name: one["status"] for name, one in second.parts.items()} == dict.fromkeys(
        ("well", "badly", "needy"), "ok"
    )
    assert first.parts["badly"]["status"] == "failed"


def test_what_a_gpu_alone_runs_uses_what_there_is() -> None:
    """Nothing runs the contract where there is no GPU: mypy finds what was renamed meanwhile."""
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "mypy", str(tests / "test_cuda_contract.py")]
    found = subprocess.run(command, cwd=tests.parent, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
