"""The backends by name: what each can tell, build and open. One row a backend, one module behind each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import EngineRecord
from latentrt.engines.canvas.contract import DECODER, UNET, Canvas, CanvasShape
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.lora.weight_changes import Changes
from latentrt.engines.onnxruntime import build as onnxruntime
from latentrt.engines.onnxruntime.build import OnnxRuntimeOptions
from latentrt.engines.onnxruntime.engines import Sessions
from latentrt.engines.progress import Report
from latentrt.engines.spec import BackendName, Engine, EngineKey, EngineSpec
from latentrt.engines.tensorrt import build as tensorrt


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

    def adapt(self, changes: Mapping[str, Changes]) -> None:
        """Change the weights of components, from the base's; what is not named is as in the base again.

        Raises EngineError before anything is changed. What drew before must be asked for again.
        """
        ...

    def canvas(
        self, shape: CanvasShape, *, state_rows: int, denoiser: str = UNET, decoder: str | None = DECODER
    ) -> Canvas:
        """Return what a batch of this shape is drawn on. Raises EngineError.

        state_rows: what the sampler needs; denoiser: the network that the stages run
        decoder: what its pixels come from, None where they come from elsewhere
        """
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
        return Sessions(
            opening.bundle,
            opening.directory,
            opening.record,
            opening.components,
            provider,
            options=OnnxRuntimeOptions(threads=opening.threads, cuda_graph=bool(opening.cuda_graphs)),
        )

    return Backend(
        unavailable=partial(onnxruntime.unavailable, provider),
        cannot_build=lambda options: (
            _shapeless(provider, options) or onnxruntime.unavailable(provider) or graphs.unavailable()
        ),
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
