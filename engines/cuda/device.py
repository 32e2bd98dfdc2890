"""The narrow seam to CUDA: memory, one stream's order, graphs and clocks. What runs engines needs no more than this.

Addresses, streams, events and graphs are whole numbers, as TensorRT takes them. Pinned memory is page-locked host
memory as NumPy arrays: the device copies to and from it without the host waiting.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from typing import Any, Protocol

import numpy as np

from latentrt.engines.cuda.gpus import bindings, cuda_error, find_gpu, no_gpu
from latentrt.engines.errors import FORKED, SMALLER, DeviceLostError, EngineError, OutOfMemoryError
from latentrt.engines.spec import Array

MEBIBYTE = 1 << 20
# How a wait is spent: at first awake, then in naps, of which the system makes about 0.1 ms each.
SPIN_S, NAP_S = 50e-6, 50e-6


class Device(Protocol):
    """A GPU, or in the tests a stand-in for one. Every call that fails raises EngineError.

    Calls that take a stream put work in its queue and return; the order in a stream is the order of the calls.
    Once the GPU is lost, or in a process that was forked, every call raises DeviceLostError, of what it was lost by
    first; but what frees or destroys does nothing then.
    """

    @property
    def index(self) -> int:
        """Return which of the visible GPUs it is, from 0."""
        ...

    def enter(self) -> int:
        """Make it the calling thread's current GPU, and return which was. Raises DeviceLostError after a fork alone."""
        ...

    def leave(self, before: int) -> None:
        """Make the GPU current again that was."""
        ...

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
    """A GPU through cuda-bindings, by its index among those that are visible. See `Device` for the methods.

    Raises EngineError where the bindings are missing, no driver answers or there is no such GPU: a constructed device
    is proof of all three, which TensorRT needs before its first call.
    """

    def __init__(self, index: int = 0) -> None:
        if find_gpu(index) is None:
            raise no_gpu("no NVIDIA GPU answers here; install or update NVIDIA's driver, and see CUDA_VISIBLE_DEVICES")
        self.index = index
        self._cuda = bindings()
        self._process = os.getpid()
        self._lost: DeviceLostError | None = None

    def enter(self) -> int:
        if os.getpid() != self._process:
            raise DeviceLostError(FORKED)
        try:
            before = int(self._call("cudaGetDevice"))
            if before != self.index:
                self._call("cudaSetDevice", self.index)
        except DeviceLostError:  # what is called next tells it; what only frees goes on
            return self.index
        return before

    def leave(self, before: int) -> None:
        if before != self.index:
            self._free("cudaSetDevice", before)

    def _ask(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """Call the runtime and return its code and what else it gives. Once the GPU is lost it is not called."""
        if self._lost is not None:
            raise self._lost.within("")
        if os.getpid() != self._process:
            raise DeviceLostError(FORKED)
        answer: tuple[Any, ...] = getattr(self._cuda, function)(*arguments)
        return answer

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the runtime and return what it gives besides its code. Raises EngineError with CUDA's own words."""
        code, *results = self._ask(function, *arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise self._error(function, code)
        return results[0] if len(results) == 1 else results

    def _error(self, function: str, code: Any) -> EngineError:
        error = cuda_error(self._cuda, function, code)
        if isinstance(error, DeviceLostError):
            self._lost = error
        return error

    def _free(self, function: str, *arguments: Any) -> None:
        """Call what gives something back: with the GPU it is gone already."""
        with contextlib.suppress(DeviceLostError):
            self._call(function, *arguments)

    def allocate(self, size: int) -> int:
        try:
            return int(self._call("cudaMalloc", max(size, 1)))
        except OutOfMemoryError:
            raise OutOfMemoryError(
                f"the GPU has {self.free_bytes() // MEBIBYTE} MiB free and {-(-size // MEBIBYTE)} MiB more are needed "
                f"(cudaErrorMemoryAllocation); {SMALLER}"
            ) from None

    def free(self, address: int) -> None:
        self._free("cudaFree", address)

    def allocate_pinned(self, size: int) -> Array:
        address = int(self._call("cudaMallocHost", max(size, 1)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, block: Array) -> None:
        self._free("cudaFreeHost", block.ctypes.data)

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
        self._free("cudaStreamDestroy", stream)

    def begin_capture(self, stream: int) -> None:
        # Relaxed: what threads of the service do with CUDA meanwhile neither fails nor is recorded, this one included:
        # Python may collect what another session has left there, which frees memory.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        recorded = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", recorded, 0))
        finally:
            self._free("cudaGraphDestroy", recorded)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        self._free("cudaGraphExecDestroy", graph)

    def create_event(self, *, timed: bool = False) -> int:
        return int(self._call("cudaEventCreateWithFlags", 0 if timed else self._cuda.cudaEventDisableTiming))

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: int) -> None:
        # Asked again and again: cudaEventSynchronize keeps a core busy, or with BlockingSync comes back 0.35 to 0.44 ms
        # late (H200, benchmarks/results/gpu-h200.json).
        asleep_from = time.perf_counter() + SPIN_S
        while not self._happened(event):
            if time.perf_counter() > asleep_from:
                time.sleep(NAP_S)

    def _happened(self, event: int) -> bool:
        code, *_ = self._ask("cudaEventQuery", event)
        if code in (self._cuda.cudaError_t.cudaSuccess, self._cuda.cudaError_t.cudaErrorNotReady):
            return bool(code == self._cuda.cudaError_t.cudaSuccess)
        raise self._error("cudaEventQuery", code)

    def elapsed_s(self, first: int, second: int) -> float:
        return float(self._call("cudaEventElapsedTime", first, second)) / 1e3

    def destroy_event(self, event: int) -> None:
        self._free("cudaEventDestroy", event)

    def free_bytes(self) -> int:
        free, _ = self._call("cudaMemGetInfo")
        return int(free)
