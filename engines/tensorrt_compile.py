"""One graph into one TensorRT plan. What the library says only to its logger is said here in errors."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from latentrt.engines.errors import EngineError
from latentrt.engines.interrupting import Cancelled, run_interruptibly
from latentrt.engines.options import BuildOptions
from latentrt.engines.progress import Report
from latentrt.engines.spec import EngineSpec
from latentrt.engines.timing_cache import attach_timing_cache, save_timing_cache

KEPT_LINES = 3  # of what the logger was told last
LONGEST_LINE = 400


def compile_graph(
    library: ModuleType, graph: Path, spec: EngineSpec, options: BuildOptions, *, what: str, report: Report
) -> memoryview:
    """Return the serialized engine of an ONNX graph with its external data beside it.

    library: tensorrt or tensorrt_rtx
    spec: its profiles become the engine's, in order
    what: names the work in the report
    Raises EngineError with the parser's or logger's words; KeyboardInterrupt after the compiler has stopped.
    """

    def work(cancelled: Cancelled) -> memoryview:
        return _compile(library, graph, spec, options, make_monitor(library, what, report, cancelled))

    return run_interruptibly(work)


def _compile(library: ModuleType, graph: Path, spec: EngineSpec, options: BuildOptions, monitor: Any) -> memoryview:
    logger = make_logger(library)
    builder = _given(library.Builder(logger), "no builder could be made", logger)
    flags = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = _given(builder.create_network(flags), "no network could be made", logger)
    _parse(library, network, graph, spec.component, logger)
    _let_attention_decompose(library, network)
    config = _configure(library, builder, options, logger)
    _add_profiles(builder, config, spec, logger)
    if options.timing_cache is not None:
        attach_timing_cache(config, options.timing_cache)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.error is not None:
        raise monitor.error
    compiled = memoryview(_given(plan, f"{spec.component} could not be compiled", logger))  # no copy: gigabytes
    if options.timing_cache is not None:
        save_timing_cache(config, options.timing_cache)
    return compiled


def make_logger(library: ModuleType) -> Any:
    """Return a logger of the library that keeps its errors in `lines` and prints nothing."""

    class Logger(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.INTERNAL_ERROR, library.ILogger.Severity.ERROR):
                self.lines.append(" ".join(message.split())[:LONGEST_LINE])

    return Logger()


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


def _given(result: Any, failure: str, logger: Any) -> Any:
    """Return what the library returned, unless that is its None for a failure."""
    if result is None:
        words = "; ".join(logger.lines[-KEPT_LINES:]) or "the library gave no reason"
        raise EngineError(f"{failure}: {words}")
    return result


def _parse(library: ModuleType, network: Any, graph: Path, component: str, logger: Any) -> None:
    parser = library.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    words = "; ".join(f"{e.node_operator() or 'graph'} {e.node_name()}: {e.desc()}" for e in errors[:KEPT_LINES])
    raise EngineError(f"the graph of {component} was refused by the ONNX parser: {words[: KEPT_LINES * LONGEST_LINE]}")


def _let_attention_decompose(library: ModuleType, network: Any) -> None:
    """Allow attention for which there is no fused kernel (a head size, a mask) to be computed in parts.

    It is still fused where a kernel exists. Without this one such layer fails the whole build.
    """
    if not hasattr(library, "IAttentionInputLayer"):
        return  # before TensorRT 10.14 the parser decomposes Attention itself
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == library.LayerType.ATTENTION_INPUT:
            layer.__class__ = library.IAttentionInputLayer  # the bindings hand out the base class
            layer.attention.decomposable = True


def _configure(library: ModuleType, builder: Any, options: BuildOptions, logger: Any) -> Any:
    config = _given(builder.create_builder_config(), "no builder configuration could be made", logger)
    # float32 is float32: the sampler's sums lose three digits in TF32.
    config.clear_flag(library.BuilderFlag.TF32)
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "EXCLUDE_LEAN_RUNTIME": options.version_compatible,  # the service brings it: latentrt[tensorrt-lean]
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip,
    }
    # TensorRT-RTX allows a pass to be recorded as a CUDA graph only where it allocates nothing itself.
    flags["REQUIRE_USER_ALLOCATION"] = hasattr(library.BuilderFlag, "REQUIRE_USER_ALLOCATION")
    for name, wanted in flags.items():
        if wanted:
            config.set_flag(getattr(library.BuilderFlag, name))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
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


def _add_profiles(builder: Any, config: Any, spec: EngineSpec, logger: Any) -> None:
    for sizes in spec.profiles:
        profile = builder.create_optimization_profile()
        for tensor in spec.inputs:
            shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape)
            profile.set_shape(tensor.name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            _given(None, f"{spec.component} takes no profile {dict(sizes)}", logger)
