"""The backends by name: what each can tell, build and open. One row a backend, one module behind each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from latentrt.engines import onnxruntime, tensorrt
from latentrt.engines.bundle import Bundle
from latentrt.engines.canvas import Canvas, CanvasShape
from latentrt.engines.errors import EngineError
from latentrt.engines.host_canvas import HostCanvas
from latentrt.engines.manifest import EngineRecord, LatentSpec
from latentrt.engines.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.engines.onnxruntime_canvas import OnnxRuntimeCanvas
from latentrt.engines.options import BuildOptions
from latentrt.engines.progress import Report
from latentrt.engines.spec import BackendName, Engine, EngineKey, EngineSpec

KEPT_CANVASES = 4  # with their buffers, for each backend that has some of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What is to be opened.

    threads: how many CPU threads a run may use, None for the backend's own choice
    cuda_graphs: whether a GPU's kernels are recorded once and replayed, None for the backend's own choice
    """

    bundle: Bundle
    directory: Path
    record: EngineRecord
    components: tuple[str, ...]
    threads: int | None = None
    cuda_graphs: bool | None = None


class Opened(Protocol):
    """Engines that were opened together."""

    @property
    def engines(self) -> dict[str, Engine]: ...

    def canvas(self, shape: CanvasShape, *, state_rows: int) -> Canvas:
        """Return what a batch of this shape is drawn on; state_rows is what the sampler needs. Raises EngineError."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to compile and run graphs.

    unavailable: says in a sentence why it cannot run here, or None
    cannot_build: the same of building, which may need less than running
    key: names what it would build for a bundle on this machine
    mismatches: names what keeps engines of a key from running here, where it is available; empty where nothing
    build: compiles every component into a directory, {component: (main file, spec)}
    open: opens components of one directory
    """

    unavailable: Callable[[], str | None]
    cannot_build: Callable[[BuildOptions], str | None]
    key: Callable[[Bundle, BuildOptions], EngineKey]
    mismatches: Callable[[Bundle, EngineKey], list[str]]
    build: Callable[[Bundle, Path, BuildOptions, Report], Mapping[str, tuple[str, EngineSpec]]]
    open: Callable[[Opening], Opened]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sessions:
    """Engines that share nothing."""

    engines: dict[str, Engine]
    space: LatentSpec
    provider: onnxruntime.Provider
    canvases: OrderedDict[CanvasShape, OnnxRuntimeCanvas] = field(default_factory=OrderedDict)

    def canvas(self, shape: CanvasShape, *, state_rows: int) -> Canvas:
        if self.provider not in onnxruntime.FUSED:
            return HostCanvas(self.engines, self.space, shape, state_rows=state_rows)
        canvas = self.canvases.pop(shape, None) or self._bound(shape)
        self.canvases[shape] = canvas
        if len(self.canvases) > KEPT_CANVASES:
            self.canvases.popitem(last=False)
        canvas.wipe()
        return canvas

    def _bound(self, shape: CanvasShape) -> OnnxRuntimeCanvas:
        bound = {name: engine for name, engine in self.engines.items() if isinstance(engine, OnnxRuntimeEngine)}
        return OnnxRuntimeCanvas(bound, self.space, shape, device=self.provider)

    def close(self) -> None:
        self.canvases.clear()
        for engine in self.engines.values():
            engine.close()


def _onnxruntime(provider: onnxruntime.Provider) -> Backend:
    def build(
        bundle: Bundle, directory: Path, options: BuildOptions, report: Report
    ) -> Mapping[str, tuple[str, EngineSpec]]:
        return onnxruntime.build(bundle, directory, provider, report)

    def key(bundle: Bundle, options: BuildOptions) -> EngineKey:
        if words := _shapeless(provider, options):
            raise EngineError(words)
        return onnxruntime.key(bundle, provider)

    def open_sessions(opening: Opening) -> Opened:
        options = OnnxRuntimeOptions(threads=opening.threads, cuda_graph=bool(opening.cuda_graphs))
        record = opening.record
        engines: dict[str, Engine] = {
            name: onnxruntime.load(opening.directory / record.entries[name], record.specs[name], provider, options)
            for name in opening.components
        }
        return _Sessions(engines=engines, space=opening.bundle.manifest.latents, provider=provider)

    return Backend(
        unavailable=partial(onnxruntime.unavailable, provider),
        cannot_build=lambda options: _shapeless(provider, options) or onnxruntime.unavailable(provider),
        key=key,
        mismatches=lambda bundle, there: onnxruntime.key(bundle, provider).differences(there),
        build=build,
        open=open_sessions,
    )


def _shapeless(provider: onnxruntime.Provider, options: BuildOptions) -> str | None:
    return None if options == BuildOptions() else f"{provider} engines take any shape: leave the build options away"


def _tensorrt(flavor: tensorrt.Flavor) -> Backend:
    def build(
        bundle: Bundle, directory: Path, options: BuildOptions, report: Report
    ) -> Mapping[str, tuple[str, EngineSpec]]:
        return tensorrt.build(bundle, directory, flavor, options, report)

    def open_on_device(opening: Opening) -> Opened:
        return tensorrt.open_engines(
            opening.bundle,
            opening.directory,
            opening.record,
            opening.components,
            flavor,
            graphs=opening.cuda_graphs is not False,
        )

    return Backend(
        unavailable=partial(tensorrt.cannot_run, flavor),
        cannot_build=partial(tensorrt.cannot_build, flavor),
        key=lambda bundle, options: tensorrt.key(bundle, flavor, options),
        mismatches=lambda bundle, there: tensorrt.mismatches(bundle, flavor, there),
        build=build,
        open=open_on_device,
    )


BACKENDS: dict[BackendName, Backend] = {
    "cpu": _onnxruntime("cpu"),
    "cuda": _onnxruntime("cuda"),
    "tensorrt": _tensorrt("tensorrt"),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
}
