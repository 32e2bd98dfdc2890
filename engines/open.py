"""The engines of a bundle, opened for this machine."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from latentrt.engines.backends import BACKENDS, Opened, Opening, backend_on
from latentrt.engines.build_options import REFITTABLE, BuildOptions
from latentrt.engines.bundle.files import Bundle, Check, check_file
from latentrt.engines.bundle.manifest import ENGINE_RECORD, EngineRecord, LatentSpec
from latentrt.engines.cuda import gpus
from latentrt.engines.errors import BundleError, EngineError, WrongMachineError
from latentrt.engines.lora.weight_changes import NOTHING, Changes, keys_of
from latentrt.engines.spec import BackendName, Engine, EngineKey
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape

KEPT_COUNTS = 256  # shapes of which it is kept how many slots they may have: records are read to find that
_log = logging.getLogger(__name__)


class OpenEngines:
    """The engines of a bundle, ready to run, by component.

    engines: of those that were opened first, in use until `close`
    choice: the backend and why it was chosen
    key, home: of the engines that were opened first: what they are for, their directory and its record
    load_s: how long it took to find, check and open them
    found: the directory to open first; None for the one that suits best
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
    ) -> None:
        start = time.perf_counter()
        self.choice = choice
        self._bundle, self._check = bundle, check
        self._threads, self._cuda_graphs = threads, cuda_graphs
        self.home = directory, record = found or self._find()
        self._components = components or tuple(record.entries)
        self._opened: dict[Path, tuple[EngineRecord, Opened]] = {}
        self._further: list[Opened] = []
        self._opening = threading.RLock()  # what draws, encodes and decodes may miss the same engines at the same time
        self._counts: dict[WorkspaceShape, tuple[int, ...] | None] = {}
        self._changes: Mapping[str, Changes] | None = NOTHING  # None: some may be changed and some not
        self.engines = self._open(directory, record).engines
        self.key: EngineKey = record.key
        self.load_s = time.perf_counter() - start

    def _open(self, directory: Path, record: EngineRecord) -> Opened:
        with self._opening:
            if directory not in self._opened:
                opened = self._open_components(directory, record, self._components)
                try:
                    opened.adapt(self._changes or NOTHING)
                except BaseException:
                    opened.close()
                    raise
                self._opened[directory] = (record, opened)
            return self._opened[directory][1]

    def _open_components(self, directory: Path, record: EngineRecord, components: tuple[str, ...]) -> Opened:
        for name, file in record.files.items():
            check_file(directory, name, file, check=self._check)
        _log.info("opening %s: %s (%s)", directory, ", ".join(components), self.choice.reason)
        opening = Opening(
            bundle=self._bundle,
            directory=directory,
            record=record,
            components=components,
            threads=self._threads,
            cuda_graphs=self._cuda_graphs,
        )
        return backend_on(self.choice.backend, self.choice.device).open(opening)

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

    def _open_further(self, component: str, opened: Opened) -> None:
        with self._opening:
            if component not in opened.engines:
                (found,) = ((path, record) for path, (record, one) in self._opened.items() if one is opened)
                self._further.append(self._open_components(*found, (component,)))
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
        for _, opened in self._opened.values():
            opened.close()
        for opened in self._further:
            opened.close()
        self._opened.clear()
        self._further.clear()


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
) -> OpenEngines:
    """Open the engines of a bundle for this machine, all of them or the named components.

    backend: `auto` or a backend's name; see `choose`
    device: which of the visible GPUs to run on, from 0; the CPU takes 0 alone
    threads: how many CPU threads a run may use, None for the backend's own choice
    cuda_graphs: whether a GPU's kernels are recorded and replayed; None and True: they are
    check: what is compared before a file is opened: its SHA-256, or only its size
    build: build the engines if there are none for this machine; it is logged, and said in the choice's reason
    Raises EngineError and BundleError.
    """
    if build:
        from latentrt.engines.build import build_missing

        choice = build_missing(bundle, backend, device=device)
    else:
        choice = choose(backend, bundle, device=device)
    return OpenEngines(
        bundle,
        choice,
        components=components,
        threads=threads,
        cuda_graphs=cuda_graphs,
        check=check,
    )


# The fastest first. `auto` takes the first of these that a bundle has engines for here, or that can build them here.
FOR_GPUS: tuple[BackendName, ...] = ("tensorrt", "tensorrt-rtx", "cuda")
COMPILED_FOR_SIZES: tuple[BackendName, ...] = ("tensorrt", "tensorrt-rtx")
FOR_CPUS: BackendName = "cpu"


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The backend that was chosen, and why. device: which of the visible GPUs it is for, 0 on a CPU"""

    backend: BackendName
    reason: str
    device: int = 0


def choose(asked: str, bundle: Bundle, *, device: int = 0) -> Choice:
    """Choose a backend to run a bundle on: the one asked for, always.

    device: which of the visible GPUs, from 0
    With `auto`, on a machine whose NVIDIA GPU answers: the first of `FOR_GPUS` for which the bundle holds engines of
    that GPU; elsewhere the CPU. Raises EngineError if what was asked for is unknown or there is no such GPU, and
    where the bundle holds no engines for it: there is no silent second choice.
    """
    if asked != "auto":
        return _as_asked(asked, device)
    gpu = _gpu(device)
    if gpu is None:
        return Choice(backend=FOR_CPUS, reason="auto: no NVIDIA GPU answers here")
    reasons: list[EngineError] = []
    for name in FOR_GPUS:
        try:
            _, record = find_engines(bundle, name, device=device)
        except EngineError as error:
            reasons.append(error)
            continue
        reason = f"auto: {gpu.name} answers here, and the bundle's {name} {record.key.backend_version} engines"
        return Choice(backend=name, device=device, reason=reason)
    words = (
        f"{gpu.name} answers here and '{bundle.root}' holds no engines for it; run `latentrt build {bundle.root}"
        f"{_asking(device)}` on this machine, or choose --backend {FOR_CPUS} ({'; '.join(map(str, reasons))})"
    )
    other = next((error for error in reasons if isinstance(error, WrongMachineError) and error.differences), None)
    raise WrongMachineError(words, differences=other.differences) if other else EngineError(words)


def _gpu(device: int) -> gpus.Gpu | None:
    """Find a GPU; None where there is none at all and none was asked for. Raises EngineError."""
    gpu = gpus.find_gpu(device)
    if gpu is None and device:
        raise gpus.no_gpu(f"GPU {device} was asked for and no NVIDIA GPU answers here")
    return gpu


def serves(asked: str, bundle: Bundle, *, device: int = 0) -> bool:
    """Tell whether a bundle holds engines of this machine for the backend asked for, or with `auto` for one it takes.

    Raises EngineError on an unknown backend, and BundleError.
    """
    if asked != "auto":
        names: tuple[BackendName, ...] = (_as_asked(asked, device).backend,)
    else:
        names = FOR_GPUS if _gpu(device) is not None else (FOR_CPUS,)
    return any(
        backend_on(name, device).unavailable() is None and serving_engines(bundle, name, device=device)
        for name in names
    )


def cannot_build(backend: BackendName, options: BuildOptions, *, device: int = 0) -> EngineError | None:
    """Return the error that says why a backend's engines cannot be built here with these options, or None."""
    if backend != "cuda" and (options.recipe, options.tf32) != (None, None):
        return EngineError("--recipe and --tf32 are for the backend cuda: omit them")
    reason = backend_on(backend, device).cannot_build(options)
    if reason is not None or not options.references or backend not in COMPILED_FOR_SIZES:
        return reason
    from latentrt.engines.verify.references import unavailable  # which a service that only runs never needs

    return unavailable()


def choose_to_build(asked: str, options: BuildOptions, *, device: int = 0) -> Choice:
    """Choose a backend to build for: the one asked for, or with `auto` the best that can be built here for a GPU.

    Raises EngineError if there is none.
    """
    if asked != "auto":
        return _as_asked(asked, device)
    gpu = _gpu(device)
    if gpu is None:
        return Choice(backend=FOR_CPUS, reason="auto: no NVIDIA GPU answers here")
    refusals = {name: cannot_build(name, options, device=device) for name in FOR_GPUS}
    best = next((name for name, refusal in refusals.items() if refusal is None), None)
    if best is None:
        words = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
        raise EngineError(f"{gpu.name} answers here and nothing can build engines for it ({words})")
    return Choice(backend=best, device=device, reason=f"auto: {gpu.name} answers here, and {best} can build for it")


def _as_asked(asked: str, device: int) -> Choice:
    for name in BACKENDS:
        if name == asked:
            return Choice(backend=name, device=device, reason="as asked")
    raise EngineError(f"there is no backend '{asked}'; choose one of auto, {', '.join(BACKENDS)}")


def find_engines(
    bundle: Bundle, backend: BackendName, *, needs: WorkspaceShape | None = None, device: int = 0
) -> tuple[Path, EngineRecord]:
    """Find the engines of a backend that run on this machine, or one of its GPUs, and were compiled for a shape.

    needs: the shape to draw in; None for any, the bundle's own size by preference
    Raises EngineError, which says how to fix it, and BundleError if a record contradicts its directory.
    """
    reason = backend_on(backend, device).unavailable()
    if reason is not None:
        raise reason.within(f"the backend '{backend}' cannot run here: ")
    serving = serving_engines(bundle, backend, device=device)
    if not serving:
        raise _no_engines(bundle, backend, device)
    fitting = [found for found in serving if fits(found[1], needs or _own_shape(bundle), bundle)]
    fitting.sort(key=lambda found: REFITTABLE not in found[1].key.options)  # those that LoRAs can change come first
    if needs is not None and not fitting:
        raise EngineError(_no_shape(bundle, backend, needs, serving))
    return (fitting or serving)[0]


def serving_engines(bundle: Bundle, backend: BackendName, *, device: int = 0) -> list[tuple[Path, EngineRecord]]:
    """Return all engines of an available backend that run on this machine, or its GPU. Raises BundleError."""
    return [(path, record) for path, record, differences in _engines(bundle, backend, device) if not differences]


def _engines(bundle: Bundle, backend: BackendName, device: int) -> list[tuple[Path, EngineRecord, list[str]]]:
    found = []
    for path, record in bundle.engine_directories().items():
        if record.key.backend != backend:
            continue
        differences = backend_on(backend, device).mismatches(bundle, record.key)
        if path.name != record.key.directory:
            raise BundleError(
                f"{path / ENGINE_RECORD} was built for something other than its directory's name says "
                f"({'; '.join(differences) or 'other shapes or options'}); delete {path} and run "
                f"`latentrt build {bundle.root} --backend {backend}`"
            )
        found.append((path, record, differences))
    return found


def fits(record: EngineRecord, shape: WorkspaceShape, bundle: Bundle) -> bool:
    """Tell whether a picture of this shape can be drawn with engines: with those that take any shape, always."""
    factor = bundle.manifest.latents.factor
    axes = {
        "pictures": shape.pictures,
        "tokens": shape.tokens,
        "width": shape.width,
        "height": shape.height,
        "latent_width": shape.width // factor,
        "latent_height": shape.height // factor,
    }
    return all(
        not spec.profiles
        or any(all(axes.get(axis, size) == size for axis, size in profile.items()) for profile in spec.profiles)
        for spec in record.specs.values()
    )


def _own_shape(bundle: Bundle) -> WorkspaceShape:
    width, height = bundle.manifest.default_size
    tokens = max((tokenizer.max_length for tokenizer in bundle.manifest.tokenizers.values()), default=0)
    return WorkspaceShape(pictures=1, tokens=tokens, width=width, height=height)


def _no_engines(bundle: Bundle, backend: BackendName, device: int) -> EngineError:
    fix = _build_command(bundle, backend, device)
    others = sorted((differences for _, _, differences in _engines(bundle, backend, device)), key=len)
    if not others:
        return EngineError(f"'{bundle.root}' holds no engines for the backend '{backend}'; {fix}")
    words = f"the engines in '{bundle.root}' are for another target ({'; '.join(others[0])}); {fix}"
    return WrongMachineError(words, differences=tuple(others[0]))


def _build_command(bundle: Bundle, backend: BackendName, device: int) -> str:
    """Return the command that builds engines for this machine, and what it lacks to run it."""
    lacking = cannot_build(backend, BuildOptions(), device=device)
    first = f" (first: {lacking})" if lacking is not None else ""
    return f"run `latentrt build {bundle.root} --backend {backend}{_asking(device)}` on this machine{first}"


def _asking(device: int) -> str:
    """Return the option that a command asks for a GPU by, nothing for the first."""
    return f" --device {device}" if device else ""


def _no_shape(
    bundle: Bundle, backend: BackendName, needs: WorkspaceShape, serving: list[tuple[Path, EngineRecord]]
) -> str:
    held = dict.fromkeys(shape for _, record in serving for shape in shapes_of(record))
    return (
        f"'{bundle.root}' holds no {backend} engines for {needs.width}x{needs.height} pictures {needs.pictures} "
        f"tokens {needs.tokens}, and shapes must match exactly; it holds {', '.join(held)}; run `latentrt build "
        f"{bundle.root} --backend {backend} --size {needs.width}x{needs.height} --batch {needs.pictures} "
        f"--tokens {needs.tokens}`"
    )


def shapes_of(record: EngineRecord) -> list[str]:
    """Return the shapes that engines were compiled for, `512x512 pictures 1 tokens 77`; empty for any shape."""
    return list(dict.fromkeys(re.sub(r" rows \d+", "", profile) for profile in record.key.profiles))
