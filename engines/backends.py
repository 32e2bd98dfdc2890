"""The backends by name: what each can tell, build and open. One row for each backend, and one module."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import EngineRecord
from latentrt.engines.errors import EngineError
from latentrt.engines.lora.weight_changes import Changes
from latentrt.engines.progress import Report
from latentrt.engines.spec import BackendName, Engine, EngineKey, EngineSpec
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape

OnOpen = Callable[[str, Engine], None]
"""Is told of a component's engine, which it may run."""


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be opened.

    threads: how many CPU threads a run may use, None for the backend's own choice
    cuda_graphs: whether a GPU's kernels are recorded once and replayed; None and True: they are
    on_open: may be told of each engine as soon as it runs, on any thread, while others are still opened
    """

    bundle: Bundle
    directory: Path
    record: EngineRecord
    components: tuple[str, ...]
    threads: int | None = None
    cuda_graphs: bool | None = None
    on_open: OnOpen | None = None


class Opened(Protocol):
    """Engines that were opened together."""

    @property
    def engines(self) -> dict[str, Engine]: ...

    @property
    def picks_rows(self) -> bool:
        """Tell whether a ControlNet is run on those rows of a stage alone that follow it."""
        ...

    @property
    def fills_cores(self) -> bool:
        """Tell whether one engine keeps the cores of this machine busy: two at once would hinder each other."""
        ...

    def adapt(self, changes: Mapping[str, Changes]) -> None:
        """Change the weights of components, from the base's; what is not named is as in the base again.

        Raises EngineError before anything is changed. What drew before must be asked for again.
        """
        ...

    def workspace(self, shape: WorkspaceShape, *, state_rows: int, denoiser: str, decoder: str | None) -> Workspace:
        """Return what a batch of this shape is drawn on. Raises EngineError.

        state_rows: what the sampler needs; denoiser: the network that the stages run
        decoder: what its pixels come from, None if they come from elsewhere
        """
        ...

    def close(self) -> None: ...


class Backend(msgspec.Struct, frozen=True, kw_only=True):
    """One way to compile and run graphs, on one of the machine's GPUs or on its CPU.

    unavailable: gives the error that says why it cannot run here, or None
    cannot_build: the same of building, which may need less than running
    key: names what it would build for a bundle on this machine
    mismatches: names what keeps engines of a key from running here, where it is available; empty if nothing
    build: compiles every component into a directory, {component: (main file, spec)}
    open: opens components of one directory
    """

    unavailable: Callable[[], EngineError | None]
    cannot_build: Callable[[BuildOptions], EngineError | None]
    key: Callable[[Bundle, BuildOptions], EngineKey]
    mismatches: Callable[[Bundle, EngineKey], list[str]]
    build: Callable[[Bundle, Path, BuildOptions, Report], Mapping[str, tuple[str, EngineSpec]]]
    open: Callable[[Opening], Opened]


def _row(kind: BackendName, device: int = 0) -> Backend:
    """Return the backend that a module's functions are, called with what kind of it; imported when one is called."""

    def call(function: str) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            return getattr(importlib.import_module(MODULES[kind]), function)(kind, *arguments, device=device)

        return called

    return Backend(**{name: call(name) for name in Backend.__struct_fields__})


ONNX_RUNTIME, TENSORRT = "latentrt.engines.onnxruntime.backend", "latentrt.engines.tensorrt.backend"
MODULES: dict[BackendName, str] = {
    "cpu": ONNX_RUNTIME,
    "cuda": ONNX_RUNTIME,
    "tensorrt": TENSORRT,
    "tensorrt-rtx": TENSORRT,
}
BACKENDS: dict[BackendName, Backend] = {name: _row(name) for name in MODULES}


def backend_on(name: BackendName, device: int) -> Backend:
    """Return a backend on a GPU. device: its number among those that are visible, 0 on a CPU"""
    return BACKENDS[name] if device == 0 else _row(name, device)
