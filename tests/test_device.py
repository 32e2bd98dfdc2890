"""The seam to CUDA: what the driver refuses becomes an EngineError with CUDA's own name for it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.cuda import device as seam
from latentrt.engines.cuda import gpus
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.gpus import find_gpu
from latentrt.engines.cuda.stream import Turn
from latentrt.engines.errors import DeviceLostError, EngineError, NotInstalledError, OutOfMemoryError, WrongMachineError
from latentrt.engines.find import choose_to_build
from latentrt.engines.spec import Array
from tests.stand_in import L4, bindings_of

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
    with pytest.raises(EngineError, match=rf"^{name.split()[0]}: cudaErrorInsufficientDriver\b"):
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
    with pytest.raises(OutOfMemoryError, match=r"\b5 MiB .*\b8 MiB "):
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


def test_a_driver_that_is_too_old_is_an_error_and_not_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    old = bindings_of([L4], answer="cudaErrorInsufficientDriver", driver=12040)
    monkeypatch.setattr(gpus, "bindings", lambda: old)
    for attempt in (find_gpu, lambda: choose_to_build("auto", BuildOptions())):
        with pytest.raises(NotInstalledError) as caught:
            attempt()
        assert caught.value.install == "pip install 'cuda-bindings<13'" and "12.4" in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "driver"),
    [("cudaErrorInsufficientDriver", 0), ("cudaErrorNoDevice", 13000), ("cudaErrorStubLibrary", 0)],
)
def test_no_driver_and_no_gpu_are_a_machine_without_one(
    monkeypatch: pytest.MonkeyPatch, answer: str, driver: int
) -> None:
    monkeypatch.setattr(gpus, "bindings", lambda: bindings_of([], answer=answer, driver=driver))
    assert find_gpu() is None


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("cudaErrorSystemDriverMismatch", EngineError),
        ("cudaErrorInitializationError", DeviceLostError),
        ("cudaErrorIllegalAddress", DeviceLostError),
    ],
)
def test_a_driver_that_does_not_work_is_an_error(
    monkeypatch: pytest.MonkeyPatch, answer: str, kind: type[EngineError]
) -> None:
    monkeypatch.setattr(gpus, "bindings", lambda: bindings_of([L4], answer=answer))
    with pytest.raises(EngineError) as caught:
        find_gpu()
    assert type(caught.value) is kind


def test_a_fork_of_a_process_that_has_used_cuda_is_refused(
    monkeypatch: pytest.MonkeyPatch, unprobed: CudaDevice, runtime: Any
) -> None:
    monkeypatch.setattr(gpus, "bindings", lambda: bindings_of([L4]))
    assert find_gpu() == L4
    driver = unprobed._cuda = Driver(runtime, cudaFree=(runtime.cudaError_t.cudaSuccess,))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for attempt in (find_gpu, lambda: unprobed.allocate(8), unprobed.enter):
        with pytest.raises(DeviceLostError):
            attempt()
    unprobed.free(5)
    assert driver.calls == []


def test_once_it_is_lost_the_first_error_is_told_and_cuda_is_left_alone(unprobed: CudaDevice, runtime: Any) -> None:
    codes = runtime.cudaError_t
    sticky = {"cudaEventQuery": (codes.cudaErrorIllegalAddress,), "cudaMalloc": (codes.cudaErrorLaunchFailure, None)}
    driver = unprobed._cuda = Driver(runtime, **sticky, cudaFree=(codes.cudaErrorIllegalAddress,))
    for attempt in (lambda: unprobed.wait(1), lambda: unprobed.allocate(8), lambda: unprobed.synchronize(1)):
        with pytest.raises(DeviceLostError, match=r"^cudaEventQuery: cudaErrorIllegalAddress") as caught:
            attempt()
        assert not caught.value.retryable
    unprobed.free(5)
    assert unprobed.enter() == 0
    assert [name for name, *_ in driver.calls] == ["cudaEventQuery"]


def test_what_frees_finds_a_lost_gpu_without_a_word(unprobed: CudaDevice, runtime: Any) -> None:
    unprobed._cuda = Driver(runtime, cudaFree=(runtime.cudaError_t.cudaErrorIllegalAddress,))
    unprobed.free(5)
    with pytest.raises(DeviceLostError, match=r"^cudaFree"):
        unprobed.allocate(8)


def test_a_wait_asks_until_it_happened(unprobed: CudaDevice, runtime: Any) -> None:
    codes = runtime.cudaError_t
    answers = iter([codes.cudaErrorNotReady] * 300 + [codes.cudaSuccess])
    unprobed._cuda = SimpleNamespace(cudaError_t=codes, cudaEventQuery=lambda event: (next(answers),))
    unprobed.wait(1)
    assert next(answers, None) is None


@pytest.mark.parametrize(("current", "index", "set_to"), [(0, 0, []), (0, 1, [1, 0]), (1, 0, [0, 1])])
def test_a_thread_works_on_its_device_and_gets_back_the_one_it_had(
    monkeypatch: pytest.MonkeyPatch, runtime: Any, current: int, index: int, set_to: list[int]
) -> None:
    monkeypatch.setattr(seam, "find_gpu", lambda index: L4)
    device, success = CudaDevice(index), runtime.cudaError_t.cudaSuccess
    driver = device._cuda = Driver(runtime, cudaGetDevice=(success, current), cudaSetDevice=(success,))
    with Turn(device):
        pass
    assert [call[1] for call in driver.calls if call[0] == "cudaSetDevice"] == set_to


def test_a_recording_lets_this_thread_free_what_python_collects(unprobed: CudaDevice, runtime: Any) -> None:
    """Relaxed: an H200 refuses cudaFree in the same thread in either other mode, and loses the recording by it."""
    driver = unprobed._cuda = Driver(runtime, cudaStreamBeginCapture=(runtime.cudaError_t.cudaSuccess,))
    unprobed.begin_capture(7)
    (call,) = driver.calls
    assert call[1:] == (7, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)


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
