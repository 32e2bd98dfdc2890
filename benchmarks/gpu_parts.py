"""What each part of the GPU suite does, in a process of its own: `python gpu_parts.py JOB RESULT`.

JOB is JSON: `do` names the kind, the rest is for its function. Figures are kept as soon as they are there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from gpu_models import ALL_MODELS, MODELS
from parts import keep

Keep = Callable[[Mapping[str, Any]], None]


def main() -> None:
    facts = json.loads(sys.argv[1])
    JOBS[facts["do"]](facts, partial(keep, result=Path(sys.argv[2])))


def do_seam(facts: Mapping[str, Any], done: Keep) -> None:
    """Hold the device seam's contract against real CUDA."""
    from gpu_probes import run_tests

    report = run_tests(Path(facts["tests"]))
    done(report)
    if report["exit_code"]:
        sys.exit(1)


def do_ceilings(facts: Mapping[str, Any], done: Keep) -> None:
    from torch_peers import ceilings

    small = {"size": 512, "copy_bytes": 1 << 24} if facts["device"] == "cpu" else {}
    for figures in ceilings(facts["device"], **small):
        done(figures)


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
    import shutil

    from latentrt.engines.build import build_engines
    from latentrt.engines.build_options import BuildOptions
    from latentrt.engines.bundle.files import Bundle
    from latentrt.engines.progress import terminal_report

    root, options = Path(facts["root"]), BuildOptions(**facts["options"])
    if not root.exists():  # a bundle of its own for other options, so that each opens its own engines
        shutil.copytree(facts["base"], root, ignore=shutil.ignore_patterns("engines"), copy_function=os.link)
    with terminal_report() as report:
        record = build_engines(Bundle.open(root), facts["backend"], options=options, report=report)
    done({"build_s": record.build_s, "bytes": sum(file.bytes for file in record.files.values())})


def do_verify(facts: Mapping[str, Any], done: Keep) -> None:
    from gpu_probes import opened_so

    from latentrt.engines.bundle.files import Bundle
    from latentrt.engines.verify.verify import verify

    with opened_so(None, facts["settings"]):
        rows = list(verify(Bundle.open(facts["root"]), backend=facts["backend"]))
    done({"components": {row.what: {"ok": row.ok, "error": row.error, "limit": row.limit} for row in rows}})
    if not all(row.ok for row in rows):
        sys.stderr.write("; ".join(f"{row.what}: {row.message}" for row in rows if not row.ok) + "\n")
        sys.exit(2)


def do_bench(facts: Mapping[str, Any], done: Keep) -> None:
    """Measure with the harness of `latentrt bench`; the demo's prompts are scored too."""

    from gpu_probes import opened_so

    from latentrt.export.demo.scoring import held_out_prompts
    from latentrt.runtime.bench.measure import Asked, run_bench

    model, rehearsal = MODELS[facts["model"]], facts["rehearsal"]
    asked = Asked(
        steps=(model.steps,),
        guidances=(model.guidance,),
        samplers=(model.sampler,),
        backends=(facts["backend"],),
        rounds=5 if rehearsal else 30,
        seconds=4.0 if rehearsal else 6.0,
        cold=0,  # a process of its own, as long as everything else here
        golden=False,  # a part of its own: an engine that drifts shows its speed all the same
    )
    with opened_so(facts["cuda_graphs"], facts["settings"]) as load:
        report = msgspec.to_builtins(run_bench(facts["root"], asked, load=load))
        done(report)
        if facts["scored"]:
            scored = msgspec.structs.replace(asked, rounds=3, seconds=0.5, accuracy=8 if rehearsal else 48)
            further = run_bench(facts["root"], scored, prompt_sets={"demo": held_out_prompts}, load=load)
            report["variants"][0]["prompts"] = msgspec.to_builtins(further.variants[0].prompts)
            done(report)


def do_pictures(facts: Mapping[str, Any], done: Keep) -> None:
    """Draw every kind of request, with recorded kernels and without, and compare with the CPU's engines."""
    from gpu_pictures import compare, draw_all, requests_of, unlike

    from latentrt.engines.build import build_engines
    from latentrt.engines.bundle.files import Bundle

    root = facts["root"]
    build_engines(Bundle.open(root), "cpu")
    requests = requests_of(facts["model"], Path(facts["folder"]))
    expected = draw_all(root, "cpu", requests)
    first, *others = requests
    figures: dict[str, Any] = {f"differs from {first} by": {name: unlike(expected, first, name) for name in others}}
    wrong = []
    for name, graphs in (("launched", False), ("recorded", True)):
        found = draw_all(root, facts["backend"], requests, cuda_graphs=graphs)
        figures[name] = compare(expected, found)
        figures[f"{name}, differs from {first} by"] = {each: unlike(found, first, each) for each in others}
        done(figures)
        wrong += [f"{name}, {what}: {row}" for what, row in figures[name].items() if not row["ok"]]
    if wrong:
        sys.stderr.write("\n".join(wrong) + "\n")
        sys.exit(1)


def do_batcher(facts: Mapping[str, Any], done: Keep) -> None:
    """Measure what sharing stages gives, with few slots and with many."""
    from gpu_batcher import share_stages

    figures, rehearsal = list[Mapping[str, Any]](), facts["rehearsal"]
    for slots in (2,) if rehearsal else (4, 8, 16):
        pictures = 4 if rehearsal else 32
        figures.append(
            share_stages(
                facts["root"], facts["backend"], MODELS[facts["model"]], slots=slots, pictures=pictures, rounds=2
            )
        )
        done({"shared": figures})
    if not all(each["pictures are"]["ok"] for each in figures):
        sys.stderr.write("; ".join(str(each["pictures are"]) for each in figures) + "\n")
        sys.exit(1)


def do_profile(facts: Mapping[str, Any], done: Keep) -> None:
    """Find out which operators of the denoiser take the time."""
    from gpu_probes import profile_operators

    done(profile_operators(facts["root"], facts["backend"], MODELS[facts["model"]], Path(facts["folder"])))


def do_kernels(facts: Mapping[str, Any], done: Keep) -> None:
    """Find out which of the GPU's kernels take the time."""
    from gpu_probes import profile_kernels

    done(profile_kernels(facts["root"], facts["backend"], MODELS[facts["model"]]))


def do_torch(facts: Mapping[str, Any], done: Keep) -> None:
    from torch_peers import loop_seconds

    model = ALL_MODELS[facts["model"]]
    for figures in loop_seconds(
        str(model.shape),
        facts["how"],
        side=model.size // 8,
        guided=model.rows == 2,
        steps=model.steps,
        device=facts["device"],
        most_seconds=3.0 if facts["device"] == "cpu" else 6.0,
    ):
        done(figures)


def do_diffusers(facts: Mapping[str, Any], done: Keep) -> None:
    from torch_peers import diffusers_seconds

    model = ALL_MODELS[facts["model"]]
    for figures in diffusers_seconds(
        str(model.shape),
        facts["how"],
        size=model.size,
        guided=model.rows == 2,
        steps=model.steps,
        device=facts["device"],
        most_seconds=3.0 if facts["device"] == "cpu" else 6.0,
    ):
        done(figures)


JOBS: dict[str, Callable[[Mapping[str, Any], Keep], None]] = {
    "seam": do_seam,
    "ceilings": do_ceilings,
    "bundle": do_bundle,
    "build": do_build,
    "verify": do_verify,
    "bench": do_bench,
    "pictures": do_pictures,
    "batcher": do_batcher,
    "profile": do_profile,
    "kernels": do_kernels,
    "torch": do_torch,
    "diffusers": do_diffusers,
}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # such a machine reaches nothing, and a try takes minutes
    main()
