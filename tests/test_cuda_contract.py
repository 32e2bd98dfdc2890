"""The seam to CUDA on a real GPU: what `Device` promises, what CUDA itself does, and what it costs there.

It needs a GPU, cuda-bindings, numpy and msgspec, and nothing else of the project's tests:

    PYTHONPATH=src python3 -m pytest tests/test_cuda_contract.py -c /dev/null --noconftest -p no:cacheprovider -q -s

With -s it prints facts, a JSON object a line, of which nothing is asserted. Kernels are PTX that the driver compiles.
Work is held back by a kernel that spins on a flag of the host, not by time.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.cuda import gpus
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.gpus import find_gpu
from latentrt.engines.cuda.stream import Allocations, StagingRing, Turn, WorkQueue
from latentrt.engines.errors import (
    RESTART,
    EngineError,
    NotInstalledError,
    OutOfMemoryError,
    WrongMachineError,
)

try:
    HERE = find_gpu() is not None
except EngineError:
    HERE = False
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HERE, reason="needs an NVIDIA GPU and none answers here"),
]
MIB = 1 << 20
SOURCE = Path(gpus.__file__).absolute().parents[2].parent
NUMBERS = np.random.default_rng(5)
LIMIT_NS = 60_000_000_000  # a held queue goes on by itself after this, so that a failed test ends

PTX = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry hold(.param .u64 flag, .param .u64 limit)
{
  .reg .pred %p<3>; .reg .b32 %r<2>; .reg .b64 %d<6>;
  ld.param.u64 %d1, [flag];
  ld.param.u64 %d2, [limit];
  mov.u64 %d3, %globaltimer;
again:
  ld.volatile.u32 %r1, [%d1];
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra done;
  mov.u64 %d4, %globaltimer;
  sub.u64 %d5, %d4, %d3;
  setp.lt.u64 %p2, %d5, %d2;
  @%p2 bra again;
done:
  ret;
}
.visible .entry crash(.param .u64 address)
{
  .reg .b32 %r<2>; .reg .b64 %d<2>;
  ld.param.u64 %d1, [address];
  mov.u32 %r1, 7;
  st.global.u32 [%d1], %r1;
  ret;
}
\0"""


def tell(fact: str, /, **facts: Any) -> None:
    """Print facts about the machine as one line."""
    print(json.dumps({"fact": fact, **facts}), flush=True)


@pytest.fixture(scope="module")
def cuda() -> Any:
    from cuda.bindings import runtime

    return runtime


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture
def queue(device: CudaDevice) -> Iterator[WorkQueue]:
    made = WorkQueue(device)
    yield made
    made.drain()
    made.close()


@pytest.fixture
def allocations(queue: WorkQueue) -> Iterator[Allocations]:
    made = Allocations(queue)
    yield made
    queue.drain()
    made.close()


class Kernels:
    """Kernels to test with, launched as one thread."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver
        code, self._module = driver.cuModuleLoadData(PTX)
        if code != driver.CUresult.CUDA_SUCCESS:
            pytest.skip(f"the driver compiles no PTX here ({code})")

    def launch(self, name: bytes, stream: int, *numbers: int) -> None:
        code, function = self._driver.cuModuleGetFunction(self._module, name)
        assert code == self._driver.CUresult.CUDA_SUCCESS, code
        arguments = (numbers, (ctypes.c_uint64,) * len(numbers))
        (code,) = self._driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, arguments, 0)
        assert code == self._driver.CUresult.CUDA_SUCCESS, code


@pytest.fixture(scope="module")
def kernels(device: CudaDevice) -> Kernels:
    device.free(device.allocate(1))  # a context for the driver
    return Kernels()


class Hold:
    """A kernel that holds a stream back until it is let go."""

    def __init__(self, device: CudaDevice, kernels: Kernels, stream: int, *, limit_ns: int = LIMIT_NS) -> None:
        self._device, self._block = device, device.allocate_pinned(4)
        self._block[:] = 0
        kernels.launch(b"hold", stream, self._block.ctypes.data, limit_ns)

    def let_go(self) -> None:
        self._block[:] = 1

    def free(self) -> None:
        self._device.free_pinned(self._block)


@pytest.fixture
def hold(device: CudaDevice, kernels: Kernels) -> Iterator[Callable[[int], Hold]]:
    made: list[Hold] = []

    def start(stream: int) -> Hold:
        made.append(Hold(device, kernels, stream))
        return made[-1]

    yield start
    for one in made:
        one.let_go()
    from cuda.bindings import runtime

    runtime.cudaDeviceSynchronize()
    for one in made:
        one.free()


def happened(cuda: Any, event: int) -> bool:
    (code,) = cuda.cudaEventQuery(event)
    assert code in (cuda.cudaError_t.cudaSuccess, cuda.cudaError_t.cudaErrorNotReady)
    return bool(code == cuda.cudaError_t.cudaSuccess)


def random_bytes(size: int) -> Any:
    return NUMBERS.integers(0, 256, size, dtype=np.uint8)


# Which GPU.


def test_a_gpu_is_described_as_cuda_describes_it(cuda: Any) -> None:
    gpu = find_gpu()
    assert gpu is not None
    names = cuda.cudaDeviceAttr
    for attribute, value in {
        names.cudaDevAttrMultiProcessorCount: gpu.sm_count,
        names.cudaDevAttrComputeCapabilityMajor: int(gpu.compute_capability.split(".")[0]),
        names.cudaDevAttrComputeCapabilityMinor: int(gpu.compute_capability.split(".")[1]),
    }.items():
        assert cuda.cudaDeviceGetAttribute(attribute, 0)[1] == value
    total = cuda.cudaMemGetInfo()[2]
    assert gpu.name.startswith("NVIDIA") and 0.9 * total <= gpu.memory_bytes <= 1.1 * total
    assert gpu.driver_major == cuda.cudaDriverGetVersion()[1] // 1000 >= 12 and gpu.index == 0
    tell("gpu", name=gpu.name, compute_capability=gpu.compute_capability, sm_count=gpu.sm_count)
    tell("memory", properties=gpu.memory_bytes, info=total, gpus=cuda.cudaGetDeviceCount()[1])
    tell("versions", driver=cuda.cudaDriverGetVersion()[1], runtime=cuda.cudaRuntimeGetVersion()[1])


@pytest.mark.parametrize("make", [find_gpu, CudaDevice])
def test_a_gpu_that_is_not_there_is_refused_with_the_number_of_those_that_are(cuda: Any, make: Any) -> None:
    count = cuda.cudaGetDeviceCount()[1]
    for index in (count, -1):
        with pytest.raises(WrongMachineError) as caught:
            make(index)
        assert re.findall(r"-?\d+", str(caught.value))[:2] == [str(index), str(count)]


def test_a_driver_that_is_too_old_is_not_taken_for_none(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = cuda.cudaError_t
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (codes.cudaErrorInsufficientDriver, None))
    monkeypatch.setattr(cuda, "cudaDriverGetVersion", lambda: (codes.cudaSuccess, 12040))
    for make in (find_gpu, CudaDevice):
        with pytest.raises(NotInstalledError) as caught:
            make()
        assert "12.4" in str(caught.value) and caught.value.install.startswith("pip install 'cuda-bindings<")


def test_each_thread_works_on_the_device_while_it_has_the_turn_and_gets_its_own_back(
    cuda: Any, device: CudaDevice
) -> None:
    turn = Turn(device)

    def work(number: int) -> Any:
        with turn:
            current = cuda.cudaGetDevice()[1]
            address = device.allocate(MIB)
            attributes = cuda.cudaPointerGetAttributes(address)[1]
            device.free(address)
        return current, attributes.device, cuda.cudaGetDevice()[1]

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(16))) == {(0, 0, 0)}
    for index in range(1, cuda.cudaGetDeviceCount()[1]):
        other = CudaDevice(index)
        with Turn(other):
            assert cuda.cudaGetDevice()[1] == index
            address = other.allocate(8)
            assert cuda.cudaPointerGetAttributes(address)[1].device == index
            with turn:
                assert cuda.cudaGetDevice()[1] == 0
            other.free(address)
        assert cuda.cudaGetDevice()[1] == 0


# Memory.


def test_memory_is_aligned_counted_and_given_back(device: CudaDevice) -> None:
    before = device.free_bytes()
    addresses = [device.allocate(size) for size in (0, 1, 255, 257, 512 * MIB)]
    assert all(address % 256 == 0 for address in addresses) and len(set(addresses)) == len(addresses)
    assert before - device.free_bytes() >= 512 * MIB
    for address in addresses:
        device.free(address)
    assert device.free_bytes() >= before - 2 * MIB


def test_what_was_freed_cannot_be_freed_again(device: CudaDevice) -> None:
    address = device.allocate(8)
    device.free(address)
    with pytest.raises(EngineError) as caught:
        device.free(address)
    assert type(caught.value) is EngineError
    device.free(device.allocate(8))


def test_pinned_memory_is_the_hosts_and_known_to_cuda(cuda: Any, device: CudaDevice) -> None:
    block = device.allocate_pinned(1000)
    assert block.shape == (1000,) and block.dtype == np.uint8 and block.flags.writeable
    attributes = cuda.cudaPointerGetAttributes(block.ctypes.data)[1]
    assert attributes.type == cuda.cudaMemoryType.cudaMemoryTypeHost
    block[:] = 7
    device.free_pinned(block)


@pytest.mark.parametrize("size", [1, 255, 4096, 16 * MIB + 3])
def test_copies_bring_every_bit_there_and_back(queue: WorkQueue, allocations: Allocations, size: int) -> None:
    device, stream = queue.device, queue.stream
    there, elsewhere = allocations.allocate(size), allocations.allocate(size + 512)
    host, back = allocations.pinned(size), allocations.pinned(size)
    host[:] = random_bytes(size)
    device.copy_in(there, host, stream)
    device.copy(elsewhere + 256, there, size, stream)
    device.copy_out(back, elsewhere + 256, stream)
    queue.drain()
    assert np.array_equal(host, back)
    device.zero(elsewhere + 256, size // 2, stream)
    device.copy_out(back, elsewhere + 256, stream)
    queue.drain()
    assert not back[: size // 2].any() and np.array_equal(host[size // 2 :], back[size // 2 :])


def test_more_than_the_card_has_is_told_in_mebibytes_and_nothing_is_broken(device: CudaDevice) -> None:
    before = device.free_bytes()
    gpu = find_gpu()
    assert gpu is not None
    with pytest.raises(OutOfMemoryError) as caught:
        device.allocate(gpu.memory_bytes + (1 << 30))
    assert isinstance(caught.value, MemoryError) and caught.value.retryable
    free, needed = (int(number) for number in re.findall(r"(\d+) MiB", str(caught.value)))
    assert free <= gpu.memory_bytes // MIB < needed == -(-(gpu.memory_bytes + (1 << 30)) // MIB)
    queue = WorkQueue(device)
    allocations = Allocations(queue)
    host = allocations.pinned(MIB)
    host[:] = 3
    address = allocations.allocate(MIB)
    device.copy_in(address, host, queue.stream)
    queue.drain()
    allocations.close()
    queue.close()
    assert device.free_bytes() >= before - 8 * MIB


def test_a_full_card_takes_more_again_once_something_is_freed(device: CudaDevice) -> None:
    blocks = list[int]()
    with pytest.raises(OutOfMemoryError):
        while True:
            blocks.append(device.allocate(4 << 30))
    left = device.free_bytes()
    device.free(blocks.pop())
    blocks.append(device.allocate(4 << 30))
    for address in blocks:
        device.free(address)
    tell("filled", blocks=len(blocks), left_bytes=left)


def test_a_holding_is_freed_once(queue: WorkQueue) -> None:
    allocations = Allocations(queue)
    before = queue.device.free_bytes()
    allocations.allocate(64 * MIB), allocations.pinned(64), allocations.event(), allocations.event(timed=True)
    queue.drain()
    allocations.close()
    allocations.close()
    assert queue.device.free_bytes() >= before - 2 * MIB


# Order.


def test_work_is_queued_and_an_event_waits_for_all_before_it(
    cuda: Any, queue: WorkQueue, allocations: Allocations, hold: Callable[[int], Hold]
) -> None:
    """The host goes on while the queue is held, and finds old values until it waited."""
    device = queue.device
    address, host, back, done = (
        allocations.allocate(64),
        allocations.pinned(64),
        allocations.pinned(64),
        allocations.event(),
    )
    host[:], back[:] = 5, 0
    held = hold(queue.stream)
    device.copy_in(address, host, queue.stream)
    device.copy_out(back, address, queue.stream)
    queue.record(done)
    assert not happened(cuda, done.handle) and not back.any()
    held.let_go()
    queue.wait_until(done)
    assert back.tolist() == [5] * 64 and happened(cuda, done.handle)


def test_other_threads_run_while_one_waits(
    queue: WorkQueue, allocations: Allocations, hold: Callable[[int], Hold]
) -> None:
    """Were Python's lock held in a wait, nobody could let the queue go on before the kernel's own limit."""
    held, done = hold(queue.stream), allocations.event()
    queue.record(done)
    timer = threading.Timer(0.05, held.let_go)
    start = time.perf_counter()
    timer.start()
    queue.wait_until(done)
    queue.drain()
    assert time.perf_counter() - start < LIMIT_NS / 2e9
    timer.join()


def test_two_streams_do_not_wait_for_one_another(
    cuda: Any, device: CudaDevice, queue: WorkQueue, allocations: Allocations, hold: Callable[[int], Hold]
) -> None:
    other = WorkQueue(device)
    beside = Allocations(other)
    first, second = allocations.event(), beside.event()
    address, host = beside.allocate(64), beside.pinned(64)
    held = hold(queue.stream)
    queue.record(first)
    host[:] = 9
    device.copy_in(address, host, other.stream)
    other.record(second)
    other.wait_until(second)
    assert not happened(cuda, first.handle)
    held.let_go()
    queue.wait_until(first)
    beside.close()
    other.close()


def test_a_slot_is_filled_again_only_after_its_copy_ran(
    queue: WorkQueue, allocations: Allocations, hold: Callable[[int], Hold]
) -> None:
    staging = StagingRing(queue, allocations, 64, slots=2)
    addresses, back = [allocations.allocate(64) for _ in range(3)], allocations.pinned(3 * 64)
    held = hold(queue.stream)
    for number in range(2):
        staging.send(addresses[number], [(0, np.full(64, number + 1, dtype=np.uint8))])
    third = threading.Thread(target=staging.send, args=(addresses[2], [(0, np.full(64, 3, dtype=np.uint8))]))
    third.start()
    third.join(0.05)
    assert third.is_alive()
    held.let_go()
    third.join()
    for number in range(3):
        queue.device.copy_out(back[number * 64 :][:64], addresses[number], queue.stream)
    queue.drain()
    assert back.reshape(3, 64).T.tolist() == [[1, 2, 3]] * 64


def test_the_device_keeps_time_between_timed_events_alone(
    device: CudaDevice, kernels: Kernels, queue: WorkQueue, allocations: Allocations
) -> None:
    first, second, untimed = allocations.event(timed=True), allocations.event(timed=True), allocations.event()
    queue.record(first)
    pause = Hold(device, kernels, queue.stream, limit_ns=20_000_000)
    queue.record(second)
    queue.record(untimed)
    queue.drain()
    assert device.elapsed_s(first.handle, second.handle) >= 0.015
    with pytest.raises(EngineError):
        device.elapsed_s(first.handle, untimed.handle)
    pause.free()


# Graphs.


def record_copies(device: CudaDevice, stream: int, meanwhile: Callable[[], object], size: int = 256) -> Any:
    """Record in, on the device, out; return (graph, host in, host out, addresses)."""
    addresses = [device.allocate(size) for _ in range(2)]
    host, back = device.allocate_pinned(size), device.allocate_pinned(size)
    host[:], back[:] = 1, 0
    device.begin_capture(stream)
    device.copy_in(addresses[0], host, stream)
    meanwhile()
    device.zero(addresses[1], size, stream)
    device.copy(addresses[1], addresses[0], size // 2, stream)
    device.copy_out(back, addresses[1], stream)
    return device.end_capture(stream), host, back, addresses


def replay(device: CudaDevice, queue: WorkQueue, recorded: Any) -> None:
    """Launch a graph twice with other numbers, compare, and free all."""
    graph, host, back, addresses = recorded
    assert not back.any(), "recorded work ran"
    for number in (3, 4):
        host[:] = number
        device.launch(graph, queue.stream)
        queue.drain()
        half = back.size // 2
        assert back.tolist() == [number] * half + [0] * (back.size - half)
    device.free_graph(graph)
    for block in (host, back):
        device.free_pinned(block)
    for address in addresses:
        device.free(address)


def test_a_graph_is_recorded_without_running_and_replays(device: CudaDevice, queue: WorkQueue) -> None:
    replay(device, queue, record_copies(device, queue.stream, lambda: None))


def in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Return the same work done in a thread of its own, waited for; what it raises is raised."""

    def start() -> object:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    return start


@pytest.mark.parametrize("where", ["the same thread", "another thread"])
def test_memory_events_and_streams_come_and_go_during_a_recording(
    device: CudaDevice, queue: WorkQueue, where: str
) -> None:
    """As when Python collects another session's engine there, or another thread opens one."""
    other = WorkQueue(device)
    old, old_block, old_event = device.allocate(MIB), device.allocate_pinned(MIB), device.create_event()
    old_recorded = record_copies(device, other.stream, lambda: None)

    def come_and_go() -> None:
        device.free(device.allocate(MIB))
        device.free_pinned(device.allocate_pinned(MIB))
        device.free(old)
        device.free_pinned(old_block)
        device.record(old_event, other.stream)
        device.wait(old_event)
        device.destroy_event(old_event)
        replay(device, other, old_recorded)
        other.close()

    meanwhile = come_and_go if where == "the same thread" else in_thread(come_and_go)
    replay(device, queue, record_copies(device, queue.stream, meanwhile))


def test_what_python_collects_during_a_recording_does_no_harm(device: CudaDevice, queue: WorkQueue) -> None:
    class Owner:
        pass

    owner = Owner()
    owner.me = owner  # type: ignore[attr-defined]
    finalizer = weakref.finalize(owner, device.free, device.allocate(MIB))
    del owner

    def collect() -> None:
        import gc

        gc.collect()
        assert not finalizer.alive

    replay(device, queue, record_copies(device, queue.stream, collect))


def test_two_threads_record_in_two_streams_at_once(device: CudaDevice, queue: WorkQueue) -> None:
    other, both = WorkQueue(device), threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        recorded = list(pool.map(lambda one: record_copies(device, one.stream, lambda: both.wait(30)), (queue, other)))
    for one, graph in zip((queue, other), recorded, strict=True):
        replay(device, one, graph)
    other.close()


def launch_often(device: CudaDevice, graph: int, stream: int) -> None:
    for _ in range(2000):
        device.launch(graph, stream)


def test_a_graph_is_dropped_while_another_thread_launches_its_own(device: CudaDevice, queue: WorkQueue) -> None:
    other = WorkQueue(device)
    mine, theirs = (record_copies(device, one.stream, lambda: None) for one in (queue, other))
    with ThreadPoolExecutor(1) as pool:
        launched = pool.submit(launch_often, device, theirs[0], other.stream)
        replay(device, queue, mine)
        launched.result()
    other.drain()
    replay_blank = theirs[2]
    assert replay_blank[: replay_blank.size // 2].all()
    device.free_graph(theirs[0])
    for block in theirs[1:3]:
        device.free_pinned(block)
    for address in theirs[3]:
        device.free(address)
    other.close()


def test_a_recording_that_fails_leaves_a_stream_that_records_again(device: CudaDevice, queue: WorkQueue) -> None:
    device.begin_capture(queue.stream)
    with pytest.raises(EngineError):
        device.synchronize(queue.stream)  # waiting for what is only recorded
    with pytest.raises(EngineError):
        device.end_capture(queue.stream)
    replay(device, queue, record_copies(device, queue.stream, lambda: None))


MODES = ("Global", "ThreadLocal", "Relaxed")
ASIDE: dict[str, Callable[[Any, Any], Any]] = {
    "cudaMalloc": lambda cuda, own: cuda.cudaMalloc(MIB)[0],
    "cudaFree": lambda cuda, own: cuda.cudaFree(own["address"])[0],
    "cudaMallocHost": lambda cuda, own: cuda.cudaMallocHost(MIB)[0],
    "cudaFreeHost": lambda cuda, own: cuda.cudaFreeHost(own["pinned"])[0],
    "cudaMemGetInfo": lambda cuda, own: cuda.cudaMemGetInfo()[0],
    "cudaEventSynchronize": lambda cuda, own: cuda.cudaEventSynchronize(own["event"])[0],
    "cudaEventQuery": lambda cuda, own: cuda.cudaEventQuery(own["event"])[0],
    "cudaStreamSynchronize": lambda cuda, own: cuda.cudaStreamSynchronize(own["stream"])[0],
    "cudaDeviceSynchronize": lambda cuda, own: cuda.cudaDeviceSynchronize()[0],
    "cudaStreamCreate": lambda cuda, own: cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)[0],
    "cudaMemcpy": lambda cuda, own: cuda.cudaMemcpy(
        own["address"], own["address"] + 512, 256, cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    )[0],
}


def test_what_each_way_of_recording_allows_meanwhile(cuda: Any, device: CudaDevice) -> None:
    """Facts: CUDA's answer to a call in the same thread and in another one, and to the end of the recording."""
    codes = cuda.cudaError_t

    def attempt(mode: str, name: str, *, aside: bool) -> str:
        stream, target = device.create_stream(), device.allocate(MIB)
        own = {
            "address": device.allocate(MIB),
            "pinned": cuda.cudaMallocHost(MIB)[1],
            "event": device.create_event(),
            "stream": device.create_stream(),
        }
        flag = getattr(cuda.cudaStreamCaptureMode, f"cudaStreamCaptureMode{mode}")
        assert cuda.cudaStreamBeginCapture(stream, flag)[0] == codes.cudaSuccess
        device.zero(target, 64, stream)

        def call() -> Any:
            return ASIDE[name](cuda, own)

        answered: Any = in_thread(call)() if aside else call()
        ended, graph = cuda.cudaStreamEndCapture(stream)
        cuda.cudaGetLastError()
        if ended == codes.cudaSuccess:
            cuda.cudaGraphDestroy(graph)
        for one in (target, *([own["address"]] if name != "cudaFree" else [])):
            cuda.cudaFree(one)
        for one in (stream, own["stream"]):
            cuda.cudaStreamDestroy(one)
        return f"{answered.name.removeprefix('cuda')}/{ended.name.removeprefix('cuda')}"

    for mode in MODES:
        for aside in (False, True):
            answers = {name: attempt(mode, name, aside=aside) for name in ASIDE}
            bad = {name: answer for name, answer in answers.items() if answer != "Success/Success"}
            tell("during capture", mode=mode, thread="another" if aside else "same", refused=bad)
            assert mode != "Relaxed" or not {"cudaMalloc", "cudaFree", "cudaFreeHost"} & bad.keys()


# Costs: printed, never asserted.


def median_us(work: Callable[[], object], count: int = 200) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return round(float(np.median(times)) * 1e6, 2)


def test_copies_cost(queue: WorkQueue, allocations: Allocations) -> None:
    device, size = queue.device, 256 * MIB
    host, first, second = allocations.pinned(size), allocations.allocate(size), allocations.allocate(size)
    start, end = allocations.event(timed=True), allocations.event(timed=True)
    ways: dict[str, Callable[[], None]] = {
        "up": lambda: device.copy_in(first, host, queue.stream),
        "down": lambda: device.copy_out(host, first, queue.stream),
        "on device": lambda: device.copy(second, first, size, queue.stream),
        "zero": lambda: device.zero(second, size, queue.stream),
    }
    for way, copy in ways.items():
        copy()
        queue.record(start)
        for _ in range(8):
            copy()
        queue.record(end)
        queue.drain()
        tell("copy", way=way, gb_per_s=round(8 * size / device.elapsed_s(start.handle, end.handle) / 1e9, 1))


def test_waits_cost(
    cuda: Any, device: CudaDevice, kernels: Kernels, queue: WorkQueue, allocations: Allocations
) -> None:
    """How long after the work's end the host goes on: the time from launch to return less the kernel's own."""
    ways = {
        "blocking": (cuda.cudaEventBlockingSync, cuda.cudaEventSynchronize),
        "spinning": (0, cuda.cudaEventSynchronize),
        "device.wait": (0, device.wait),
    }
    first, second = allocations.event(timed=True), allocations.event(timed=True)
    for kind, (flag, wait) in ways.items():
        event = int(cuda.cudaEventCreateWithFlags(flag | cuda.cudaEventDisableTiming)[1])

        def record_and_wait(event: int = event, wait: Callable[[int], object] = wait) -> None:
            device.record(event, queue.stream)
            wait(event)

        tell("event wait", kind=kind, queue="empty", us=median_us(record_and_wait))
        for pause_us in (20, 1000, 20_000):
            late, cpu = [], []
            for _ in range(30):
                pause = Hold(device, kernels, queue.stream, limit_ns=0)
                queue.drain()
                start, busy = time.perf_counter(), time.thread_time()
                queue.record(first)
                kernels.launch(b"hold", queue.stream, pause._block.ctypes.data, pause_us * 1000)
                queue.record(second)
                record_and_wait()
                late.append(time.perf_counter() - start - device.elapsed_s(first.handle, second.handle))
                cpu.append(time.thread_time() - busy)
                pause.free()
            tell(
                "event wait",
                kind=kind,
                kernel_us=pause_us,
                late_us=round(float(np.median(late)) * 1e6, 1),
                worst_us=round(max(late) * 1e6, 1),
                cpu_us=round(float(np.median(cpu)) * 1e6, 1),
            )
        device.destroy_event(event)
    done = allocations.event()
    queue.record(done)
    queue.drain()
    tell("event query", us=median_us(lambda: cuda.cudaEventQuery(done.handle)))
    tell("event wait", kind="known to be reached", us=median_us(lambda: queue.wait_until(done)))


def test_graphs_cost(device: CudaDevice, queue: WorkQueue, allocations: Allocations) -> None:
    """Launching, and each copy of a graph, against the same copies one by one."""
    source, target = allocations.allocate(MIB), allocations.allocate(MIB)
    start, end = allocations.event(timed=True), allocations.event(timed=True)
    for nodes in (1, 100, 1000):

        def copies(nodes: int = nodes) -> None:
            for _ in range(nodes):
                device.copy(target, source, 4096, queue.stream)

        device.begin_capture(queue.stream)
        copies()
        begin = time.perf_counter()
        graph = device.end_capture(queue.stream)
        made_us = round((time.perf_counter() - begin) * 1e6, 1)
        device.launch(graph, queue.stream)
        queue.drain()
        for way, work in (("graph", lambda graph=graph: device.launch(graph, queue.stream)), ("one by one", copies)):
            begin = time.perf_counter()
            queue.record(start)
            for _ in range(20):
                work()
            queue.record(end)
            host = (time.perf_counter() - begin) / 20
            queue.drain()
            spent = device.elapsed_s(start.handle, end.handle) / 20
            tell(
                "graph",
                way=way,
                copies=nodes,
                host_us=round(host * 1e6, 1),
                device_us=round(spent * 1e6, 1),
                made_us=made_us,
            )
        device.free_graph(graph)


def test_calls_cost(cuda: Any, device: CudaDevice, queue: WorkQueue, allocations: Allocations) -> None:
    mark, host, address = allocations.event(), allocations.pinned(4096), allocations.allocate(4096)

    def take_turn() -> None:
        with queue.lock:
            pass

    def send() -> None:
        device.copy_in(address, host, queue.stream)

    for what, work, count in (
        ("cudaGetDevice", lambda: cuda.cudaGetDevice(), 1000),
        ("cudaSetDevice", lambda: cuda.cudaSetDevice(0), 1000),
        ("turn taken and given back", take_turn, 1000),
        ("record", lambda: queue.record(mark), 1000),
        ("copy in of 4 KiB, queued", send, 500),
        ("find_gpu", lambda: find_gpu(), 20),
        ("CudaDevice", lambda: CudaDevice(), 20),
        ("allocate and free 1 MiB", lambda: device.free(device.allocate(MIB)), 50),
        ("allocate and free 1 GiB", lambda: device.free(device.allocate(1 << 30)), 10),
        ("pin and free 64 MiB", lambda: device.free_pinned(device.allocate_pinned(64 * MIB)), 5),
    ):
        tell("call", call=what, us=median_us(work, count))
    queue.drain()


# Ends: each in a process of its own.

PRELUDE = """
import atexit, json, os, sys, time, weakref
import numpy as np
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.gpus import find_gpu
from latentrt.engines.cuda.stream import Allocations, WorkQueue
from latentrt.engines.errors import DeviceLostError, EngineError
def told(work):
    try:
        return repr(work())[:80]
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
"""


def run_process(script: str, **environment: str) -> dict[str, Any]:
    """Run a script in a process of its own, which ends well and says nothing on stderr; return its JSON line."""
    given = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + script],  # Python warns that CUDA's threads do not fork
        capture_output=True,
        text=True,
        timeout=300,
        env=given,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


RAW = """
from cuda.bindings import runtime
RAW = {
    "cudaGetDeviceCount": lambda: runtime.cudaGetDeviceCount(),
    "cudaSetDevice": lambda: runtime.cudaSetDevice(0),
    "cudaMalloc": lambda: runtime.cudaMalloc(8),
}
"""

FORK = """
device = CudaDevice()
queue = WorkQueue(device)
allocations = Allocations(queue)
address = allocations.allocate(1 << 20)
queue.drain()
read, write = os.pipe()
child = os.fork()
if child == 0:
    answers = {
        "allocate": told(lambda: device.allocate(8)),
        "turn": told(lambda: queue.lock.__enter__()),
        "find_gpu": told(find_gpu),
        "device": told(CudaDevice),
        **{f"raw {name}": call()[0].name for name, call in RAW.items()},
        "close": told(allocations.close),
        "settle": told(queue.wait_idle),
    }
    os.write(write, json.dumps(answers).encode())
    os._exit(0)
os.waitpid(child, 0)
answers = json.loads(os.read(read, 1 << 16))
answers["parent"] = told(lambda: device.free_bytes() > 0)
allocations.close()
queue.close()
print(json.dumps(answers))
"""


def test_a_forked_process_is_told_so_and_its_parent_goes_on() -> None:
    answers = run_process(RAW + FORK)
    tell("fork", **answers)
    for name in ("allocate", "turn", "find_gpu", "device"):
        assert answers[name].startswith("DeviceLostError"), name
    assert (answers["close"], answers["settle"], answers["parent"]) == ("None", "None", "True")


FORK_AFTER_ASKING = """
find_gpu()
read, write = os.pipe()
child = os.fork()
if child == 0:
    answers = {"find_gpu": told(find_gpu), "device": told(CudaDevice)}
    answers |= {f"raw {name}": call()[0].name for name, call in RAW.items()}
    os.write(write, json.dumps(answers).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(read, 1 << 16).decode())
"""


def test_asking_for_a_gpu_before_a_fork_is_enough_to_be_refused_after_it() -> None:
    answers = run_process(RAW + FORK_AFTER_ASKING)
    tell("fork after find_gpu alone", **answers)
    assert all(answers[name].startswith("DeviceLostError") for name in ("find_gpu", "device"))


AT_EXIT = """
class Owner:
    pass
device = CudaDevice()
queue = WorkQueue(device)
allocations = Allocations(queue)
allocations.allocate(1 << 20), allocations.pinned(1 << 20), allocations.event()
owner = Owner()
def close():
    before = device.free_bytes()
    queue.wait_idle()
    allocations.close()
    allocations.close()
    queue.close()
    print(json.dumps({"freed": device.free_bytes() - before}))
weakref.finalize(owner, close)
"""


def test_what_is_open_when_the_program_ends_can_still_be_freed() -> None:
    assert run_process(AT_EXIT)["freed"] > 0


LEFT_OPEN = """
device = CudaDevice()
queue = WorkQueue(device)
allocations = Allocations(queue)
addresses = [allocations.allocate(1 << 20) for _ in range(8)]
device.begin_capture(queue.stream)
device.copy(addresses[0], addresses[1], 64, queue.stream)
graph = device.end_capture(queue.stream)
device.launch(graph, queue.stream)
print(json.dumps({}))
"""


def test_a_program_that_frees_nothing_ends_without_a_word() -> None:
    run_process(LEFT_OPEN)


CRASH = (
    f"PTX = {PTX!r}\n"
    """
import ctypes
from cuda.bindings import driver, runtime
device = CudaDevice()
queue = WorkQueue(device)
allocations = Allocations(queue)
address, host, done = allocations.allocate(1 << 20), allocations.pinned(64), allocations.event()
device.begin_capture(queue.stream)
device.copy(address, address + 4096, 64, queue.stream)
graph = device.end_capture(queue.stream)
queue.drain()
code, module = driver.cuModuleLoadData(PTX)
code, function = driver.cuModuleGetFunction(module, b"crash")
driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, queue.stream, ((16,), (ctypes.c_uint64,)), 0)
queue.record(done)
answers = {"first": told(lambda: queue.wait_until(done))}
answers["again"] = told(lambda: queue.wait_until(done))
answers["allocate"] = told(lambda: device.allocate(8))
answers["record"] = told(lambda: queue.record(done))
answers["drain"] = told(queue.drain)
with queue.lock:
    answers["settle"] = told(queue.wait_idle)
    answers["graph"] = told(lambda: device.free_graph(graph))
    answers["close"] = told(allocations.close)
    answers["stream"] = told(queue.close)
for name, call in {
    "cudaGetDevice": lambda: runtime.cudaGetDevice(), "cudaSetDevice": lambda: runtime.cudaSetDevice(0),
    "cudaGetDeviceCount": lambda: runtime.cudaGetDeviceCount(), "cudaMalloc": lambda: runtime.cudaMalloc(8),
    "cudaMemGetInfo": lambda: runtime.cudaMemGetInfo(), "cudaFree": lambda: runtime.cudaFree(address),
    "cudaEventDestroy": lambda: runtime.cudaEventDestroy(runtime.cudaEvent_t(done.handle)),
}.items():
    answers["raw " + name] = call()[0].name
answers["find_gpu"] = told(find_gpu)
def another():
    second = CudaDevice()
    return second.allocate(8)
answers["another device"] = told(another)
print(json.dumps(answers))
"""
)


def test_an_error_that_stays_is_told_first_and_last_and_everything_closes() -> None:
    answers = run_process(CRASH)
    tell("sticky error", **answers)
    assert re.match(r"DeviceLostError: cudaEventQuery: cuda\w+ ", answers["first"])
    assert RESTART in answers["first"]
    for name in ("again", "allocate", "record", "drain"):
        assert answers[name] == answers["first"], name
    for name in ("settle", "graph", "close", "stream"):
        assert answers[name] == "None", name
    assert answers["another device"].startswith("DeviceLostError")
