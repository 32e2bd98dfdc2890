"""ONNX Runtime's engines of one directory, with the base's weights or with changed ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from cachetools import LRUCache

from latentrt.engines.backends import OnOpen
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import EngineRecord
from latentrt.engines.errors import OutOfMemoryError
from latentrt.engines.lora.weight_changes import Changes, adaptable
from latentrt.engines.onnxruntime import keys
from latentrt.engines.onnxruntime.library import Provider
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine, OnnxRuntimeOptions, load
from latentrt.engines.onnxruntime.workspace import OnnxRuntimeWorkspace
from latentrt.engines.spec import Array, Engine
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace

# Of all files of a directory. Below it threads wait for Python's lock longer than they save: the demo opened in 94 ms
# one after another, and in 126 ms side by side.
LARGE_BYTES = 256 << 20
KEPT_WORKSPACES = 4  # with their buffers, for each backend that has some of its own
# Sessions with changed weights that are kept beside the base's, for each component: each holds what changed.
KEPT_ADAPTED = 2

NOT_CHANGED: Mapping[str, Array] = {}

Made = TypeVar("Made")
Choice = tuple[tuple[str, str], ...]
"""The components that are changed, each with the key of its changes."""


class Sessions:
    """Engines that share nothing but the files they map. It implements `backends.Opened`.

    engines: by component, those in use: `adapt` puts others in their place
    """

    def __init__(
        self,
        bundle: Bundle,
        directory: Path,
        record: EngineRecord,
        components: Sequence[str],
        provider: Provider,
        *,
        options: OnnxRuntimeOptions,
        on_open: OnOpen | None = None,
    ) -> None:
        self._provider, self._space = provider, bundle.manifest.latents
        self._directory, self._record, self._options = directory, record, options
        self._adaptable = adaptable(bundle, directory, record)
        self.engines: dict[str, Engine] = self._load_all(components, on_open)
        self._base: dict[str, Engine] = {}  # those that are not in use because a changed one is
        self._adapted: dict[str, LRUCache[str, OnnxRuntimeEngine]] = {}  # by component, then by what changes
        self._workspaces: LRUCache[tuple[Choice, WorkspaceShape, str], OnnxRuntimeWorkspace] = LRUCache(KEPT_WORKSPACES)
        self._choice: Choice = ()

    def _load_all(self, components: Sequence[str], on_open: OnOpen | None) -> dict[str, Engine]:
        """Open sessions: large ones on the CPU side by side, for each is read and laid out by one thread."""

        def load(component: str) -> OnnxRuntimeEngine:
            engine = self._load(component)
            if on_open is not None:
                on_open(component, engine)
            return engine

        small = sum(file.bytes for file in self._record.files.values()) < LARGE_BYTES
        if self._provider != "cpu" or small or len(components) < 2:
            return {name: load(name) for name in components}
        from concurrent.futures import ThreadPoolExecutor  # for what opens a bundle

        with ThreadPoolExecutor(len(components), thread_name_prefix="latentrt-open") as threads:
            return dict(zip(components, threads.map(load, components), strict=True))

    def _load(self, component: str, changed: Mapping[str, Array] = NOT_CHANGED) -> OnnxRuntimeEngine:
        file = self._directory / self._record.entries[component]
        return load(file, self._record.specs[component], self._provider, self._options, changed=changed)

    @property
    def picks_rows(self) -> bool:
        """Tell whether a ControlNet is run on those rows of a stage alone that follow it: as in NumPy."""
        return self._provider not in keys.FUSED

    @property
    def fills_cores(self) -> bool:
        """Tell whether one engine has a thread on more than half of this machine's cores."""
        threads = self._options.threads
        return self.picks_rows and (threads is None or 2 * threads > (os.cpu_count() or 1))

    def adapt(self, changes: Mapping[str, Changes]) -> None:
        """Change the weights of some components, and take all others as they are in the base.

        Raises EngineError before anything is changed.
        """
        mine = {component: changes[component] for component in self.engines if component in changes}
        for component, change in mine.items():
            self._adaptable.check(component, change)
        choice = tuple(sorted((component, change.key) for component, change in mine.items()))
        engines = {component: self._engine(component, change, choice) for component, change in mine.items()}
        self.engines.update(self._base)
        self._base = {component: self.engines[component] for component in engines}
        self.engines.update(engines)
        self._choice = choice

    def _engine(self, component: str, change: Changes, choice: Choice) -> OnnxRuntimeEngine:
        """Return a component's engine with changed weights, kept or new. choice: all that are asked for"""
        kept = self._adapted.setdefault(component, LRUCache(KEPT_ADAPTED))
        engine = kept.get(change.key)
        if engine is None:
            while kept.currsize >= kept.maxsize:
                self._close(component, *kept.popitem())
            arrays = dict(self._adaptable.changed(component, name, deltas) for name, deltas in change.deltas.items())
            kept[change.key] = engine = self._with_room(lambda: self._load(component, arrays), choice)
        return engine

    def _with_room(self, make: Callable[[], Made], choice: Choice) -> Made:
        """Make something, where there is no room for it after letting go of what is only kept. choice: what is not"""
        try:
            return make()
        except OutOfMemoryError:
            idle = [(name, key) for name, kept in self._adapted.items() for key in kept if (name, key) not in choice]
            if not idle and not self._workspaces:
                raise
        self._workspaces.clear()
        for component, key in idle:
            self._close(component, key, self._adapted[component].pop(key))
        return make()

    def _close(self, component: str, key: str, engine: OnnxRuntimeEngine) -> None:
        """Close a session with changed weights that is kept no longer, and what draws with it."""
        for other in [other for other in self._workspaces if (component, key) in other[0]]:
            del self._workspaces[other]
        if (component, key) in self._choice:  # it is in use: back to the base
            self.adapt({})
        engine.close()

    def workspace(self, shape: WorkspaceShape, *, state_rows: int, denoiser: str, decoder: str | None) -> Workspace:
        """Return what a batch of this shape is drawn on."""
        if self.picks_rows:
            return NumpyWorkspace(
                self.engines, self._space, shape, state_rows=state_rows, denoiser=denoiser, decoder=decoder
            )
        key = (self._choice, shape, denoiser)
        workspace = self._workspaces.get(key)
        if workspace is None:
            self._workspaces[key] = workspace = self._with_room(lambda: self._bound(shape, denoiser), self._choice)
        workspace.reset(decoder=decoder)
        return workspace

    def _bound(self, shape: WorkspaceShape, denoiser: str) -> OnnxRuntimeWorkspace:
        bound = {name: engine for name, engine in self.engines.items() if isinstance(engine, OnnxRuntimeEngine)}
        return OnnxRuntimeWorkspace(
            bound, self._space, shape, device=self._provider, index=self._options.device, denoiser=denoiser
        )

    def close(self) -> None:
        """Close every engine."""
        self._workspaces.clear()
        self.adapt({})
        for engine in (*self.engines.values(), *(one for kept in self._adapted.values() for one in kept.values())):
            engine.close()
        self._adapted.clear()
