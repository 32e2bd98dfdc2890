"""The engines of a bundle, opened for this machine."""

from __future__ import annotations

import logging
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from pathlib import Path

import msgspec

from latentrt.engines.backends import OnOpen, Opened, Opening, backend_on
from latentrt.engines.bundle.files import Bundle, Check
from latentrt.engines.bundle.manifest import EngineRecord, FileRecord, LatentSpec
from latentrt.engines.comparison import Comparison
from latentrt.engines.find import FOR_CPUS, Choice, choose, find_engines, fits, serving_engines
from latentrt.engines.lora.weight_changes import NOTHING, Changes, keys_of
from latentrt.engines.spec import QUANTISED, Array, Closing, Engine, EngineKey, EngineSpec, Inputs
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape

KEPT_COUNTS = 256  # shapes of which it is kept how many slots they may have: records are read to find that
_log = logging.getLogger(__name__)


class OnDemandEngine(Closing):
    """An engine that its first call opens, and `close` frees until the next call. Safe to use from many threads.

    opening: opens it; spec: what its record says that it takes and gives
    """

    def __init__(self, opening: Callable[[], Opened], spec: EngineSpec) -> None:
        self._opening, self._spec = opening, spec
        self._opened: Opened | None = None
        self._lock = threading.Lock()

    @property
    def spec(self) -> EngineSpec:
        """Return what it takes and gives."""
        return self._spec

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        """Run it. The arrays hold until the next call or `close`. Raises EngineError and BundleError."""
        with self._lock:
            if self._opened is None:
                self._opened = self._opening()
            return self._opened.engines[self._spec.component](inputs)

    def close(self) -> None:
        """Free it."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None


class OpenEngines:
    """The engines of a bundle, ready to run, by component.

    engines: of those that were opened first, in use until `close`
    choice: the backend and why it was chosen
    key, home: of the engines that were opened first: what they are for, their directory and its record
    load_s: how long it took to find, check and open them
    found: the directory to open first; None for the one that suits best
    on_demand: components that are opened when they are called, and freed by `rest`; nothing is drawn with them in place
    on_open: may be told of each engine of the first directory as soon as it runs
    """

    def __init__(
        self,
        bundle: Bundle,
        choice: Choice,
        *,
        components: tuple[str, ...] | None,
        threads: int | None,
        cuda_graphs: bool | None,
        check: Check,
        found: tuple[Path, EngineRecord] | None = None,
        on_demand: tuple[str, ...] = (),
        on_open: OnOpen | None = None,
    ) -> None:
        start = time.perf_counter()
        self.choice = choice
        self._bundle, self._check = bundle, check
        self._threads, self._cuda_graphs = threads, cuda_graphs
        self.home = directory, record = found or self._find()
        self._components = tuple(name for name in components or tuple(record.entries) if name not in on_demand)
        self._on_demand = {
            name: OnDemandEngine(
                partial(self._open_adapted, directory, record, (name,), check="size"), record.specs[name]
            )
            for name in on_demand
        }
        self._opened: dict[Path, tuple[EngineRecord, Opened]] = {}
        self._further: list[Opened] = []
        self._opening = threading.RLock()  # what draws, encodes and decodes may miss the same engines at the same time
        self._counts: dict[WorkspaceShape, tuple[int, ...] | None] = {}
        self._changes: Mapping[str, Changes] | None = NOTHING  # None: some may be changed and some not
        opened = self._open(directory, record, on_open=on_open)
        self.engines: MutableMapping[str, Engine] = opened.engines
        if on_demand:
            self.engines = ChainMap(opened.engines, dict[str, Engine](self._on_demand))
        self.key: EngineKey = record.key
        self.load_s = time.perf_counter() - start

    def _open(self, directory: Path, record: EngineRecord, *, on_open: OnOpen | None = None) -> Opened:
        with self._opening:
            if directory not in self._opened:
                opened = self._open_adapted(directory, record, self._components, check=self._check, on_open=on_open)
                self._opened[directory] = (record, opened)
            return self._opened[directory][1]

    def _open_adapted(
        self,
        directory: Path,
        record: EngineRecord,
        components: tuple[str, ...],
        *,
        check: Check,
        on_open: OnOpen | None = None,
    ) -> Opened:
        """Open components with the weights that all have now."""
        opened = self._open_components(directory, record, components, check=check, on_open=on_open)
        try:
            opened.adapt(self._changes or NOTHING)
        except BaseException:
            opened.close()
            raise
        return opened

    @property
    def on_demand(self) -> bool:
        """Tell whether there are components that are opened when they are called."""
        return bool(self._on_demand)

    def rest(self) -> None:
        """Free the components that are opened on demand, until they are called again."""
        for engine in self._on_demand.values():
            engine.close()

    def _open_components(
        self,
        directory: Path,
        record: EngineRecord,
        components: tuple[str, ...],
        *,
        check: Check,
        on_open: OnOpen | None = None,
    ) -> Opened:
        _log.info("opening %s: %s (%s)", directory, ", ".join(components), self.choice.reason)
        opening = Opening(
            bundle=self._bundle,
            directory=directory,
            record=record,
            components=components,
            threads=self._threads,
            cuda_graphs=self._cuda_graphs,
            on_open=on_open,
        )
        with Comparison(directory, _files_of(record, components), check=check) as comparison:
            comparison.wait(weights=False)
            opened = backend_on(self.choice.backend, self.choice.device).open(opening)
            try:
                comparison.wait(weights=True)
            except BaseException:
                opened.close()
                raise
        return opened

    def adapt(self, changes: Mapping[str, Changes]) -> bool:
        """Change the weights of components, always from the base's; tell whether there was anything to do.

        What is not named is as in the base again. What drew before must be asked for again with `workspace`.
        Raises EngineError; then no weights are changed at all.
        """
        with self._opening:
            if self._changes is not None and keys_of(changes) == keys_of(self._changes):
                return False
            self._changes = None  # until it is known that everything went well
            try:
                self._adapt_all(changes)
            except Exception:
                self._adapt_all(NOTHING)
                self._changes = NOTHING
                raise
            self._changes = changes
            return True

    def _adapt_all(self, changes: Mapping[str, Changes]) -> None:
        self.rest()
        for _, opened in self._opened.values():
            opened.adapt(changes)

    def workspace(
        self,
        space: LatentSpec,
        shape: WorkspaceShape,
        *,
        state_rows: int,
        denoiser: str,
        decoder: str | None,
    ) -> Workspace:
        """Return what a batch of this shape is drawn on, with one of the bundle's denoisers and decoders.

        decoder: None if the pixels come from elsewhere

        Where the bundle holds engines of several shapes, those that fit are opened when they are first needed, and
        stay open. Raises EngineError if none fits.
        """
        fitting = self._fitting(shape)
        return fitting.workspace(shape, state_rows=state_rows, denoiser=denoiser, decoder=decoder)

    def engine(self, component: str, shape: WorkspaceShape) -> Engine:
        """Return the engine of a component for pictures of this shape, opened when it is first asked for.

        Raises EngineError and BundleError.
        """
        opened = self._fitting(shape)
        if component not in opened.engines:
            self._open_further(component, opened)
        return opened.engines[component]

    def sizeless(self, component: str) -> Engine:
        """Return the engine of a component that sees no picture's size, opened when it is first asked for.

        Raises EngineError and BundleError.
        """
        opened = self._open(*self.home)
        if component not in opened.engines:
            self._open_further(component, opened)
        return opened.engines[component]

    def _open_further(self, component: str, opened: Opened) -> None:
        with self._opening:
            if component not in opened.engines:
                (found,) = ((path, record) for path, (record, one) in self._opened.items() if one is opened)
                self._further.append(self._open_components(*found, (component,), check=self._check))
                opened.engines[component] = self._further[-1].engines[component]

    def require(self, shape: WorkspaceShape) -> None:
        """Raise EngineError if `workspace` would, for want of engines for this shape. Nothing is opened."""
        if self._open_for(shape) is None:
            self._find(shape)

    @property
    def picks_rows(self) -> bool:
        """Tell whether a ControlNet is run on those rows of a stage alone that follow it, and costs others nothing."""
        return all(opened.picks_rows for _, opened in list(self._opened.values()))

    @property
    def fills_cores(self) -> bool:
        """Tell whether one engine keeps the cores of this machine busy: two at once would hinder each other."""
        return any(opened.fills_cores for _, opened in list(self._opened.values()))

    def slot_counts(self, shape: WorkspaceShape) -> tuple[int, ...] | None:
        """Return the numbers of slots that a workspace may have, in order; None where any number will do.

        shape: pictures are as many as there may be at a time: the last number has room for them, where one has
        Nothing is opened. Raises EngineError if there are no engines for pictures of this size and texts.
        """
        counts = self._counts.get(shape, ())
        if counts == ():
            counts = self._find_counts(shape)
            if len(self._counts) >= KEPT_COUNTS:
                self._counts.clear()
            self._counts[shape] = counts
        return counts

    def _find_counts(self, shape: WorkspaceShape) -> tuple[int, ...] | None:
        serving = serving_engines(self._bundle, self.choice.backend, device=self.choice.device)
        profiles = [profile for _, record in serving for spec in record.specs.values() for profile in spec.profiles]
        counts = {profile["pictures"] for profile in profiles if "pictures" in profile}
        if not counts:
            return None
        fitting = sorted(
            count
            for count in counts
            if any(fits(record, msgspec.structs.replace(shape, pictures=count), self._bundle) for _, record in serving)
        )
        if not fitting:
            self.require(shape)
        enough = next((count for count in fitting if count >= shape.pictures), fitting[-1])
        return tuple(count for count in fitting if count <= enough)

    def _open_for(self, shape: WorkspaceShape) -> Opened | None:
        known = list(self._opened.values())  # another thread may open others meanwhile
        return next((opened for record, opened in known if fits(record, shape, self._bundle)), None)

    def _fitting(self, shape: WorkspaceShape) -> Opened:
        return self._open_for(shape) or self._open(*self._find(shape))

    def _find(self, shape: WorkspaceShape | None = None) -> tuple[Path, EngineRecord]:
        return find_engines(self._bundle, self.choice.backend, needs=shape, device=self.choice.device)

    def close(self) -> None:
        """Close every engine."""
        self.rest()
        for _, opened in self._opened.values():
            opened.close()
        for opened in self._further:
            opened.close()
        self._opened.clear()
        self._further.clear()


def _files_of(record: EngineRecord, components: tuple[str, ...]) -> dict[str, FileRecord]:
    """Return the files that are read for some components: all but those that are named for others."""
    others = tuple(f"{name}." for name in record.entries if name not in components)
    return {name: file for name, file in record.files.items() if not name.startswith(others)}


def open_engines(
    bundle: Bundle,
    backend: str = "auto",
    *,
    device: int = 0,
    components: tuple[str, ...] | None = None,
    threads: int | None = None,
    cuda_graphs: bool | None = None,
    check: Check = "hash",
    build: bool = False,
    on_demand: tuple[str, ...] = (),
    on_open: OnOpen | None = None,
) -> OpenEngines:
    """Open the engines of a bundle for this machine, all of them or the named components.

    backend: `auto` or a backend's name; see `choose`
    device: which of the visible GPUs to run on, from 0; the CPU takes 0 alone
    threads: how many CPU threads a run may use, None for the backend's own choice
    cuda_graphs: whether a GPU's kernels are recorded and replayed; None and True: they are
    check: what is compared before a file is opened: its SHA-256, or only its size
    build: build the engines if there are none for this machine; it is logged, and said in the choice's reason
    on_demand: components that are opened when they are called, and freed by `OpenEngines.rest`
    on_open: may be told of each engine as soon as it runs, on any thread, while others are still opened
    Raises EngineError and BundleError.
    """
    if build:
        from latentrt.engines.build import build_missing

        choice = build_missing(bundle, backend, device=device)
    else:
        choice = choose(backend, bundle, device=device)
    if choice.backend == FOR_CPUS and bundle.manifest.precision in QUANTISED:
        _log.warning("'%s' is a bundle in %s: %s", bundle.root, bundle.manifest.precision, choice.reason)
    return OpenEngines(
        bundle,
        choice,
        components=components,
        threads=threads,
        cuda_graphs=cuda_graphs,
        check=check,
        on_demand=on_demand,
        on_open=on_open,
    )
