"""Compiled engines on the device: read, checked against their record, and run in contexts that share scratch memory.

For `tensorrt`, its lean runtime and `tensorrt_rtx` alike: nothing here needs a builder or a parser.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from latentrt.engines.bundle.staging import staged_file
from latentrt.engines.cuda.device import Device
from latentrt.engines.cuda.stream import WorkQueue
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.spec import EngineSpec, TensorSpec
from latentrt.engines.tensorrt.logger import LogScope
from latentrt.engines.tensorrt.profiles import REBUILD, Shape, input_shapes

# TensorRT's names of the types that our engines may take and give.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_log = logging.getLogger(__name__)

ANY = -1  # how TensorRT writes an axis whose size the profile gives


class Program(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One engine on the device, as its spec says. It lives as long as what refers to it."""

    library: ModuleType
    engine: Any
    spec: EngineSpec
    kernels: Kernels


class Kernels:
    """The kernels that TensorRT-RTX compiled for this GPU while an engine ran, kept for the processes to come.

    The library validates a file before it takes anything from it: one of another GPU, driver or release gives nothing,
    and is written anew. A cache outlives the contexts that use it, and a refit. Other libraries never ask for one.

    files: where it may lie; it is written to the first that can be
    """

    def __init__(self, *files: Path) -> None:
        self._files = files
        self._cache: Any = None
        self._content = b""  # of the file
        self._used = False

    def join(self, config: Any, log: LogScope) -> None:
        """Let contexts of a configuration find kernels here, and leave what they compile. Raises EngineError."""
        if self._cache is None:
            self._cache = log.given(config.create_runtime_cache(), "no cache of kernels could be made")
            self._read()
        if not config.set_runtime_cache(self._cache):
            raise log.error("the cache of kernels was refused")

    def _read(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                self._content = file.read_bytes()
                if not self._cache.deserialize(self._content):
                    _log.info("the kernels in %s are another machine's: they are compiled anew", file)
                return

    def use(self) -> None:
        """Note that a context is about to run that may compile some."""
        self._used = self._cache is not None

    def keep(self) -> None:
        """Write what was compiled since the last time. Where nothing can be written it is compiled anew each time."""
        if not self._used:
            return
        self._used = False
        serialized = self._cache.serialize()
        content = self._content if serialized is None else bytes(serialized)
        if content == self._content:
            return
        self._content = content
        for file in self._files:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                with staged_file(file) as beside:
                    beside.write_bytes(content)
                return
        _log.warning("compiled kernels could not be kept in %s", " or in ".join(map(str, self._files)))


Plan = tuple[Path, EngineSpec, Kernels]
"""An engine file, what it is to take and to give, and where its kernels are kept."""


def open_programs(library: ModuleType, plans: Mapping[str, Plan], device: Device) -> dict[str, Program]:
    """Read engine files to a device, all at once, and return their programs by component.

    A driver must have answered before: without one some releases of TensorRT crash the process.
    Raises EngineError with the logger's words, BundleError where a file cannot be read.
    """

    def entered(plan: Plan) -> Program:  # not as the pool's initializer, whose errors are not given on
        device.enter()
        return open_program(library, *plan)

    with ThreadPoolExecutor(max_workers=max(len(plans), 1)) as pool:
        return dict(zip(plans, pool.map(entered, plans.values()), strict=True))


def open_program(library: ModuleType, file: Path, spec: EngineSpec, kernels: Kernels) -> Program:
    """Read one engine file and check it against its spec. Raises as `open_programs` does."""
    log = LogScope(library)
    # A runtime each: one runtime may not be used from two threads.
    runtime = log.given(library.Runtime(log.logger), f"{library.__name__} gave no runtime")
    with _map(file) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise log.error(f"{library.__name__} {library.__version__} cannot load {file} ({REBUILD})")
    if differences := _differences(library, engine, spec):
        raise EngineError(f"{file} is not what its record says: {'; '.join(differences)}; {REBUILD}")
    return Program(library=library, engine=engine, spec=spec, kernels=kernels)


def _map(file: Path) -> mmap.mmap:
    """Map a file into memory: gigabytes of weights go to the device without a second copy on the host."""
    try:
        with file.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file is a ValueError
        raise BundleError(f"{file} cannot be read ({error}); {REBUILD}") from None


def _differences(library: ModuleType, engine: Any, spec: EngineSpec) -> list[str]:
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    takes = {name for name in names if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT}
    found = []
    for side, tensors, there in (("takes", spec.inputs, takes), ("gives", spec.outputs, set(names) - takes)):
        if there != {tensor.name for tensor in tensors}:
            wanted = ", ".join(sorted(tensor.name for tensor in tensors))
            found.append(f"it {side} {', '.join(sorted(there))}, expected {wanted}")
    if found:
        return found
    found = [line for tensor in spec.inputs for line in _tensor_differences(engine, tensor, may_vary=False)]
    found += [line for tensor in spec.outputs for line in _tensor_differences(engine, tensor, may_vary=True)]
    if engine.num_optimization_profiles != len(spec.profiles):
        return [*found, f"it has {engine.num_optimization_profiles} profiles, expected {len(spec.profiles)}"]
    return [*found, *_profile_differences(engine, spec)]


def _tensor_differences(engine: Any, tensor: TensorSpec, *, may_vary: bool) -> list[str]:
    """Compare type and fixed axes. may_vary: the compiler may not know a fixed axis of an output, which shows later."""
    dtype = engine.get_tensor_dtype(tensor.name).name
    shape = tuple(engine.get_tensor_shape(tensor.name))
    fits = len(shape) == len(tensor.shape) and all(
        isinstance(axis, str) or size == axis or (may_vary and size == ANY)
        for axis, size in zip(tensor.shape, shape, strict=True)
    )
    if fits and DTYPES.get(dtype) == tensor.dtype:
        return []
    return [f"{tensor.name} is {DTYPES.get(dtype, dtype)}{list(shape)}, expected {tensor}"]


def _profile_differences(engine: Any, spec: EngineSpec) -> list[str]:
    found = []
    for number in range(len(spec.profiles)):
        for name, shape in input_shapes(spec, number).items():
            limits = {tuple(limit) for limit in engine.get_tensor_profile_shape(name, number)}
            if limits != {shape}:
                found.append(f"{name} in profile {number} is {sorted(limits)}, expected {shape}")
    return found


class Scratch:
    """Device memory for what is computed on the way. Engines share it because they run one after another."""

    def __init__(self, queue: WorkQueue) -> None:
        self._queue = queue
        self.address = 0
        self.size = 0

    @property
    def extent(self) -> tuple[int, int]:
        """Return its address and size."""
        return self.address, self.size

    def reserve(self, size: int) -> None:
        """Have at least this many bytes. Growing waits for the queue, and moves the memory."""
        if size <= self.size:
            return
        self.close()
        self.address, self.size = self._queue.device.allocate(size), size

    def close(self) -> None:
        """Wait for the queue and free the memory."""
        if self.size:
            self._queue.wait_idle()
            self._queue.device.free(self.address)
            self.address = self.size = 0


class Executor(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Where executions run, one after another. graphs: whether they become CUDA graphs"""

    queue: WorkQueue
    scratch: Scratch
    graphs: bool


Copy = tuple[int, int, int]
"""Target address, source address and bytes of a copy on the device."""


class Execution:
    """One profile of one engine in a context of its own, with fixed addresses.

    Run first, it is put in the queue kernel by kernel, as TensorRT needs once, and then recorded as a CUDA graph,
    which every later run launches. A context for each graph, and scratch memory shared by the contexts, is what
    NVIDIA's documentation advises.
    """

    def __init__(self, executor: Executor, program: Program, profile: int) -> None:
        self._executor = executor  # and not the program: once it is closed it keeps no engine on the device
        self._log, self._kernels = LogScope(program.library), program.kernels
        self.name = f"{program.spec.component}, profile {profile}"
        self.inputs = input_shapes(program.spec, profile)
        self._context = self._given(self._make_context(program), "no context could be made")
        self._select(profile)
        self.outputs = {tensor.name: self._output_shape(tensor) for tensor in program.spec.outputs}
        self._scratch_bytes = program.engine.get_device_memory_size_for_profile_v2(profile)
        executor.scratch.reserve(self._scratch_bytes)
        self._before, self._after = tuple[Copy, ...](), tuple[Copy, ...]()
        self._used_scratch: tuple[int, int] | None = None
        self._graph: int | None = None

    def _given(self, result: Any, failure: str) -> Any:
        """Return what the library returned, unless that is its None or False for a failure."""
        return self._log.given(None if result is False else result, f"{self.name}: {failure}")

    def _make_context(self, program: Program) -> Any:
        library, engine = program.library, program.engine
        strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        specialization = getattr(library, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is None:
            return engine.create_execution_context(strategy)
        config = self._given(engine.create_runtime_config(), "no runtime configuration could be made")
        config.set_execution_context_allocation_strategy(strategy)
        # TensorRT-RTX would else exchange kernels later, behind the back of the graph.
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        self._kernels.join(config, self._log)
        return engine.create_execution_context(config)

    def _select(self, profile: int) -> None:
        chosen = self._context.set_optimization_profile_async(profile, self._executor.queue.stream)
        self._given(chosen, "the profile was refused")
        for name, shape in self.inputs.items():
            self._given(self._context.set_input_shape(name, shape), f"{name} was refused the shape {shape}")
        if missing := self._infer_shapes():
            raise self._log.error(f"{self.name}: the shapes of {', '.join(missing)} are not known")

    def _infer_shapes(self) -> list[str]:
        """Return the tensors whose shapes are not known yet."""
        try:
            return list(self._context.infer_shapes())
        except RuntimeError as error:  # for any other reason than that one is not known
            raise self._log.error(f"{self.name}: its shapes could not be inferred ({error})") from None

    def _output_shape(self, tensor: TensorSpec) -> Shape:
        shape = tuple(self._context.get_tensor_shape(tensor.name))
        fixed = zip(tensor.shape, shape, strict=True)
        if any(size < 0 or (isinstance(axis, int) and size != axis) for axis, size in fixed):
            raise EngineError(f"{self.name} gives {tensor.name} as {shape}, expected {tensor}; {REBUILD}")
        return shape

    def bind(self, addresses: Mapping[str, int], *, before: Sequence[Copy] = (), after: Sequence[Copy] = ()) -> None:
        """Set the address of every input and output, once. before, after: made on the device with each run."""
        self._before, self._after = tuple(before), tuple(after)
        for name in (*self.inputs, *self.outputs):
            bound = self._context.set_tensor_address(name, addresses[name])
            self._given(bound, f"the address of {name} was refused")

    def run(self) -> None:
        """Put one run in the queue. Raises EngineError."""
        if self._used_scratch != self._executor.scratch.extent:
            self._use_scratch()
        if self._graph is not None:
            self._executor.queue.device.launch(self._graph, self._executor.queue.stream)
            return
        self._enqueue()
        if self._executor.graphs:
            self._graph = self._capture()

    def _use_scratch(self) -> None:
        """Use the scratch memory where it is now. A graph that used it where it was is of no use any more."""
        scratch = self._executor.scratch
        self._drop_graph()
        self._kernels.use()
        scratch.reserve(self._scratch_bytes)
        self._context.set_device_memory(scratch.address, scratch.size)
        self._used_scratch = scratch.extent

    def _enqueue(self) -> None:
        queue = self._executor.queue
        for target, source, size in self._before:
            queue.device.copy(target, source, size, queue.stream)
        self._given(self._context.execute_async_v3(queue.stream), "it could not be run")
        for target, source, size in self._after:
            queue.device.copy(target, source, size, queue.stream)

    def _capture(self) -> int:
        queue = self._executor.queue
        can = getattr(self._context, "is_stream_capturable", None)  # only TensorRT-RTX tells
        if can is not None and not can(queue.stream):
            raise EngineError(
                f"{self.name} cannot be recorded as a CUDA graph; build it again with this version of latentrt, "
                "or open the bundle with cuda_graphs=False, which is slower"
            )
        queue.device.begin_capture(queue.stream)
        try:
            self._enqueue()
        except BaseException:
            with contextlib.suppress(EngineError):  # the stream must leave capture; the first error is the one to tell
                queue.device.free_graph(queue.device.end_capture(queue.stream))
            raise
        return queue.device.end_capture(queue.stream)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._executor.queue.wait_idle()
            self._executor.queue.device.free_graph(self._graph)
            self._graph = None

    def close(self) -> None:
        """Free the graph and the context."""
        self._drop_graph()
        self._context = None
