"""Everything worth knowing about one GPU, in one command of ten minutes at most.

    python benchmarks/gpu_suite.py --bundles .cache/packed [--seconds 540] [--output benchmarks/results/gpu.json]
    python benchmarks/gpu_suite.py --cpu                                   # the same flow as a rehearsal, no GPU

Uses what is present (TensorRT, TensorRT-RTX, ONNX Runtime's CUDA provider, torch, diffusers) and says what is not.
For the demo, SD 1.5 and SD-Turbo: builds engines, verifies the golden pairs, measures latency by stage, steps a
second, time outside the engines and memory; beside them the same UNets in torch, eager and compiled, and the ratio to
the arithmetic floor. Bundles are taken from --bundles (a directory or a `.tar.gz` of packed_bundle.py by the model's
name), or exported here where torch and diffusers are installed.

Each part runs in a process of its own with a time of its own, and the result is saved after each: a part that
crashes, hangs or is cut off leaves the others' figures. Exits with 2 where there is no GPU, with 1 where a part
failed, with 0 otherwise: a part that was skipped or cut off says so in the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from parts import Outcomes, Part, keep, run_parts

from latentrt.engines.backends import BACKENDS
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.cuda.device import find_gpu
from latentrt.runtime.bench.machine import describe, now

HALF_TFLOPS = 788.0  # dense, measured on an H200 with random data: what the floors are counted against
BACKEND_NAMES = ("tensorrt", "tensorrt-rtx", "cuda")
REHEARSAL = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model of the suite.

    tflop: of one UNet pass for one row at `size`
    shape: its name in plain_unet.py; None for no peers
    ours: whether latentrt draws it; exported: whether the suite makes its bundle where --bundles has none
    """

    shape: str | None
    size: int
    steps: int
    guidance: float
    sampler: str
    tflop: float | None
    ours: bool = True
    exported: bool = True

    @property
    def rows(self) -> int:
        return 2 if self.guidance > 1 else 1

    @property
    def floor_s(self) -> float | None:
        """Return the least seconds of a step: its arithmetic at the tensor cores' rate."""
        return None if self.tflop is None else self.rows * self.tflop / HALF_TFLOPS


# tests/test_gpu_suite.py counts the TFLOP again.
MODELS = {
    "demo": Model(shape=None, size=128, steps=20, guidance=3.0, sampler="dpmpp_2m_karras", tflop=None),
    "sd15": Model(shape="sd15", size=512, steps=20, guidance=7.5, sampler="euler", tflop=0.80327),
    "turbo": Model(shape="turbo", size=512, steps=1, guidance=0.0, sampler="euler", tflop=0.80426),
    "sdxl": Model(shape="sdxl", size=1024, steps=20, guidance=7.5, sampler="euler", tflop=6.76124, exported=False),
}
TINY = Model(shape="tiny", size=64, steps=2, guidance=7.5, sampler="euler", tflop=None, ours=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Path(".cache/packed"))
    parser.add_argument("--models", default=None, help="Between commas. Default: demo,sd15,turbo,sdxl; --cpu: demo.")
    parser.add_argument("--seconds", type=float, default=540.0, help="For everything.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--work", type=Path, default=None, help="Where bundles grow. Default: a temporary folder.")
    parser.add_argument("--cpu", action="store_true", help="Rehearse on this processor.")
    parser.add_argument("--part", nargs=2, metavar=("PART", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_one(*arguments.part)
        return
    if not arguments.cpu and find_gpu() is None:
        print(f"gpu_suite: {no_gpu()}; --cpu rehearses the same flow on this processor", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(suite(arguments, arguments.work or Path(temporary)))


def no_gpu() -> str:
    """Say why no GPU answers."""
    if importlib.util.find_spec("cuda") is None:
        return "no GPU can be asked: cuda-bindings is not installed (pip install 'latentrt[cuda]')"
    return "no NVIDIA GPU answers here"


def suite(arguments: argparse.Namespace, work: Path) -> int:
    """Run every part and save the result after each. Returns the exit code."""
    work.mkdir(parents=True, exist_ok=True)
    backends = (REHEARSAL,) if arguments.cpu else BACKEND_NAMES
    names = (arguments.models or ("demo" if arguments.cpu else ",".join(MODELS))).split(",")
    models = {name: MODELS[name] for name in names} | ({"tiny": TINY} if arguments.cpu else {})
    present = presence()
    document = {"kind": "latentrt gpu suite", "created": now(), "machine": describe(), "present": present}

    def save(outcomes: Outcomes) -> None:
        table = format_table(models, backends, outcomes)
        whole = {**document, "half_tflops": HALF_TFLOPS, "parts": outcomes.parts, "table": table}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        keep(whole, arguments.output)
        arguments.output.with_suffix(".md").write_text(table)

    for name, why in present.items():
        print(f"{name}: {why or 'present'}", flush=True)
    parts = plan(models, backends, present, arguments.bundles, work, rehearsal=arguments.cpu)
    say = partial(print, flush=True)
    outcomes = run_parts(parts, seconds=arguments.seconds, folder=work, save=save, say=say)
    print(f"\n{format_table(models, backends, outcomes)}\n{arguments.output}")
    return int(any(part["status"] == "failed" for part in outcomes.parts.values()))


def presence() -> dict[str, str | None]:
    """Name what the suite can use, each with None or why it cannot be used."""
    found: dict[str, str | None] = {}
    for name in (*BACKEND_NAMES, REHEARSAL):
        backend = BACKENDS[name]  # type: ignore[index]
        builds = backend.cannot_build(BuildOptions()) if name in BACKEND_NAMES[:2] else None
        error = backend.unavailable() or builds
        found[name] = None if error is None else str(error)
    for package in ("torch", "diffusers", "onnx", "pynvml"):
        found[package] = None if importlib.util.find_spec(package) else f"{package} is not installed"
    return found


def plan(
    models: Mapping[str, Model],
    backends: tuple[str, ...],
    present: Mapping[str, str | None],
    bundles: Path,
    work: Path,
    *,
    rehearsal: bool,
) -> list[Part]:
    """Lay out the parts, what is worth most first: our own figures of a model, then its peers."""
    device = "cpu" if rehearsal else "cuda"
    parts = [_part("ceilings", {"device": device}, most_s=40, missing=present["torch"])]
    for name, model in models.items():
        if model.ours:
            parts += _our_parts(name, model, backends, present, bundles, work, rehearsal=rehearsal)
        if model.shape is not None:
            parts += _peer_parts(name, model, present, device)
    return parts


def _part(name: str, facts: Mapping[str, Any], **limits: Any) -> Part:
    job = json.dumps({"name": name, **facts})
    return Part(name=name, command=(sys.executable, __file__, "--part", job), **limits)


def _our_parts(
    name: str,
    model: Model,
    backends: tuple[str, ...],
    present: Mapping[str, str | None],
    bundles: Path,
    work: Path,
    *,
    rehearsal: bool,
) -> list[Part]:
    root = str((work / name).absolute())
    source = {"root": root, "model": name, "bundles": str(bundles.absolute())}
    missing = _no_bundle(name, model, present, bundles, work)
    parts = [_part(f"{name}: bundle", source, most_s=240, missing=missing)]
    for backend in backends:
        facts = {"root": root, "backend": backend, "model": name, "rehearsal": rehearsal}
        build, verify, bench = (f"{name}: {verb} {backend}" for verb in ("build", "verify", "bench"))
        parts += [
            _part(build, facts, most_s=200, needs=(f"{name}: bundle",), missing=present[backend] or present["onnx"]),
            _part(verify, facts, most_s=60, needs=(build,)),
            _part(bench, facts, most_s=240 if rehearsal else 60, least_s=8, needs=(build,)),
        ]
    return parts


def _no_bundle(name: str, model: Model, present: Mapping[str, str | None], bundles: Path, work: Path) -> str | None:
    """Say why there can be no bundle of a model, or return None."""
    if any(path.exists() for path in (work / name, bundles / name, bundles / f"{name}.tar.gz")):
        return None
    if not model.exported:
        return f"{bundles} has no {name}.tar.gz, and the suite does not export it"
    absent = present["torch"] or present["diffusers"]
    return absent and f"{bundles} has no {name}.tar.gz, and exporting one needs torch and diffusers: {absent}"


def _peer_parts(name: str, model: Model, present: Mapping[str, str | None], device: str) -> list[Part]:
    facts = {"model": name, "device": device}
    missing = {"torch": present["torch"], "diffusers": present["torch"] or present["diffusers"]}
    hows = ("eager",) if device == "cpu" else ("eager", "compiled")
    peers = [(library, how) for library in ("torch", "diffusers") for how in hows]
    if not model.exported:  # random_checkpoint.py, of which diffusers' pipeline is made, does not have it
        peers = [(library, how) for library, how in peers if library == "torch"]
    return [
        _part(
            f"{name}: {library} {how}",
            {**facts, "how": how},
            most_s=150 if how == "compiled" or device == "cpu" else 45,
            least_s=10,
            missing=missing[library],
        )
        for library, how in peers
    ]


# What each kind of part does, in its own process: figures are kept as soon as they are there.


def run_one(job: str, result: str) -> None:
    """Run the part that a job describes."""
    facts = json.loads(job)
    words = facts["name"].split(": ")[-1].split()
    JOBS[words[0]](facts, partial(keep, result=Path(result)))


Keep = Callable[[Mapping[str, Any]], None]


def do_ceilings(facts: Mapping[str, Any], done: Keep) -> None:
    from torch_peers import ceilings

    small = {"size": 512, "copy_bytes": 1 << 24} if facts["device"] == "cpu" else {}
    done(ceilings(facts["device"], **small))


def do_bundle(facts: Mapping[str, Any], done: Keep) -> None:
    """Find the model's bundle, or make it."""
    import shutil

    from latentrt.engines.bundle.files import Bundle

    source, root = Path(facts["bundles"]) / facts["model"], Path(facts["root"])
    packed = source.with_name(f"{source.name}.tar.gz")
    if (root / "manifest.json").is_file():
        how = "was there"
    elif packed.is_file():
        from packed_bundle import unpack

        unpack(packed, root)
        how = f"unpacked from {packed.name}"
    elif source.is_dir():
        shutil.copytree(source, root, ignore=shutil.ignore_patterns("engines"))
        how = f"copied from {source}"
    else:
        export(facts["model"], root)
        how = "exported here"
    manifest = Bundle.open(root).manifest
    weights = sum(component.weights_bytes for component in manifest.components.values())
    done({"how": how, "weights_bytes": weights, "precision": manifest.precision})


def export(model: str, root: Path) -> None:
    """Export the demo, or a random checkpoint of a real size, in float16."""
    from random_checkpoint import save_random

    from latentrt.export.export import export_checkpoint

    checkpoint = (
        "demo" if model == "demo" else str(save_random(model, root.with_name(f"{model}-checkpoint"), half=True))
    )
    export_checkpoint(checkpoint, root, precision="fp16")


def do_build(facts: Mapping[str, Any], done: Keep) -> None:
    from latentrt.engines.build import build_engines
    from latentrt.engines.bundle.files import Bundle
    from latentrt.engines.progress import terminal_report

    with terminal_report() as report:
        record = build_engines(Bundle.open(facts["root"]), facts["backend"], report=report)
    done({"build_s": record.build_s, "bytes": sum(file.bytes for file in record.files.values())})


def do_verify(facts: Mapping[str, Any], done: Keep) -> None:
    from latentrt.engines.bundle.files import Bundle
    from latentrt.engines.verify.verify import verify

    rows = list(verify(Bundle.open(facts["root"]), backend=facts["backend"]))
    done({"components": {row.what: {"ok": row.ok, "error": row.error, "limit": row.limit} for row in rows}})
    if not all(row.ok for row in rows):
        sys.stderr.write("; ".join(f"{row.what}: {row.message}" for row in rows if not row.ok) + "\n")
        sys.exit(2)


def do_bench(facts: Mapping[str, Any], done: Keep) -> None:
    """Measure with the harness of `latentrt bench`; the demo's prompts are scored too."""
    import dataclasses

    from latentrt.export.demo.scoring import held_out_prompts
    from latentrt.runtime.bench.measure import Asked, run_bench

    model, rehearsal = MODELS[facts["model"]], facts["rehearsal"]
    asked = Asked(
        steps=(model.steps,),
        guidances=(model.guidance,),
        samplers=(model.sampler,),
        backends=(facts["backend"],),
        rounds=5 if rehearsal else 60,
        seconds=4.0 if rehearsal else 15.0,
        cold=1,
        golden=False,  # a part of its own: an engine that drifts shows its speed all the same
    )
    done(msgspec.to_builtins(run_bench(facts["root"], asked)))
    if facts["model"] == "demo":
        scored = dataclasses.replace(asked, accuracy=8 if rehearsal else 48)
        done(msgspec.to_builtins(run_bench(facts["root"], scored, prompt_sets={"demo": held_out_prompts})))


def do_torch(facts: Mapping[str, Any], done: Keep) -> None:
    from torch_peers import loop_seconds

    model = {**MODELS, "tiny": TINY}[facts["model"]]
    for figures in loop_seconds(
        str(model.shape),
        facts["how"],
        side=model.size // 8,
        guided=model.rows == 2,
        steps=model.steps,
        device=facts["device"],
        most_seconds=3.0 if facts["device"] == "cpu" else 20.0,
    ):
        done(figures)


def do_diffusers(facts: Mapping[str, Any], done: Keep) -> None:
    from torch_peers import diffusers_seconds

    model = {**MODELS, "tiny": TINY}[facts["model"]]
    for figures in diffusers_seconds(
        str(model.shape),
        facts["how"],
        size=model.size,
        guided=model.rows == 2,
        steps=model.steps,
        device=facts["device"],
        most_seconds=3.0 if facts["device"] == "cpu" else 20.0,
    ):
        done(figures)


JOBS: dict[str, Callable[[Mapping[str, Any], Keep], None]] = {
    "ceilings": do_ceilings,
    "bundle": do_bundle,
    "build": do_build,
    "verify": do_verify,
    "bench": do_bench,
    "torch": do_torch,
    "diffusers": do_diffusers,
}


def format_table(models: Mapping[str, Model], backends: tuple[str, ...], outcomes: Outcomes) -> str:
    """Return the figures as Markdown: a row for each way to run a model."""
    head = [
        "model",
        "with",
        "step ms",
        "steps/s",
        "of the floor",
        "picture p50 ms",
        "p95",
        "outside",
        "GPU MiB",
        "error",
    ]
    lines = [head, ["---"] * len(head)]
    for name, model in models.items():
        lines += [_our_row(name, model, backend, outcomes) for backend in backends if model.ours]
        if model.shape is not None:
            ways = [f"{library} {how}" for library in ("torch", "diffusers") for how in ("eager", "compiled")]
            lines += [_peer_row(name, model, way, outcomes) for way in ways if f"{name}: {way}" in outcomes.parts]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _our_row(name: str, model: Model, backend: str, outcomes: Outcomes) -> list[str]:
    report, checked = outcomes.figures(f"{name}: bench {backend}"), outcomes.figures(f"{name}: verify {backend}")
    errors = [row["error"] for row in checked.get("components", {}).values() if row["error"] is not None]
    error = f"{max(errors):.1e}" if errors else ""
    if not report:
        return [name, f"latentrt, {backend}", *[_status(outcomes, name, backend)] + [""] * 6, error]
    (variant,) = report["variants"]
    step, whole = variant["seconds"]["step"]["summary"], variant["seconds"]["total"]["summary"]
    memory = variant["device_bytes"]
    return [
        name,
        f"latentrt, {backend}",
        *_step_cells(step["p50"], model),
        f"{1e3 * whole['p50']:.2f}",
        f"{1e3 * whole['p95']:.2f}",
        f"{variant['outside_engines']['summary']['p50']:.2%}",
        "" if memory is None else f"{memory / 2**20:.0f}",
        error,
    ]


def _status(outcomes: Outcomes, name: str, backend: str) -> str:
    for verb in ("bundle", f"build {backend}", f"bench {backend}"):
        part = outcomes.parts.get(f"{name}: {verb}")
        if part is not None and part["status"] != "ok":
            return f"{verb}: {part['status']}, {str(part['why'])[:120]}".replace("|", "/")
    return ""


def _peer_row(name: str, model: Model, way: str, outcomes: Outcomes) -> list[str]:
    part = outcomes.parts[f"{name}: {way}"]
    figures = part["figures"] or {}
    if not figures:
        why = f"{part['status']}, {str(part['why'])[:120]}".replace("|", "/")
        return [name, way, why, *[""] * 7]
    memory = figures.get("device_bytes")
    step, whole = figures.get("step_s"), figures.get("picture_s")
    return [
        name,
        way,
        *(_step_cells(step["p50"], model) if step else [""] * 3),
        *([f"{1e3 * whole['p50']:.2f}", f"{1e3 * whole['p95']:.2f}"] if whole else ["", ""]),
        "",
        "" if memory is None else f"{memory / 2**20:.0f}",
        "",
    ]


def _step_cells(step_s: float, model: Model) -> list[str]:
    share = "" if model.floor_s is None else f"{model.floor_s / step_s:.1%}"
    return [f"{1e3 * step_s:.3f}", f"{1 / step_s:.1f}", share]


if __name__ == "__main__":
    main()
