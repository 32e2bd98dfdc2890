"""The backends by name: what each can tell, build and load. One row a backend, one module behind each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from latentrt.engines import onnxruntime, tensorrt
from latentrt.engines.bundle import Bundle
from latentrt.engines.canvas import Canvas, CanvasShape
from latentrt.engines.errors import EngineError
from latentrt.engines.gpu import find_gpu
from latentrt.engines.host_canvas import HostCanvas
from latentrt.engines.manifest import LatentSpec
from latentrt.engines.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.engines.onnxruntime_canvas import OnnxRuntimeCanvas
from latentrt.engines.options import BuildOptions
from latentrt.engines.progress import Report
from latentrt.engines.spec import BackendName, Engine, EngineKey, EngineSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to compile and run graphs.

    unavailable: says in a sentence why it cannot run here, or None
    cannot_build: the same of building, which may need less than running
    key: names what it would build for a bundle on this machine
    build: compiles every component into a directory, {component: (main file, spec)}
    load: opens one compiled file
    canvas: makes what a batch is drawn on, of opened engines; the last number is how many rows of state it needs
    """

    unavailable: Callable[[], str | None]
    cannot_build: Callable[[BuildOptions], str | None]
    key: Callable[[Bundle, BuildOptions], EngineKey]
    build: Callable[[Bundle, Path, BuildOptions, Report], Mapping[str, tuple[str, EngineSpec]]]
    load: Callable[[Path, EngineSpec, int | None], Engine]
    canvas: Callable[[Mapping[str, Engine], LatentSpec, CanvasShape, int], Canvas]


def _onnxruntime(provider: onnxruntime.Provider) -> Backend:
    def build(
        bundle: Bundle, directory: Path, options: BuildOptions, report: Report
    ) -> Mapping[str, tuple[str, EngineSpec]]:
        return onnxruntime.build(bundle, directory, provider, report)

    def load(file: Path, spec: EngineSpec, threads: int | None) -> Engine:
        return onnxruntime.load(file, spec, provider, OnnxRuntimeOptions(threads=threads))

    return Backend(
        unavailable=partial(onnxruntime.unavailable, provider),
        cannot_build=lambda options: _shapeless(provider, options) or onnxruntime.unavailable(provider),
        key=lambda bundle, options: onnxruntime.key(bundle, provider),
        build=build,
        load=load,
        canvas=_bound_canvas if provider in onnxruntime.FUSED else _host_canvas,
    )


def _host_canvas(engines: Mapping[str, Engine], space: LatentSpec, shape: CanvasShape, state_rows: int) -> Canvas:
    return HostCanvas(engines, space, shape, state_rows=state_rows)


def _bound_canvas(engines: Mapping[str, Engine], space: LatentSpec, shape: CanvasShape, state_rows: int) -> Canvas:
    bound = {name: engine for name, engine in engines.items() if isinstance(engine, OnnxRuntimeEngine)}
    return OnnxRuntimeCanvas(bound, space, shape, device="cuda")


def _shapeless(provider: onnxruntime.Provider, options: BuildOptions) -> str | None:
    return None if options == BuildOptions() else f"{provider} engines take any shape: leave the build options away"


def _tensorrt(flavor: tensorrt.Flavor) -> Backend:
    def build(
        bundle: Bundle, directory: Path, options: BuildOptions, report: Report
    ) -> Mapping[str, tuple[str, EngineSpec]]:
        return tensorrt.build(bundle, directory, flavor, options, report)

    return Backend(
        unavailable=partial(tensorrt.cannot_run, flavor),
        cannot_build=partial(tensorrt.cannot_build, flavor),
        key=lambda bundle, options: tensorrt.key(bundle, flavor, options),
        build=build,
        load=lambda file, spec, threads: tensorrt.load(file, spec, flavor),
        canvas=_host_canvas,
    )


BACKENDS: dict[BackendName, Backend] = {
    "cpu": _onnxruntime("cpu"),
    "cuda": _onnxruntime("cuda"),
    "tensorrt": _tensorrt("tensorrt"),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The backend that was chosen, and why."""

    backend: BackendName
    reason: str


def choose(asked: str) -> Choice:
    """Choose a backend: the one asked for, always; with `auto`, the GPU's if a GPU answers, else the CPU's.

    Raises EngineError where what was asked for is unknown or cannot run here: there is no silent second choice.
    """
    if asked == "auto":
        gpu = find_gpu()
        if gpu is None:
            return Choice(backend="cpu", reason="auto: no NVIDIA GPU answers here")
        return Choice(backend="cuda", reason=f"auto: {gpu.name} answers here")
    for name in BACKENDS:
        if name == asked:
            return Choice(backend=name, reason="as asked")
    raise EngineError(f"there is no backend '{asked}'; choose one of auto, {', '.join(BACKENDS)}")
