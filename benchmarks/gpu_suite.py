"""Everything worth knowing about one GPU, in parts that fit the time there is, most valuable first.

    python benchmarks/gpu_suite.py --bundles .cache/packed [--seconds 540] [--output benchmarks/results/gpu.json]
    python benchmarks/gpu_suite.py --parts seam,ceilings,"sd15 bench cuda","sd15 torch eager"
    python benchmarks/gpu_suite.py --list                                  # the parts, in their order
    python benchmarks/gpu_suite.py --cpu                                   # the same flow as a rehearsal, no GPU

Uses what is present (TensorRT, TensorRT-RTX, ONNX Runtime's CUDA provider, torch, diffusers) and says what is not.
First the contract of the device seam and what the GPU reaches; then, for the demo, SD 1.5 and others: builds engines,
verifies the golden pairs, measures latency by stage in each of several ways, and names the operators and kernels that
take the time; beside them the same UNets in torch, eager, recorded and compiled. Bundles are taken from --bundles (a
directory or a `.tar.gz` of packed_bundle.py by the model's name), or exported here where torch and diffusers are.

--parts chooses: a part of that name, or else all parts that have all of a pattern's words in their names, in the
patterns' order, each after what it needs. Each part runs in a process of its own with a time of its own, and the result
is saved after each: a part that crashes, hangs or is cut off leaves the others' figures, and the last lines of what it
said are in the result. Exits with 2 where there is no GPU, with 1 where a part failed, with 0 otherwise: a part that
was skipped or cut off says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from gpu_kinds import KINDS
from gpu_models import MODELS, TINY, WAYS, Model, Way
from gpu_table import format_insides, format_table, measured_tflops
from parts import Outcomes, Part, keep, run_parts

import latentrt
from latentrt.engines.backends import BACKENDS
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.cuda.gpus import find_gpu
from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime.library import require
from latentrt.runtime.bench.machine import describe, now

BACKEND_NAMES = ("cuda", "tensorrt", "tensorrt-rtx")
REHEARSAL = "cpu"
JOBS = Path(__file__).with_name("gpu_parts.py")
CONTRACT = Path(__file__).parent.parent / "tests" / "test_cuda_contract.py"
LIBRARIES = ("nvidia-cuda-runtime", "nvidia-cublas", "nvidia-cudnn-cu13", "triton")
LOOKED_INTO = "sd15"  # the model whose operators, kernels and ways are measured
BY_KERNEL = ("sd35",)  # models of which the kernels alone are
SHARED = ("demo", "sd15")  # the models whose pictures share stages
HOWS = ("eager", "recorded", "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Path(".cache/packed"))
    parser.add_argument("--models", default=None, help="Between commas. Default: all; --cpu: demo.")
    parser.add_argument("--parts", default=None, help="Patterns between commas: words of parts' names. Default: all.")
    parser.add_argument("--list", action="store_true", help="Print the parts' names.")
    parser.add_argument("--seconds", type=float, default=540.0, help="For everything.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--after", type=Path, help="A result of this machine: what went well there is not run again.")
    parser.add_argument("--work", type=Path, default=None, help="Where bundles grow. Default: a temporary folder.")
    parser.add_argument("--cpu", action="store_true", help="Rehearse on this processor.")
    arguments = parser.parse_args()
    if not (arguments.cpu or arguments.list) and find_gpu() is None:
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
    parts = Plan(models, backends, present, arguments.bundles, work, rehearsal=arguments.cpu).parts()
    parts = chosen(parts, arguments.parts.split(",")) if arguments.parts else parts
    if arguments.list:
        print("\n".join(part.name for part in parts))
        return 0
    document = {"kind": "latentrt gpu suite", "created": now(), "machine": machine(), "present": present}

    def save(outcomes: Outcomes) -> None:
        table = format_table(models, backends, outcomes)
        whole = {**document, "half_tflops": measured_tflops(outcomes), "parts": outcomes.parts, "table": table}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        keep(whole, arguments.output)
        arguments.output.with_suffix(".md").write_text(table + format_insides(outcomes))

    for name, why in present.items():
        print(f"{name}: {why or 'present'}", flush=True)
    before = Outcomes(parts=json.loads(arguments.after.read_text())["parts"]) if has(arguments.after) else Outcomes()
    said = partial(print, flush=True)
    outcomes = run_parts(parts, seconds=arguments.seconds, folder=work, save=save, say=said, before=before)
    print(f"\n{format_table(models, backends, outcomes)}\n{arguments.output}")
    return int(any(part["status"] == "failed" for part in outcomes.parts.values()))


def has(result: Path | None) -> bool:
    """Tell whether there is a result."""
    return result is not None and result.is_file()


def machine() -> dict[str, Any]:
    """Return what the harness says of the machine, NVML's words, and the CUDA libraries beside torch."""
    libraries = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    found = describe()
    runs = {"latentrt": latentrt.__version__}  # what is imported, whatever the metadata of another copy says
    with suppress(EngineError):
        runs["onnxruntime"] = require().__version__
    return {**found, "versions": found["versions"] | runs, "nvml": nvml(), "libraries": libraries}


def nvml() -> dict[str, str]:
    """Return what NVML tells of the driver and the first GPU, and what it does not, each as text; empty without it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # no pynvml, no driver, no GPU: each raises its own
        return {}
    asked = {
        "driver": pynvml.nvmlSystemGetDriverVersion,
        "bus": lambda: pynvml.nvmlDeviceGetPciInfo(gpu).busId,
        "used_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(gpu).used,
        "energy_mj": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu),
        "power_limit_mw": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu),
    }
    return {name: _told(ask) for name, ask in asked.items()}


def _told(ask: Callable[[], object]) -> str:
    try:
        found = ask()
    except Exception as error:  # NVML has an error for each thing that a GPU or a virtual machine does not tell
        return f"{type(error).__name__}: {error}"
    return found.decode() if isinstance(found, bytes) else str(found)


def presence() -> dict[str, str | None]:
    """Name what the suite can use, each with None or why it cannot be used."""
    found: dict[str, str | None] = {}
    for name in (*BACKEND_NAMES, REHEARSAL):
        backend = BACKENDS[name]  # type: ignore[index]
        error = backend.unavailable() or backend.cannot_build(BuildOptions())
        found[name] = None if error is None else str(error)
    for package in ("torch", "diffusers", "onnx", "pynvml", "pytest"):
        found[package] = None if importlib.util.find_spec(package) else f"{package} is not installed"
    return found


def chosen(parts: Sequence[Part], patterns: Sequence[str]) -> list[Part]:
    """Return the parts that patterns name, in the patterns' order, each after what it needs.

    Exits with a sentence where a pattern names none.
    """
    known, taken = {part.name: part for part in parts}, dict[str, Part]()

    def take(part: Part) -> None:
        for need in part.needs:
            take(known[need])
        taken.setdefault(part.name, part)

    for pattern in patterns:
        words = pattern.split()
        matching = [part for part in parts if words == _words(part)]
        matching = matching or [part for part in parts if set(words) <= set(_words(part))]
        if not matching:
            raise SystemExit(f"gpu_suite: --parts: no part has all of '{pattern}' in its name; --list names them")
        for part in matching:
            take(part)
    return list(taken.values())


def _words(part: Part) -> list[str]:
    return part.name.replace(":", "").split()


class Plan:
    """The parts, in the order of what is worth most: our own figures of a model, what explains them, its peers.

    What torch compiles takes minutes, and so comes last.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        backends: tuple[str, ...],
        present: Mapping[str, str | None],
        bundles: Path,
        work: Path,
        *,
        rehearsal: bool,
    ) -> None:
        self._models, self._backends, self._present = models, backends, present
        self._bundles, self._work, self._rehearsal = bundles.absolute(), work.absolute(), rehearsal
        self._device = "cpu" if rehearsal else "cuda"

    def parts(self) -> list[Part]:
        """Return all parts in their order."""
        missing = self._present["pytest"] or (None if CONTRACT.is_file() else f"{CONTRACT} is not here")
        parts = [
            _part("seam", "seam", {"tests": str(CONTRACT)}, most_s=120, missing=missing),
            _part("ceilings", "ceilings", {"device": self._device}, most_s=100, missing=self._present["torch"]),
        ]
        for name, model in self._models.items():
            parts += [*self._ours(name, model), *self._peers(name, model)]
        for name in KINDS:
            parts += self._kind(name)
        late = [part for part in parts if part.name.endswith("compiled")]
        return [part for part in parts if part not in late] + late

    def _ours(self, name: str, model: Model) -> Iterator[Part]:
        if not model.ours:
            return
        source = {"root": str(self._work / name), "model": name, "bundles": str(self._bundles)}
        yield _part(f"{name}: bundle", "bundle", source, most_s=240, missing=self._no_bundle(name, model))
        for backend in self._backends:
            yield from self._on(name, backend)

    def _on(self, name: str, backend: str) -> Iterator[Part]:
        looked_into = name == LOOKED_INTO or self._rehearsal
        for label, way in WAYS.items():
            launched = label == "launched" and backend in ("cuda", REHEARSAL)
            if label and not launched and not (looked_into and backend in way.backends):
                continue
            base = self._work / name
            root = base.with_name(f"{name}-{label}") if way.options else base
            facts = {"root": str(root), "base": str(base), "backend": backend, "model": name, **way.facts()}
            yield from self._in_a_way(name, backend, label, facts)
            if not label and name == "demo" and backend in ("cuda", REHEARSAL):
                yield self._pictures(name, backend, facts)
            if not label and name in SHARED and backend in ("cuda", REHEARSAL):
                yield _part(
                    f"{name}: batcher {backend}",
                    "batcher",
                    {**facts, "rehearsal": self._rehearsal},
                    most_s=240 if self._rehearsal else 90,
                    needs=(f"{name}: build {backend}",),
                )
            if (not label or way.options) and looked_into and backend in ("cuda", REHEARSAL):
                yield from self._inside(name, backend, label, facts)
            elif not label and name in BY_KERNEL and backend == "cuda":
                yield self._kernels(name, backend, facts)

    def _kind(self, name: str) -> Iterator[Part]:
        """Draw with a tiny bundle of a kind, and compare."""
        root, packed = self._work / name, self._bundles / f"{name}.tar.gz"
        missing = None if root.exists() or packed.is_file() else f"{packed} is not here; gpu_kinds.py makes it"
        source = {"root": str(root), "model": name, "bundles": str(self._bundles)}
        yield _part(f"{name}: bundle", "bundle", source, most_s=60, missing=missing)
        for backend in self._backends:
            facts = {"root": str(root), "base": str(root), "backend": backend, "model": name, **Way().facts()}
            build = f"{name}: build {backend}"
            missing = self._present[backend] or self._present["onnx"]
            yield _part(build, "build", facts, most_s=120, needs=(f"{name}: bundle",), missing=missing)
            yield self._pictures(name, backend, facts)

    def _pictures(self, name: str, backend: str, facts: Mapping[str, Any]) -> Part:
        more = {**facts, "folder": str(self._work / f"{name}-pictures")}
        most_s, needs = 300 if self._rehearsal else 120, (f"{name}: build {backend}",)
        return _part(f"{name}: pictures {backend}", "pictures", more, most_s=most_s, needs=needs)

    def _in_a_way(self, name: str, backend: str, label: str, facts: Mapping[str, Any]) -> Iterator[Part]:
        """Build engines unless a way opens the default's, measure and, where they were built, verify."""
        built = not label or bool(facts["options"])
        build = f"{name}: build {backend} {label if built else ''}".strip()
        if built:
            missing = self._present[backend] or self._present["onnx"]
            yield _part(build, "build", facts, most_s=200, needs=(f"{name}: bundle",), missing=missing)
        yield _part(
            f"{name}: bench {backend} {label}".strip(),
            "bench",
            {**facts, "rehearsal": self._rehearsal, "scored": name == "demo" and not label},
            most_s=240 if self._rehearsal else 90,
            least_s=8,
            needs=(build,),
        )
        if built:
            yield _part(f"{name}: verify {backend} {label}".strip(), "verify", facts, most_s=90, needs=(build,))

    def _inside(self, name: str, backend: str, label: str, facts: Mapping[str, Any]) -> Iterator[Part]:
        """Find out what takes the time in engines that were built."""
        on = f"{backend} {label}".strip()
        needs, folder = (f"{name}: build {on}",), f"{facts['root']}-profiles"
        yield _part(f"{name}: profile {on}", "profile", {**facts, "folder": folder}, most_s=60, needs=needs)
        yield self._kernels(name, on, facts)

    def _kernels(self, name: str, on: str, facts: Mapping[str, Any]) -> Part:
        needs, missing = (f"{name}: build {on}",), self._present["torch"]
        return _part(f"{name}: kernels {on}", "kernels", facts, most_s=60, needs=needs, missing=missing)

    def _no_bundle(self, name: str, model: Model) -> str | None:
        """Say why there can be no bundle of a model, or return None."""
        bundles = self._bundles
        if any(path.exists() for path in (self._work / name, bundles / name, bundles / f"{name}.tar.gz")):
            return None
        if not model.exported:
            return f"{bundles} has no {name}.tar.gz, and the suite does not export it"
        absent = self._present["torch"] or self._present["diffusers"]
        return absent and f"{bundles} has no {name}.tar.gz, and exporting one needs torch and diffusers: {absent}"

    def _peers(self, name: str, model: Model) -> Iterator[Part]:
        if model.shape is None:
            return
        absent = {"torch": self._present["torch"], "diffusers": self._present["torch"] or self._present["diffusers"]}
        for library in ("torch", "diffusers") if model.exported else ("torch",):
            for how in HOWS:
                if (self._rehearsal and how != "eager") or (library == "diffusers" and how == "recorded"):
                    continue
                yield _part(
                    f"{name}: {library} {how}",
                    library,
                    {"model": name, "device": self._device, "how": how},
                    most_s=200 if how == "compiled" or self._rehearsal else 100,
                    least_s=40 if how == "compiled" else 10,
                    missing=absent[library],
                )


def _part(name: str, do: str, facts: Mapping[str, Any], **limits: Any) -> Part:
    return Part(name=name, command=(sys.executable, str(JOBS), json.dumps({"do": do, **facts})), **limits)


if __name__ == "__main__":
    main()
