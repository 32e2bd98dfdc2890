"""A stand-in for TensorRT's runtime: its engines are ONNX graphs, and its contexts queue ONNX Runtime on a HostDevice.

It is as strict as TensorRT: what TensorRT answers with None or False and a line to the logger, it does too.
"""

from __future__ import annotations

import enum
import json
import mmap
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime

from latentrt.engines.spec import Array, EngineSpec
from latentrt.engines.tensorrt.profiles import input_shapes
from tests.host_device import ALIGNMENT, FRESH, HostDevice, current_index

NAMES = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
    "tensor(uint8)": "UINT8",
    "tensor(bool)": "BOOL",
}
DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}

DataType = enum.Enum("DataType", list(DTYPES))
TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
Strategy = enum.Enum("Strategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
Kernels = enum.Enum("Kernels", ["LAZY", "EAGER", "NONE"])


class ILogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


def plan_bytes(model: Any, spec: EngineSpec) -> bytes:
    """Return a graph with its profiles, as what is compiled."""
    profiles = [input_shapes(spec, number) for number in range(len(spec.profiles))]
    return json.dumps(profiles).encode() + b"\n" + model.SerializeToString()


def make_library(
    device: HostDevice, *, others: Sequence[HostDevice] = (), rtx: bool = False, vague_outputs: bool = False
) -> Any:
    """Return a module with TensorRT's names, on a machine with a device or, by their indices, several.

    refuses: names of calls that fail from now on; silent: without a reason; engines: those alive
    compiled: what kernels were compiled for; of TensorRT-RTX alone
    combined: names of weights, each with those that must be supplied with it
    vague_outputs: as with TensorRT, the shapes of outputs are not known before those of inputs are
    """
    library: Any = ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    library.__version__ = "0.0.0"
    library.devices = (device, *others)
    library.engines, library.vague_outputs = weakref.WeakSet(), vague_outputs
    library.refuses, library.silent = set(), False
    library.ILogger, library.DataType, library.TensorIOMode = ILogger, DataType, TensorIOMode
    library.ExecutionContextAllocationStrategy = Strategy
    library.Runtime = lambda logger: Runtime(library, logger)
    library.combined, library.compiled = {}, []
    library.Refitter = Refitter
    if rtx:
        library.DynamicShapesKernelSpecializationStrategy = Kernels
    return library


class Runtime:
    def __init__(self, library: Any, logger: Any) -> None:
        self.library, self.logger = library, logger

    def fails(self, call: str) -> bool:
        """Tell whether a call shall fail, and give the logger the reason."""
        failing = call in self.library.refuses
        if failing and not self.library.silent:
            self.logger.log(ILogger.Severity.ERROR, f"{call}: as the test\n wishes")
        return failing

    def deserialize_cuda_engine(self, buffer: mmap.mmap) -> Engine | None:
        assert isinstance(buffer, mmap.mmap), "a plan is read through a memory map"
        if self.fails("deserialize_cuda_engine"):
            return None
        profiles, _, graph = bytes(buffer).partition(b"\n")
        try:
            engine = Engine(self, json.loads(profiles), graph)
        except ValueError:
            self.logger.log(ILogger.Severity.ERROR, "the plan has no magic tag")
            return None
        self.library.engines.add(engine)
        return engine


class Engine:
    def __init__(self, runtime: Runtime, profiles: list[dict[str, list[int]]], graph: bytes) -> None:
        self.runtime = runtime
        self.device: HostDevice = runtime.library.devices[current_index()]
        self.profiles = [{name: tuple(shape) for name, shape in profile.items()} for profile in profiles]
        self.graph = graph
        self.weigh(graph)
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.tensors = self.inputs | self.outputs
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(self.profiles)

    def weigh(self, graph: bytes) -> None:
        """Run this graph from now on."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the networks are tiny: threads would only wait for each other
        self.graph = graph
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, number: int) -> str:
        return list(self.tensors)[number]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode["INPUT" if name in self.inputs else "OUTPUT"]

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[NAMES[self.tensors[name].type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        vague = name in self.outputs and self.runtime.library.vague_outputs
        return tuple(axis if isinstance(axis, int) and not vague else -1 for axis in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [self.profiles[profile][name]] * 3

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        """A few times what the profile takes in: larger shapes need more."""
        return 4 * sum(int(np.prod(shape)) for shape in self.profiles[profile].values())

    def create_runtime_config(self) -> Config:
        return Config(self.runtime)

    def create_execution_context(self, config: Any) -> Context | None:
        rtx = isinstance(config, Config)
        assert (config.strategy if rtx else config) is Strategy.USER_MANAGED
        assert rtx == hasattr(self.runtime.library, "DynamicShapesKernelSpecializationStrategy")
        if self.runtime.fails("create_execution_context"):
            return None
        return CapturableContext(self, config) if rtx else Context(self)


class Refitter:
    """Exchanges initializers by name, late. As TensorRT's it may leave half of them when it fails."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine, self.library = engine, engine.runtime.library
        self.model = onnx.load_from_string(engine.graph)
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.given: dict[str, Array] = {}

    def set_named_weights(self, name: str, weights: Array) -> bool:
        tensor = self.tensors.get(name)
        fits = tensor is not None and tuple(tensor.dims) == weights.shape
        if not fits or weights.dtype != onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type):
            self.engine.runtime.logger.log(ILogger.Severity.ERROR, f"{name} does not fit")
            return False
        self.given[name] = weights
        return not self.engine.runtime.fails("set_named_weights")

    def get_missing_weights(self) -> list[str]:
        partners = [partner for name in self.given for partner in self.library.combined.get(name, ())]
        return [name for name in dict.fromkeys(partners) if name not in self.given]

    def refit_cuda_engine_async(self, stream: int) -> bool:
        assert stream != 0 and not self.get_missing_weights()
        failed = self.engine.runtime.fails("refit_cuda_engine_async")
        for name in list(self.given)[: len(self.given) // 2 if failed else None]:
            self.tensors[name].CopyFrom(onnx.numpy_helper.from_array(self.given[name], name))
        graph = self.model.SerializeToString()
        self.engine.device.put(stream, "refit", lambda: self.engine.weigh(graph))
        return not failed


class Config:
    strategy: Any = Strategy.STATIC
    dynamic_shapes_kernel_specialization_strategy: Any = Kernels.LAZY

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.cache = RuntimeCache(runtime)

    def create_runtime_cache(self) -> RuntimeCache | None:
        return None if self.runtime.fails("create_runtime_cache") else RuntimeCache(self.runtime)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return not self.runtime.fails("set_runtime_cache")

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class RuntimeCache:
    """Kernels by the names of what they are for. Those that another release compiled are refused."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.kernels: list[str] = []

    def deserialize(self, blob: bytes) -> bool:
        version, *kernels = blob.decode().split("\n")
        if version != self.runtime.library.__version__:
            return False
        self.kernels = kernels
        return True

    def serialize(self) -> bytes | None:
        content = "\n".join([self.runtime.library.__version__, *self.kernels])
        return None if self.runtime.fails("serialize") else content.encode()


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.library = engine, engine.runtime.library
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.ran = False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if self.engine.runtime.fails("set_optimization_profile_async"):
            return False
        self.profile = profile
        self.engine.device.put(stream, "profile", lambda: None)
        return 0 <= profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.engine.runtime.fails("set_input_shape") or shape != self.engine.profiles[self.profile][name]:
            return False
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        if self.engine.runtime.fails("infer_shapes"):
            raise RuntimeError("shape inference failed")
        missing = [name for name in self.engine.inputs if name not in self.shapes]
        if not missing:
            zeros = {name: np.zeros(self.shapes[name], DTYPES[self._type(name)]) for name in self.engine.inputs}
            found = self.engine.session.run(list(self.engine.outputs), zeros)
            self.shapes |= {name: array.shape for name, array in zip(self.engine.outputs, found, strict=True)}
        return missing

    def _type(self, name: str) -> str:
        return NAMES[self.engine.tensors[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile), "too little scratch memory"
        self.scratch = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % ALIGNMENT == 0, f"{name} is not aligned"
        self.addresses[name] = address
        return not self.engine.runtime.fails("set_tensor_address")

    def execute_async_v3(self, stream: int) -> bool:
        device = self.engine.device
        assert stream != 0 and set(self.addresses) == set(self.engine.tensors) and self.scratch is not None
        if self.engine.runtime.fails("execute_async_v3 in capture" if device.recording else "execute_async_v3"):
            return False
        if device.recording and not self.ran:
            self.engine.runtime.logger.log(ILogger.Severity.ERROR, "operation not permitted when stream is capturing")
            return False
        self.ran = True
        device.put(stream, self.name, self._work(dict(self.addresses), self.scratch))
        return True

    @property
    def name(self) -> str:
        return f"run {next(iter(self.engine.outputs))} {self.profile}"

    def _work(self, addresses: Mapping[str, int], scratch: tuple[int, int]) -> Any:
        """Return the work on the memory that is bound now, as kernels keep the arguments they were launched with."""
        device, engine = self.engine.device, self.engine

        def run() -> None:
            blocks = {name: self._array(name, address) for name, address in addresses.items()}
            feeds = {name: blocks[name].copy() for name in self.engine.inputs}
            device.resolve(*scratch).fill(FRESH)
            for name, array in zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True):
                blocks[name][...] = array

        return run

    def _array(self, name: str, address: int) -> Array:
        dtype, shape = np.dtype(DTYPES[self._type(name)]), self.shapes[name]
        block: Array = self.engine.device.resolve(address, int(np.prod(shape)) * dtype.itemsize)
        return block.view(dtype).reshape(shape)


class CapturableContext(Context):
    """TensorRT-RTX's: it can be recorded where it exchanges no kernels later."""

    def __init__(self, engine: Engine, config: Config) -> None:
        super().__init__(engine)
        self._eager = config.dynamic_shapes_kernel_specialization_strategy is Kernels.EAGER
        self._cache = config.cache

    def execute_async_v3(self, stream: int) -> bool:
        if self.name not in self._cache.kernels:
            self._cache.kernels.append(self.name)
            self.library.compiled.append(self.name)
        return super().execute_async_v3(stream)

    def is_stream_capturable(self, stream: int) -> bool:
        return self._eager and not self.engine.runtime.fails("is_stream_capturable")


def write_plan(file: Path, model: Any, spec: EngineSpec) -> None:
    """Write a graph as an engine file."""
    file.write_bytes(plan_bytes(model, spec))
