"""The engines of one target, opened on one device: workspaces to draw on, and engines for host arrays."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
from cachetools import LRUCache

from latentrt.engines.build_options import REFITTABLE
from latentrt.engines.bundle.files import Bundle, cache_folder, typed
from latentrt.engines.bundle.manifest import EngineRecord
from latentrt.engines.cuda.device import CudaDevice, Device
from latentrt.engines.cuda.stream import WorkQueue
from latentrt.engines.errors import ClosedError, DeviceLostError, EngineError, OutOfMemoryError, WrongMachineError
from latentrt.engines.lora.weight_changes import Adaptable, Changes
from latentrt.engines.spec import Array, Closing, Engine
from latentrt.engines.tensor_names import HINT, PIXELS
from latentrt.engines.tensorrt.engine import TensorRTEngine, in_micro_batches
from latentrt.engines.tensorrt.execution import Executor, Kernels, Plan, Program, Scratch, open_programs
from latentrt.engines.tensorrt.library import Flavor, cannot_run, mismatches, runtime_of
from latentrt.engines.tensorrt.logger import LogScope
from latentrt.engines.tensorrt.profiles import Origin
from latentrt.engines.tensorrt.workspace import SLOTS, Programs, TensorRTWorkspace
from latentrt.engines.workspace.contract import IDS, Workspace, WorkspaceShape

# Workspaces that are kept: each holds its contexts, buffers and graphs.
KEPT_WORKSPACES = 4


def open_tensorrt(
    library: ModuleType,
    directory: Path,
    record: EngineRecord,
    device: Device,
    *,
    factor: int,
    components: Sequence[str] | None = None,
    graphs: bool = True,
    workspaces: int = KEPT_WORKSPACES,
    slots: int = SLOTS,
) -> TensorRTSession:
    """Open the compiled engines in `directory`, read from all files at once.

    library: tensorrt, its lean runtime or tensorrt_rtx, of the version that the record's key names
    directory, record: what `find_engines` returns; files are not hashed here
    device: a `CudaDevice`, which is proof that a driver answers
    factor: how many pixels an element of the latents is wide, as the manifest says
    components: the ones to open, None for all
    graphs: whether executions are recorded as CUDA graphs
    workspaces: how many shapes are kept ready; the one that was used longest ago makes room, once nobody has it
    slots: how many stages a workspace can have on their way to the device; see `tensorrt_workspace.SLOTS`
    Raises EngineError with the library's own words, BundleError where a file cannot be read.
    """
    origin = Origin(bundle=directory.parent.parent, backend=record.key.backend, factor=factor)
    names = tuple(record.entries) if components is None else tuple(components)
    plans = {
        name: (directory / record.entries[name], record.specs[name], _kernels(directory, record, name))
        for name in names
    }
    return TensorRTSession(library, plans, device, origin, graphs=graphs, workspaces=workspaces, slots=slots)


def _kernels(directory: Path, record: EngineRecord, component: str) -> Kernels:
    """Return what keeps an engine's kernels: beside it or, where that is read-only, in the user's cache."""
    file = f"{component}.sm{(record.key.compute_capability or '').replace('.', '')}.kernels"
    cache = cache_folder()
    homes = [directory] if cache is None else [directory, cache / "kernels" / directory.name]
    return Kernels(*(home / file for home in homes))


class TensorRTSession(Closing):
    """Opened engines with the stream that all of them run in and the scratch memory that they share.

    What it hands out is closed with it. Threads may share it: work of one waits until the other's is in the queue.
    """

    def __init__(
        self,
        library: ModuleType,
        plans: Mapping[str, Plan],
        device: Device,
        origin: Origin,
        *,
        graphs: bool = True,
        workspaces: int = KEPT_WORKSPACES,
        slots: int = SLOTS,
    ) -> None:
        if min(workspaces, slots) < 1:
            raise EngineError(f"workspaces and slots: found {workspaces} and {slots}, expected 1 or more")
        start = time.perf_counter()
        self._origin, self._slots = origin, slots
        self._programs: dict[str, Program] = open_programs(library, plans, device)
        queue = WorkQueue(device)
        self._executor = Executor(queue=queue, scratch=Scratch(queue), graphs=graphs)
        self._workspaces: LRUCache[tuple[WorkspaceShape, str], TensorRTWorkspace] = LRUCache(workspaces)
        self._made = weakref.WeakSet[TensorRTWorkspace]()  # those that are kept, and those that somebody still has
        self._engines: list[TensorRTEngine] = []
        self._end = weakref.finalize(self, _free, self._executor, self._programs, self._made, self._engines)
        self.load_s = time.perf_counter() - start

    def workspace(self, shape: WorkspaceShape, *, denoiser: str, decoder: str | None) -> TensorRTWorkspace:
        """Return a blank workspace for a shape: the same one every time, reset, while it is kept.

        denoiser: the network that its stages run
        decoder: what its pixels come from; None where they come from elsewhere: it then takes no memory for any
        Raises EngineError where the engines are not compiled for it, with the command that builds them, and where
        the device has no room, not even once the others that are kept are given up.
        """
        with self._executor.queue.lock:
            self._check_open()
            _keep_kernels(self._programs)
            while True:
                try:
                    return self._blank(shape, denoiser, decoder)
                except OutOfMemoryError:
                    if self._workspaces.keys() <= {(shape, denoiser)}:
                        raise
                    self._workspaces.popitem()  # the one that was used longest ago, freed unless somebody has it

    def _blank(self, shape: WorkspaceShape, denoiser: str, decoder: str | None) -> TensorRTWorkspace:
        key = (shape, denoiser)
        if key not in self._workspaces:
            programs = self._drawing(denoiser)
            while self._workspaces.currsize >= self._workspaces.maxsize:
                self._workspaces.popitem()
            self._workspaces[key] = TensorRTWorkspace(self._executor, programs, shape, self._origin, slots=self._slots)
            self._made.add(self._workspaces[key])
        workspace = self._workspaces[key]
        workspace.reset(decoder=decoder)
        return workspace

    def _drawing(self, denoiser: str) -> Programs:
        if denoiser not in self._programs:
            raise EngineError(f"drawing needs {denoiser}, opened are {', '.join(self._programs)}")
        return Programs(
            unet=self._programs[denoiser],
            decoders=self._programs_with(PIXELS),
            text_encoders=self._programs_with(IDS),
            controlnets=self._programs_with(HINT),
        )

    def _programs_with(self, tensor: str) -> dict[str, Program]:
        """Return the programs that take or give a tensor of this name, which tells what they are."""
        return {
            name: program
            for name, program in self._programs.items()
            if any(spec.name == tensor for spec in (*program.spec.inputs, *program.spec.outputs))
        }

    def engine(self, component: str) -> TensorRTEngine:
        """Return a fresh engine for host arrays. Raises EngineError where the component was not opened."""
        self._check_open()
        program = self._programs.get(component)
        if program is None:
            raise EngineError(f"there is no {component} here, opened are {', '.join(self._programs)}")
        engine = TensorRTEngine(self._executor, program, self._origin)
        self._engines[:] = [*(one for one in self._engines if not one.closed), engine]
        return engine

    def refit(self, component: str, exchange: Callable[[Program, int], None]) -> None:
        """Exchange weights of an engine: `exchange` is given it and the stream in which to queue that.

        Workspaces are closed and executions are made again: that recorded ones see new weights is promised nowhere.
        """
        with self._executor.queue.lock:
            self._check_open()
            for workspace in list(self._made):
                workspace.close("had other weights; ask for it again")
            self._workspaces.clear()
            for engine in self._engines:
                engine.forget()
            self._executor.queue.drain()
            exchange(self._programs[component], self._executor.queue.stream)
            self._executor.queue.drain()

    @property
    def scratch_bytes(self) -> int:
        """Return how much device memory the engines share for what they compute on the way."""
        return self._executor.scratch.size

    def _check_open(self) -> None:
        if not self._end.alive:
            raise ClosedError(f"the engines of '{self._origin.bundle}' are closed; open the bundle again")

    def close(self) -> None:
        """Wait for the queue and free everything: contexts and graphs, engines, scratch memory, the stream.

        Closing twice is closing once. A session that nobody has any more closes itself, at the latest when the program
        ends. In a forked process nothing of it can be freed.
        """
        self._end()


def _keep_kernels(programs: Mapping[str, Program]) -> None:
    """Write down what was compiled when the engines ran, where there is something new."""
    for program in programs.values():
        program.kernels.keep()


def _free(
    executor: Executor,
    programs: dict[str, Program],
    workspaces: weakref.WeakSet[TensorRTWorkspace],
    engines: list[TensorRTEngine],
) -> None:
    with contextlib.suppress(DeviceLostError), executor.queue.lock:
        _keep_kernels(programs)
        for workspace in list(workspaces):
            workspace.close()
        while engines:
            engines.pop().close()
        programs.clear()
        executor.scratch.close()
        executor.queue.wait_idle()
        executor.queue.close()


UNKNOWN = "unknown"  # of weights where a refit went wrong: some may have been exchanged


def refit(program: Program, weights: Mapping[str, Array], base: Callable[[str], Array | None], stream: int) -> None:
    """Put weights into an engine, by the names of initializers, and queue the exchange.

    base: gives the values of what else must be supplied because the compiler has put it together with these
    Raises EngineError with the library's words; then some of the weights may have been exchanged and some not.
    """
    name, log = program.spec.component, LogScope(program.library)
    refitter = log.given(program.library.Refitter(program.engine, log.logger), f"{name}: no refitter")
    kept = dict(weights)  # the library reads them until the refit is in the queue
    for initializer, values in weights.items():
        _set(refitter, initializer, values, name, log)
    for initializer in refitter.get_missing_weights():
        own = base(initializer) if initializer else None
        if own is None:
            raise EngineError(
                f"{name}: its compiler has put '{initializer}' together with a weight that changes, and its own values "
                "are not known; add the LoRA when exporting: latentrt export CHECKPOINT BUNDLE --lora FILE"
            )
        kept[initializer] = own
        _set(refitter, initializer, own, name, log)
    if not refitter.refit_cuda_engine_async(stream):
        raise log.error(f"{name}: its weights could not be exchanged")


def _set(refitter: Any, initializer: str, values: Array, name: str, log: LogScope) -> None:
    if not refitter.set_named_weights(initializer, values):
        raise log.error(f"{name}: the weights of {initializer} were refused")


class Refits:
    """What the engines of a session have been changed to. They are changed in place, from the base's weights always."""

    def __init__(self, session: TensorRTSession, weights: Adaptable) -> None:
        self._session, self._weights = session, weights
        self._now: dict[str, Changes] = {}

    def adapt(self, changes: Mapping[str, Changes], components: tuple[str, ...]) -> None:
        """Change the weights of some components, and bring the others' back. Raises EngineError."""
        mine = {component: changes[component] for component in components if component in changes}
        if mine and REFITTABLE not in self._weights.record.key.options:
            raise EngineError(
                f"the engines in {self._weights.directory} were built without --refittable, so no LoRA can be added to "
                f"them; run `{self._weights.command}`"
            )
        for component, change in mine.items():
            self._weights.check(component, change)
        for component in {**self._now, **mine}:
            before, after = self._now.get(component), mine.get(component)
            if (before and before.key) != (after and after.key):
                self._exchange(component, before, after)

    def _exchange(self, component: str, before: Changes | None, after: Changes | None) -> None:
        """Refit what changes now, and what was changed before to the base's."""
        old, new = (change.deltas if change else {} for change in (before, after))
        names = [*new, *(name for name in old if name not in new)]
        self._now[component] = Changes(key=UNKNOWN, deltas=dict.fromkeys(names, ()))
        arrays = dict(self._weights.changed(component, name, new.get(name, ())) for name in names)
        self._session.refit(component, lambda program, stream: refit(program, arrays, self._base(component), stream))
        if after is None:
            del self._now[component]
        else:
            self._now[component] = after

    def _base(self, component: str) -> Callable[[str], Array | None]:
        return lambda initializer: self._weights.base(component, initializer)


class OnDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Engines that share one device's stream and scratch memory. It implements `backends.Opened`."""

    engines: dict[str, Engine]
    session: TensorRTSession
    refits: Refits

    @property
    def fills_cores(self) -> bool:
        """Tell whether one engine keeps the cores of this machine busy: it runs on the GPU."""
        return False

    @property
    def picks_rows(self) -> bool:
        """Tell that a ControlNet runs on all rows of a stage, whoever follows it."""
        return False

    def adapt(self, changes: Mapping[str, Changes]) -> None:
        """Change the weights of components, from the base's always. Raises EngineError."""
        self.refits.adapt(changes, tuple(self.engines))

    def workspace(self, shape: WorkspaceShape, *, state_rows: int, denoiser: str, decoder: str | None) -> Workspace:
        """Return the workspace of a shape and a denoiser: the same one every time, blank. Raises EngineError."""
        return self.session.workspace(shape, denoiser=denoiser, decoder=decoder)

    def close(self) -> None:
        """Wait for the device and free everything."""
        self.session.close()


def open_engines(
    bundle: Bundle,
    directory: Path,
    record: EngineRecord,
    components: tuple[str, ...],
    flavor: Flavor,
    *,
    device: int,
    graphs: bool = True,
) -> OnDevice:
    """Open engines on a GPU; graphs: whether executions are recorded. Raises EngineError and BundleError."""
    reason = cannot_run(flavor, device=device)
    library = None if reason else runtime_of(flavor, record.key)
    if library is None:
        differences = tuple(mismatches(bundle, flavor, record.key, device=device)) if reason is None else ()
        error = reason or WrongMachineError("; ".join(differences), differences=differences)
        raise error.within(f"the engines in {directory} cannot be opened here: ")
    factor = bundle.manifest.latents.factor
    session = open_tensorrt(
        library, directory, record, CudaDevice(device), factor=factor, components=components, graphs=graphs
    )
    command = f"latentrt build {typed(bundle.root)} --backend {flavor} --refittable"
    weights = Adaptable(record=record, directory=directory, files=bundle.root, command=command)
    engines = {name: in_micro_batches(session.engine(name)) for name in components}
    return OnDevice(engines=engines, session=session, refits=Refits(session, weights))
