"""Looking into what runs on a GPU: tests of the seam, ONNX Runtime told otherwise, operators and kernels by time."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_models import Model

STEPS = 3  # of a profiled picture
MOST = 25  # operators and kernels that are kept
PROMPT = "a large red circle on a striped blue background"


def run_tests(tests: Path) -> dict[str, Any]:
    """Run a test file by itself. Returns each test's outcome, and the lines of JSON that the tests printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        alone = ["-c", os.devnull, "--noconftest", "-p", "no:cacheprovider"]  # nothing of the project's other tests
        command = [sys.executable, "-m", "pytest", str(tests), *alone, "-s", "-q", f"--junitxml={report}"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stdout.write(ran.stdout + ran.stderr)
        cases = ElementTree.parse(report).iter("testcase") if report.is_file() else ()
        outcomes = {f"{case.get('name')}": _outcome(case) for case in cases}
    counts = {
        kind: sum(one["outcome"] == kind for one in outcomes.values()) for kind in ("passed", "failed", "skipped")
    }
    return {"exit_code": ran.returncode, **counts, "tests": outcomes, "told": _json_lines(ran.stdout)}


def _outcome(case: ElementTree.Element) -> dict[str, Any]:
    what = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    kind = "passed" if what is None else "skipped" if what.tag == "skipped" else "failed"
    why = None if what is None else (what.text or what.get("message") or "").splitlines()[-30:]
    return {"outcome": kind, "seconds": float(case.get("time", 0)), "why": why}


def _json_lines(text: str) -> list[Any]:
    """Return what tests printed as JSON. pytest may write a dot before it."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            if "{" in line:
                found.append(json.loads(line[line.index("{") :]))
    return found


@contextlib.contextmanager
def opened_so(cuda_graphs: bool | None, settings: Mapping[str, str]) -> Iterator[Callable[..., Any]]:
    """Give a `load` that opens pipelines in another way than the product: see `gpu_models.Way`."""
    from latentrt.engines.onnxruntime import backend
    from latentrt.runtime.bench.timing import TimedPipeline

    plain = backend.OnnxRuntimeOptions
    backend.OnnxRuntimeOptions = partial(plain, settings=settings)  # type: ignore[assignment,misc]
    try:
        yield partial(TimedPipeline.load, cuda_graphs=cuda_graphs, check="size")
    finally:
        backend.OnnxRuntimeOptions = plain  # type: ignore[misc]


@contextlib.contextmanager
def profiled(folder: Path) -> Iterator[None]:
    """Have every session of ONNX Runtime that is opened write a profile when it is closed, named for its graph."""
    from latentrt.engines.onnxruntime import session

    plain = session.open_session

    def opened(path: Path, options: Any, *rest: Any) -> Any:
        options.enable_profiling, options.profile_file_prefix = True, str(folder / path.stem)
        return plain(path, options, *rest)

    session.open_session = opened
    try:
        yield
    finally:
        session.open_session = plain


def profile_operators(root: str, backend: str, model: Model, folder: Path) -> dict[str, Any]:
    """Draw two pictures of three steps with ONNX Runtime's profiler. Returns the second's operators.

    The denoiser's are milliseconds a step; beside them are the decoder's.

    CUDA waits after every launch, so that an operator's time is the GPU's and a few microseconds of launching.
    """
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # read when CUDA starts, which it has not yet
    folder.mkdir(parents=True, exist_ok=True)
    with profiled(folder), _loaded(root, backend) as draw:
        draw(model, STEPS)
        draw(model, STEPS)
    # Profiles are written when sessions are closed.
    found = {name: json.loads(next(folder.glob(f"{name}_*.json")).read_text()) for name in ("unet", "vae_decoder")}
    decoder = operators(found["vae_decoder"], last=1)
    return {"steps": STEPS, "launch_blocking": True, **operators(found["unet"], last=STEPS), "decoder": decoder}


def operators(events: list[dict[str, Any]], *, last: int) -> dict[str, Any]:
    """Sum up a profile: milliseconds a run by kind of operator and by node, medians of the last runs of each node."""
    nodes, about = defaultdict[str, list[float]](list), dict[str, dict[str, Any]]()
    kernels = defaultdict[str, list[float]](list)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            nodes[name].append(event["dur"] / 1e3)
            about[name] = event["args"]
        elif event["cat"] == "Kernel":
            kernels[event["name"]].append(event["dur"] / 1e3)
    each = {name: statistics.median(times[-last:]) for name, times in nodes.items()}
    whole = sum(each.values())
    kinds = defaultdict[tuple[str, str], list[float]](list)
    for name, ms in each.items():
        kinds[about[name]["op_name"], about[name].get("provider", "")].append(ms)
    return {
        "run_ms": whole,
        "nodes": len(each),
        "operators": _largest(
            {"operator": kind, "provider": place, "count": len(ms), "ms": sum(ms), "share": sum(ms) / whole}
            for (kind, place), ms in kinds.items()
        ),
        "largest_nodes": _largest(
            {"node": name, "operator": about[name]["op_name"], "ms": ms, "shapes": about[name].get("input_type_shape")}
            for name, ms in each.items()
        ),
        "kernels": _largest({"kernel": n, "count": len(ms), "ms": sum(ms)} for n, ms in kernels.items()),
    }


def _largest(rows: Any) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["ms"])[:MOST]


@contextlib.contextmanager
def _loaded(root: str, backend: str) -> Iterator[Callable[[Model, int], None]]:
    """Give a function that draws a picture of so many steps."""
    from latentrt.runtime.pipeline import Pipeline

    with Pipeline.load(root, backend, cuda_graphs=False, check="size") as pipe:

        def draw(model: Model, steps: int) -> None:
            pipe(PROMPT, steps=steps, guidance=model.guidance, sampler=model.sampler, size=(model.size, model.size))

        yield draw


def profile_kernels(root: str, backend: str, model: Model) -> dict[str, Any]:
    """Draw pictures of one step and of four under torch's profiler, which sees every kernel of the process.

    Returns the kernels of the denoiser's three further steps, and all those of the picture of one step, whose encoding
    and decoding are with it. On a machine without a GPU there are no kernels.
    """
    import torch

    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    found = {}
    with _loaded(root, backend) as draw:
        for steps in (1, STEPS + 1):
            draw(model, steps)
            draw(model, steps)
            with torch.profiler.profile(activities=[activity]) as profiler:
                draw(model, steps)
            found[steps] = _by_kernel(profiler)
    short, long = found[1], found[STEPS + 1]
    further = {
        name: (count - short.get(name, (0, 0.0))[0], ms - short.get(name, (0, 0.0))[1])
        for name, (count, ms) in long.items()
    }
    return {"steps": STEPS, **_kernel_rows(further), "one_step": _kernel_rows(short)}


def kernel_times(profiler: Any) -> dict[str, Any]:
    """Return a profile's kernels: milliseconds together, and the largest by name."""
    return _kernel_rows(_by_kernel(profiler))


def _by_kernel(profiler: Any) -> dict[str, tuple[int, float]]:
    """Return how often each kernel ran, and its milliseconds together."""
    from torch.autograd import DeviceType

    kernels = defaultdict[str, list[float]](list)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            kernels[event.name].append(event.time_range.elapsed_us() / 1e3)
    return {name: (len(ms), sum(ms)) for name, ms in kernels.items()}


def _kernel_rows(kernels: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    return {
        "kernels_ms": sum(ms for _, ms in kernels.values()),
        "launches": sum(count for count, _ in kernels.values()),
        "kernels": _largest({"kernel": name[:200], "count": count, "ms": ms} for name, (count, ms) in kernels.items()),
    }
