"""The seam to CUDA: what the driver refuses becomes an EngineError with CUDA's own name for it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from latentrt.engines.cuda import device as seam
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.gpus import find_gpu
from latentrt.engines.errors import EngineError, NotInstalledError, OutOfMemoryError, WrongMachineError
from latentrt.engines.spec import Array
from tests.stand_in import L4

here = find_gpu() is not None


@pytest.fixture(scope="module")
def runtime() -> Any:
    return pytest.importorskip("cuda.bindings.runtime")


@pytest.fixture
def unprobed(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """A device on the real bindings that did not ask whether a driver answers."""
    monkeypatch.setattr(seam, "find_gpu", lambda index: L4)
    return CudaDevice()


def block() -> Array:
    return np.zeros(8, dtype=np.uint8)


CALLS: dict[str, Callable[[CudaDevice], Any]] = {
    "cudaMalloc": lambda device: device.allocate(8),
    "cudaMallocHost": lambda device: device.allocate_pinned(8),
    "cudaFreeHost": lambda device: device.free_pinned(block()),
    "cudaMemcpyAsync in": lambda device: device.copy_in(1, block(), 2),
    "cudaMemcpyAsync out": lambda device: device.copy_out(block(), 1, 2),
    "cudaMemcpyAsync": lambda device: device.copy(1, 2, 8, 3),
    "cudaMemsetAsync": lambda device: device.zero(1, 8, 2),
    "cudaStreamCreateWithFlags": lambda device: device.create_stream(),
    "cudaStreamSynchronize": lambda device: device.synchronize(1),
    "cudaStreamBeginCapture": lambda device: device.begin_capture(1),
    "cudaStreamEndCapture": lambda device: device.end_capture(1),
    "cudaGraphLaunch": lambda device: device.launch(1, 2),
    "cudaEventCreateWithFlags": lambda device: device.create_event(),
    "cudaEventRecord": lambda device: device.record(1, 2),
    "cudaEventQuery": lambda device: device.wait(1),
    "cudaEventElapsedTime": lambda device: device.elapsed_s(1, 2),
    "cudaMemGetInfo": lambda device: device.free_bytes(),
}


@pytest.mark.skipif(here, reason="a GPU answers here")
@pytest.mark.parametrize("name", CALLS)
def test_every_call_passes_what_the_bindings_take_and_tells_their_error(unprobed: CudaDevice, name: str) -> None:
    """The bindings check number and types of the arguments before the driver is asked for anything."""
    with pytest.raises(EngineError, match=rf"^{name.split()[0]}: cudaErrorInsufficientDriver \(CUDA driver"):
        CALLS[name](unprobed)


@pytest.mark.skipif(here, reason="a GPU answers here")
def test_without_a_driver_there_is_no_device(runtime: Any) -> None:
    assert find_gpu() is None
    with pytest.raises(WrongMachineError):
        CudaDevice()


def test_without_the_bindings_the_error_is_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(NotInstalledError) as caught:
        CudaDevice()
    assert caught.value.install == "pip install cuda-bindings"


class Driver:
    """The real bindings with some calls answered as a driver with a GPU would."""

    def __init__(self, runtime: Any, **answers: Any) -> None:
        self._runtime, self._answers = runtime, answers
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if name not in self._answers:
            return getattr(self._runtime, name)

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return self._answers[name]

        return call


def test_no_visible_gpu_is_no_device(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = (runtime.cudaError_t.cudaSuccess, 0)
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: answer)
    assert find_gpu() is None
    with pytest.raises(WrongMachineError):
        CudaDevice()


def test_a_full_gpu_is_told_in_mebibytes_with_the_mend(unprobed: CudaDevice, runtime: Any) -> None:
    codes = runtime.cudaError_t
    full = (codes.cudaErrorMemoryAllocation, None)
    unprobed._cuda = Driver(runtime, cudaMalloc=full, cudaMemGetInfo=(codes.cudaSuccess, 5 << 20, 9 << 30))
    with pytest.raises(OutOfMemoryError, match=r"^the GPU has 5 MiB free and 8 MiB more are needed"):
        unprobed.allocate((7 << 20) + 1)


@pytest.mark.parametrize("call", ["cudaMallocHost", "cudaGraphInstantiate", "cudaStreamCreateWithFlags"])
def test_a_full_gpu_is_told_whichever_call_meets_it(unprobed: CudaDevice, runtime: Any, call: str) -> None:
    unprobed._cuda = Driver(runtime, **{call: (runtime.cudaError_t.cudaErrorMemoryAllocation, None)})
    with pytest.raises(OutOfMemoryError):
        unprobed._call(call)


def test_pinned_memory_is_an_array_on_the_address_that_cuda_gave(unprobed: CudaDevice, runtime: Any) -> None:
    given = ctypes.create_string_buffer(16)
    success = runtime.cudaError_t.cudaSuccess
    driver = Driver(runtime, cudaMallocHost=(success, ctypes.addressof(given)), cudaFreeHost=(success,))
    unprobed._cuda = driver
    pinned = unprobed.allocate_pinned(16)
    assert pinned.shape == (16,) and pinned.dtype == np.uint8
    pinned[3:5].view(np.uint16)[:] = 513
    assert given.raw[3:5] == b"\x01\x02"
    unprobed.free_pinned(pinned)
    assert driver.calls == [("cudaMallocHost", 16), ("cudaFreeHost", ctypes.addressof(given))]


def test_what_was_recorded_is_destroyed_once_it_is_a_graph(unprobed: CudaDevice, runtime: Any) -> None:
    success = runtime.cudaError_t.cudaSuccess
    answers = {
        "cudaStreamEndCapture": (success, runtime.cudaGraph_t(7)),
        "cudaGraphInstantiate": (success, runtime.cudaGraphExec_t(8)),
        "cudaGraphDestroy": (success,),
    }
    driver = unprobed._cuda = Driver(runtime, **answers)
    assert unprobed.end_capture(5) == 8
    assert [name for name, *_ in driver.calls] == list(answers)
    answers["cudaGraphInstantiate"] = (runtime.cudaError_t.cudaErrorInvalidValue, None)
    driver = unprobed._cuda = Driver(runtime, **answers)
    with pytest.raises(EngineError, match=r"^cudaGraphInstantiate: cudaErrorInvalidValue"):
        unprobed.end_capture(5)
    assert driver.calls[-1][0] == "cudaGraphDestroy"


@pytest.mark.gpu
@pytest.mark.skipif(not here, reason="needs an NVIDIA GPU and none answers here")
def test_a_graph_replays_copies_on_a_gpu() -> None:
    device = CudaDevice()
    stream, event = device.create_stream(), device.create_event()
    marks = [device.create_event(timed=True) for _ in range(2)]
    pinned, addresses = device.allocate_pinned(64), [device.allocate(64) for _ in range(2)]
    device.begin_capture(stream)
    device.copy(addresses[1], addresses[0], 32, stream)
    graph = device.end_capture(stream)
    for value in (1, 2):
        pinned[:] = value
        device.record(marks[0], stream)
        device.copy_in(addresses[0], pinned, stream)
        device.zero(addresses[1], 64, stream)
        device.launch(graph, stream)
        device.copy_out(pinned, addresses[1], stream)
        device.record(marks[1], stream)
        device.record(event, stream)
        device.wait(event)
        assert pinned[:32].tolist() == [value] * 32 and not pinned[32:].any()
        assert 0 <= device.elapsed_s(*marks) < 60
    device.synchronize(stream)
    assert device.free_bytes() > 0
    device.free_graph(graph)
    for handle in (event, *marks):
        device.destroy_event(handle)
    for address in addresses:
        device.free(address)
    device.free_pinned(pinned)
    device.destroy_stream(stream)
