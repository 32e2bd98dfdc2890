"""One graph into one TensorRT plan. What the library says only to its logger is said here in errors."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import disk_errors
from latentrt.engines.bundle.staging import staged_file
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.errors import EngineError
from latentrt.engines.progress import Report
from latentrt.engines.spec import EngineSpec
from latentrt.engines.tensorrt.logger import KEPT_LINES, LONGEST_LINE, LogScope


def compile_graph(
    library: ModuleType,
    graph: Path,
    spec: EngineSpec,
    options: BuildOptions,
    *,
    tf32: bool,
    device: int | None,
    what: str,
    report: Report,
) -> memoryview:
    """Return the serialized engine of an ONNX graph with its external data beside it.

    library: tensorrt or tensorrt_rtx
    spec: its profiles become the engine's, in order
    tf32: whether float32 products may be computed in TF32, with 11 bits, on tensor cores
    device: which of the visible GPUs the compiler measures on, None for none
    what: names the work in the report
    Raises EngineError with the parser's or logger's words; KeyboardInterrupt after the compiler has stopped.
    """

    def work(cancelled: Cancelled) -> memoryview:
        if device is not None:
            CudaDevice(device).enter()  # for this thread, which ends with the work
        monitor = make_monitor(library, what, report, cancelled)
        return _compile(library, graph, spec, options, tf32=tf32, monitor=monitor)

    return run_interruptibly(work)


def _compile(
    library: ModuleType, graph: Path, spec: EngineSpec, options: BuildOptions, *, tf32: bool, monitor: Any
) -> memoryview:
    log = LogScope(library)
    builder = log.given(library.Builder(log.logger), "no builder could be made")
    flags = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = log.given(builder.create_network(flags), "no network could be made")
    _parse(library, network, graph, spec.component, log)
    _let_attention_decompose(library, network)
    config = _configure(library, builder, options, log, tf32=tf32)
    _add_profiles(builder, config, spec, log)
    if options.timing_cache is not None:
        attach_timing_cache(config, options.timing_cache)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.error is not None:
        raise monitor.error
    compiled = memoryview(log.given(plan, f"{spec.component} could not be compiled"))  # no copy: gigabytes
    if options.timing_cache is not None:
        save_timing_cache(config, options.timing_cache)
    return compiled


def make_monitor(library: ModuleType, what: str, report: Report, cancelled: Cancelled) -> Any:
    """Return a progress monitor that reports the outermost phase, and stops the build once it is cancelled.

    It never raises into the library, which would end the process: what `report` raises is kept in `error`, and stops
    the build.
    """

    class Monitor(library.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.error: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if phase in self.steps:  # the end is the caller's to tell
                    report(what, min(step + 1, self.steps[phase] - 1), self.steps[phase])
            except BaseException as error:
                self.error = error
            return self.error is None and not cancelled()

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _parse(library: ModuleType, network: Any, graph: Path, component: str, log: LogScope) -> None:
    parser = library.OnnxParser(network, log.logger)
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    words = "; ".join(f"{e.node_operator() or 'graph'} {e.node_name()}: {e.desc()}" for e in errors[:KEPT_LINES])
    raise EngineError(f"the graph of {component} was refused by the ONNX parser: {words[: KEPT_LINES * LONGEST_LINE]}")


def _let_attention_decompose(library: ModuleType, network: Any) -> None:
    """Allow attention for which there is no fused kernel (a head size, a mask) to be computed in parts.

    It is still fused where a kernel exists. Without this one such layer fails the whole build.
    """
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == library.LayerType.ATTENTION_INPUT:
            layer.__class__ = library.IAttentionInputLayer  # the bindings hand out the base class
            layer.attention.decomposable = True


def _configure(library: ModuleType, builder: Any, options: BuildOptions, log: LogScope, *, tf32: bool) -> Any:
    config = log.given(builder.create_builder_config(), "no builder configuration could be made")
    if not tf32:  # it is on by default
        config.clear_flag(library.BuilderFlag.TF32)
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "EXCLUDE_LEAN_RUNTIME": options.version_compatible,  # the service brings it: latentrt[tensorrt-lean]
        "REFIT": options.refit,
    }
    # TensorRT-RTX allows an execution to be recorded as a CUDA graph only where it allocates nothing itself.
    flags["REQUIRE_USER_ALLOCATION"] = hasattr(library.BuilderFlag, "REQUIRE_USER_ALLOCATION")
    for name, wanted in flags.items():
        if wanted:
            config.set_flag(getattr(library.BuilderFlag, name))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.aux_streams is not None:
        config.max_aux_streams = options.aux_streams
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.compute_capability is not None:
        _target(library, config, options.compute_capability)
    return config


def capabilities(library: ModuleType) -> list[str]:
    """Return the compute capabilities that a library builds for, as `8.9`; empty where it cannot be told."""
    members = getattr(library, "ComputeCapability", None)
    names = [name[2:] for name in getattr(members, "__members__", ()) if name.startswith("SM")]
    return [f"{name[:-1]}.{name[-1]}" for name in names]


def _target(library: ModuleType, config: Any, capability: str) -> None:
    member = getattr(library.ComputeCapability, "SM" + capability.replace(".", ""))
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(member, 0):
        raise EngineError(f"{library.__name__} {library.__version__} refused compute capability {capability}")


def _add_profiles(builder: Any, config: Any, spec: EngineSpec, log: LogScope) -> None:
    for sizes in spec.profiles:
        profile = builder.create_optimization_profile()
        for tensor in spec.inputs:
            shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape)
            profile.set_shape(tensor.name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise log.error(f"{spec.component} takes no profile {dict(sizes)}")


POLL_S = 0.02

T = TypeVar("T")
Cancelled = Callable[[], bool]

_log = logging.getLogger(__name__)


def run_interruptibly(work: Callable[[Cancelled], T]) -> T:
    """Return what `work` returns, or raise what it raises; KeyboardInterrupt only after it has ended.

    work: called in another thread, with a function that tells whether Ctrl-C was pressed and that it asks as often as
    it can. What the library calls back (a logger, a progress monitor) then runs in that thread too, where Python
    raises no KeyboardInterrupt into C++ frames that cannot pass it on.
    """
    job = _Job(work)
    try:
        threading.Thread(target=job.run, name="latentrt-work").start()
        job.wait()
    except KeyboardInterrupt:
        job.stop()
        raise
    return job.result()


class _Job(Generic[T]):
    """One call of `work`.

    Whether it runs is told by plain flags, never by `Thread.join` or `Thread.is_alive`: in Python before 3.13 a join
    that a signal interrupts marks the thread as stopped though it runs on, every later join returns at once, and the
    compiler's callbacks then meet an interpreter that has ended, which aborts the process
    (https://github.com/python/cpython/issues/90882). Nor by an Event, whose lock an interrupt can leave taken.
    """

    def __init__(self, work: Callable[[Cancelled], T]) -> None:
        self._work = work
        self._begun = self._ended = self._cancelled = False
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        self._begun = True  # set before the question is asked: either `stop` sees it, or it sees `stop`
        try:
            if not self._cancelled:
                self._results.append(self._work(lambda: self._cancelled))
        except BaseException as error:  # it belongs to whoever waits
            self._error = error
        finally:
            self._ended = True

    def wait(self) -> None:
        while not self._ended:
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Cancel the work and wait until it has ended, however often Ctrl-C is pressed: it cannot be left behind."""
        self._cancelled = True
        while self._begun and not self._ended:
            try:
                _log.warning("interrupted: waiting for the work to stop at its next step")
                self.wait()
            except KeyboardInterrupt:
                continue

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._results[0]


def attach_timing_cache(config: Any, file: Path) -> None:
    """Let a builder's configuration start from a file, or from nothing where there is none yet. Raises EngineError."""
    content = file.read_bytes() if file.exists() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            f"--timing-cache: {file} is no timing cache of this TensorRT on this GPU; name another file, or delete it"
        )


def save_timing_cache(config: Any, file: Path) -> None:
    """Write what is known now in one step. Of two builds that share a file the last one's knowledge stays."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)  # for the lock
        with staged_file(file) as beside:
            beside.write_bytes(config.get_timing_cache().serialize())
