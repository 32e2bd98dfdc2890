"""The narrow seam to CUDA: memory, one stream's order, graphs and clocks. What runs engines needs no more than this.

Addresses, streams, events and graphs are whole numbers, as TensorRT takes them. Pinned memory is page-locked host
memory as NumPy arrays: the device copies to and from it without the host waiting.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from latentrt.engines.errors import (
    SMALLER,
    EngineError,
    NotInstalledError,
    OutOfMemoryError,
    WrongMachineError,
    backend_error,
)
from latentrt.engines.spec import Array

MEBIBYTE = 1 << 20


class Device(Protocol):
    """A GPU, or in the tests a stand-in for one. Every call that fails raises EngineError.

    Calls that take a stream put work in its queue and return; the order in a stream is the order of the calls.
    """

    def allocate(self, size: int) -> int:
        """Return the address of `size` fresh bytes of device memory, aligned to 256 and not cleared."""
        ...

    def free(self, address: int) -> None: ...

    def allocate_pinned(self, size: int) -> Array:
        """Return `size` fresh bytes of pinned memory: (size,), uint8, not cleared."""
        ...

    def free_pinned(self, block: Array) -> None:
        """Free what `allocate_pinned` returned. No view of it may be used after."""
        ...

    def copy_in(self, address: int, block: Array, stream: int) -> None:
        """Copy contiguous pinned bytes to the device. They may not change before the copy ran."""
        ...

    def copy_out(self, block: Array, address: int, stream: int) -> None:
        """Copy from the device into contiguous pinned bytes. They hold the values once the copy ran."""
        ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy `size` bytes on the device."""
        ...

    def zero(self, address: int, size: int, stream: int) -> None:
        """Set `size` bytes on the device to zero."""
        ...

    def create_stream(self) -> int: ...

    def synchronize(self, stream: int) -> None:
        """Wait until all that was put in the stream ran."""
        ...

    def destroy_stream(self, stream: int) -> None: ...

    def begin_capture(self, stream: int) -> None:
        """From now on this thread's work in the stream is recorded, not run."""
        ...

    def end_capture(self, stream: int) -> int:
        """Return what was recorded as a graph, ready to launch."""
        ...

    def launch(self, graph: int, stream: int) -> None: ...

    def free_graph(self, graph: int) -> None: ...

    def create_event(self, *, timed: bool = False) -> int: ...

    def record(self, event: int, stream: int) -> None:
        """Let the event stand for the stream's work up to here."""
        ...

    def wait(self, event: int) -> None:
        """Wait until the work that the event stands for ran."""
        ...

    def elapsed_s(self, first: int, second: int) -> float:
        """Return the seconds that passed on the device between two timed events that both happened."""
        ...

    def destroy_event(self, event: int) -> None: ...

    def free_bytes(self) -> int:
        """Return how much device memory is free now."""
        ...


class CudaDevice:
    """The first visible GPU, through cuda-bindings. See `Device` for the methods.

    Raises EngineError where the bindings are missing or no driver answers: a constructed device is proof of both,
    which TensorRT needs before its first call.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise no_bindings() from None
        self._cuda: Any = runtime
        code, count = runtime.cudaGetDeviceCount()
        if code != runtime.cudaError_t.cudaSuccess:
            raise WrongMachineError(
                f"no NVIDIA GPU answers here: {self._words(code)}; install or update NVIDIA's driver"
            )
        if count < 1:
            raise WrongMachineError("no NVIDIA GPU answers here: the driver shows none; see CUDA_VISIBLE_DEVICES")

    def _words(self, code: Any) -> str:
        name, text = (self._cuda.cudaGetErrorName(code)[1], self._cuda.cudaGetErrorString(code)[1])
        return f"{name.decode()} ({text.decode()})"

    def _error(self, function: str, code: Any) -> EngineError:
        words = self._words(code)
        return backend_error(f"{function}: {words}", words)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the runtime and return what it gives besides its code. Raises EngineError with CUDA's own words."""
        code, *results = getattr(self._cuda, function)(*arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise self._error(function, code)
        return results[0] if results else None

    def allocate(self, size: int) -> int:
        code, address = self._cuda.cudaMalloc(max(size, 1))
        if code == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemoryError(
                f"the GPU has {self.free_bytes() // MEBIBYTE} MiB free and {-(-size // MEBIBYTE)} MiB more are needed "
                f"(cudaErrorMemoryAllocation); {SMALLER}"
            )
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise self._error("cudaMalloc", code)
        return int(address)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> Array:
        address = int(self._call("cudaMallocHost", max(size, 1)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, block: Array) -> None:
        self._call("cudaFreeHost", block.ctypes.data)

    def copy_in(self, address: int, block: Array, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, block.ctypes.data, block.nbytes, kind, stream)

    def copy_out(self, block: Array, address: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", block.ctypes.data, address, block.nbytes, kind, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def zero(self, address: int, size: int, stream: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def create_stream(self) -> int:
        # Not blocking: it does not wait for stream 0, which other libraries of the process may use.
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def begin_capture(self, stream: int) -> None:
        # Thread local: what other threads of the service do with CUDA meanwhile neither fails nor is recorded.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        recorded = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", recorded, 0))
        finally:
            self._call("cudaGraphDestroy", recorded)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def create_event(self, *, timed: bool = False) -> int:
        # Blocking: a thread that waits for a picture sleeps instead of keeping a core busy.
        untimed = 0 if timed else self._cuda.cudaEventDisableTiming
        return int(self._call("cudaEventCreateWithFlags", self._cuda.cudaEventBlockingSync | untimed))

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: int) -> None:
        self._call("cudaEventSynchronize", event)

    def elapsed_s(self, first: int, second: int) -> float:
        return float(self._call("cudaEventElapsedTime", first, second)) / 1e3

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def free_bytes(self) -> int:
        code, free, _ = self._cuda.cudaMemGetInfo()
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise self._error("cudaMemGetInfo", code)
        return int(free)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The first visible NVIDIA GPU."""

    name: str
    compute_capability: str
    sm_count: int
    memory_bytes: int
    driver_major: int


def no_bindings() -> NotInstalledError:
    """Return the error of a machine on which CUDA cannot be asked."""
    return NotInstalledError("cuda-bindings is not installed", install="pip install cuda-bindings")


def no_gpu(sentence: str) -> EngineError:
    """Return the error where `find_gpu` finds none: it cannot ask, or there is none. sentence: who needs one"""
    if importlib.util.find_spec("cuda") is None:
        return no_bindings().within(f"{sentence}: ")
    return WrongMachineError(sentence)


def find_gpu() -> Gpu | None:
    """Describe the first NVIDIA GPU, or return None: no bindings, no driver or no GPU."""
    try:
        from cuda.bindings import runtime as cuda
    except ImportError:
        return None
    code, count = cuda.cudaGetDeviceCount()
    if code != cuda.cudaError_t.cudaSuccess or count < 1:
        return None
    code, properties = cuda.cudaGetDeviceProperties(0)
    if code != cuda.cudaError_t.cudaSuccess:
        return None
    _, driver = cuda.cudaDriverGetVersion()
    return Gpu(
        name=properties.name.decode(),
        compute_capability=f"{properties.major}.{properties.minor}",
        sm_count=properties.multiProcessorCount,
        memory_bytes=properties.totalGlobalMem,
        driver_major=driver // 1000,
    )
