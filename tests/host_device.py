"""A device whose memory is host memory and whose queue is lazy: work runs in order, and only when someone waits.

So whatever would be a race on a GPU is a wrong number here, every time: a pinned slot that is filled again before
its copy ran, an output that is read before it was waited for, memory that is freed under queued work. What CUDA
would refuse, or corrupt without a word, is an AssertionError.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from latentrt.engines.errors import DeviceLostError, OutOfMemoryError
from latentrt.engines.spec import Array

Work = Callable[[], None]
CURRENT = threading.local()  # .index: the thread's current device, 0 where nothing was set, as in CUDA
ALIGNMENT = 256
FRESH = 0xFF  # what fresh memory holds: not-a-number in floats, -1 in integers


def current_index() -> int:
    """Return which device is this thread's current one."""
    return int(getattr(CURRENT, "index", 0))


class Memory:
    """Allocations of one kind, found by address."""

    def __init__(self) -> None:
        self.blocks: dict[int, Array] = {}

    def allocate(self, size: int) -> int:
        raw = np.full(size + ALIGNMENT, FRESH, dtype=np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        block = raw[start : start + size]
        address = int(block.ctypes.data) if size else int(raw[start:].ctypes.data)
        self.blocks[address] = block
        return address

    @property
    def used(self) -> int:
        """Return the bytes of all that is allocated."""
        return sum(block.nbytes for block in self.blocks.values())

    def resolve(self, address: int, size: int) -> Array:
        """Return the bytes at an address, which lie in one allocation that is not freed."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.nbytes:
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} are not allocated")

    def free(self, address: int) -> None:
        assert address in self.blocks, "freed twice, or never allocated"
        self.blocks.pop(address)[:] = FRESH


class HostDevice:
    """A stand-in for `Device`. calls: what was asked of it, in order; ran: what the queue ran, in order.

    broken: what the next wait is to find that a kernel has met; then the device is lost
    forked: whether the process is to be taken for a fork
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.broken, self.forked = "", False
        self._lost: DeviceLostError | None = None
        self.memory, self.pinned_memory = Memory(), Memory()
        self.calls: list[str] = []
        self.ran: list[str] = []
        self.out_of_memory_above: int | None = None  # bytes of one allocation
        self.capacity: int | None = None  # bytes of all
        self.capture_pause_s = 0.0  # how long the other threads have after a capture began
        self._queue: deque[tuple[str, Work]] = deque()
        self._done = 0  # pieces of work that ran and left the queue
        self._recording: list[tuple[str, Work]] | None = None
        self._recorder = 0  # the thread whose work is recorded
        self._graphs: dict[int, list[tuple[str, Work]]] = {}
        self._launched: dict[int, int] = {}  # where in the queue the last launch of a graph ends
        self._events: dict[int, tuple[int, bool]] = {}
        self._handles = iter(range(1, 1 << 30))
        self._streams: set[int] = set()
        self._lock = threading.RLock()  # the GPU itself is not a Python object: threads may call CUDA together

    # What tests ask.

    def pending(self) -> int:
        """Return how many pieces of work wait in the queue."""
        return len(self._queue)

    @property
    def _end(self) -> int:
        return self._done + len(self._queue)

    def counted(self) -> Counter[str]:
        """Return how often each method was called."""
        return Counter(call.split()[0] for call in self.calls)

    def forget(self) -> None:
        """Start the records again."""
        self.calls.clear()
        self.ran.clear()

    def leftovers(self) -> dict[str, int]:
        """Return what was made and not freed."""
        kinds: dict[str, Any] = {
            "memory": self.memory.blocks,
            "pinned": self.pinned_memory.blocks,
            "graphs": self._graphs,
            "events": self._events,
            "streams": self._streams,
        }
        return {name: len(made) for name, made in kinds.items() if made}

    # How work gets in and out of the queue.

    def put(self, stream: int, label: str, work: Work) -> None:
        """Queue or record one piece of work. Also what the stand-in library calls."""
        with self._lock:
            assert current_index() == self.index, "another GPU is this thread's current one"
            assert stream in self._streams, "there is no such stream; stream 0 is not to be used"
            assert self._recording is None or self._recorder == threading.get_ident(), "recorded for another thread"
            if self._recording is None:
                self._queue.append((label, work))
            else:
                self._recording.append((label, work))

    def resolve(self, address: int, size: int) -> Array:
        return self.memory.resolve(address, size)

    @property
    def recording(self) -> bool:
        return self._recording is not None

    def _transfer(
        self, label: str, target: tuple[Memory, int], source: tuple[Memory, int], size: int, stream: int
    ) -> None:
        """Queue a copy. What it touches must be allocated now, and again when it runs."""

        def work() -> None:
            np.copyto(target[0].resolve(target[1], size), source[0].resolve(source[1], size))

        target[0].resolve(target[1], size)
        source[0].resolve(source[1], size)
        self.put(stream, label, work)

    def _run_to(self, place: int) -> None:
        while self._done < place:
            label, work = self._queue.popleft()
            self._done += 1
            self.ran.append(label)
            work()

    def _called(self, call: str) -> None:
        self.calls.append(call)

    def _idle(self) -> None:
        assert self._recording is None, "not allowed while the stream is recorded"
        assert not self.pending(), "freed under queued work"

    def _use(self) -> None:
        """Refuse what CUDA refuses, and catch what it would do on another GPU."""
        self._check()
        assert current_index() == self.index, "another GPU is this thread's current one"

    def _gone(self) -> bool:
        """Tell whether there is nothing left to free."""
        return self.forked or self._lost is not None

    def _check(self) -> None:
        if self.forked or self._lost:
            raise DeviceLostError("forked" if self.forked else str(self._lost))

    def _meet(self) -> None:
        """Find what a kernel has met. One may wait for another GPU than the thread's current one."""
        self._check()
        if self.broken:
            self._lost = DeviceLostError(self.broken)
            raise self._lost

    # The protocol.

    def enter(self) -> int:
        if self.forked:
            raise DeviceLostError("forked")
        before = current_index()
        CURRENT.index = self.index
        return before

    def leave(self, before: int) -> None:
        CURRENT.index = before

    def allocate(self, size: int) -> int:
        self._use()
        with self._lock:
            self._called(f"allocate {size}")
            assert self._recording is None, "not allowed while the stream is recorded"
            full = self.capacity is not None and self.memory.used + size > self.capacity
            if full or (self.out_of_memory_above is not None and size > self.out_of_memory_above):
                raise OutOfMemoryError("the GPU has 0 MiB free (cudaErrorMemoryAllocation)")
            return self.memory.allocate(size)

    def free(self, address: int) -> None:
        if self._gone():
            return
        with self._lock:
            self._called("free")
            self._idle()
            self.memory.free(address)

    def allocate_pinned(self, size: int) -> Array:
        self._use()
        with self._lock:
            self._called(f"allocate_pinned {size}")
            assert self._recording is None, "not allowed while the stream is recorded"
            return self.pinned_memory.blocks[self.pinned_memory.allocate(size)]

    def free_pinned(self, block: Array) -> None:
        if self._gone():
            return
        with self._lock:
            self._called("free_pinned")
            self._idle()
            self.pinned_memory.free(int(block.ctypes.data))

    def copy_in(self, address: int, block: Array, stream: int) -> None:
        self._use()
        with self._lock:
            self._called(f"copy_in {block.nbytes}")
            here, size = int(block.ctypes.data), block.nbytes
            self._transfer("copy_in", (self.memory, address), (self.pinned_memory, here), size, stream)

    def copy_out(self, block: Array, address: int, stream: int) -> None:
        self._use()
        with self._lock:
            self._called(f"copy_out {block.nbytes}")
            here, size = int(block.ctypes.data), block.nbytes
            self._transfer("copy_out", (self.pinned_memory, here), (self.memory, address), size, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._use()
        with self._lock:
            self._called(f"copy {size}")
            self._transfer("copy", (self.memory, target), (self.memory, source), size, stream)

    def zero(self, address: int, size: int, stream: int) -> None:
        self._use()
        with self._lock:
            self._called(f"zero {size}")
            self.resolve(address, size)
            self.put(stream, "zero", lambda: self.resolve(address, size).fill(0))

    def create_stream(self) -> int:
        self._use()
        self._called("create_stream")
        self._streams.add(stream := next(self._handles))
        return stream

    def synchronize(self, stream: int) -> None:
        self._meet()
        with self._lock:
            self._called("synchronize")
            assert self._recording is None, "not allowed while the stream is recorded"
            assert stream in self._streams
            self._run_to(self._end)

    def destroy_stream(self, stream: int) -> None:
        if self._gone():
            return
        self._called("destroy_stream")
        self._idle()
        self._streams.remove(stream)

    def begin_capture(self, stream: int) -> None:
        self._use()
        with self._lock:
            self._called("begin_capture")
            assert self._recording is None
            self._recording, self._recorder = [], threading.get_ident()
        time.sleep(self.capture_pause_s)

    def end_capture(self, stream: int) -> int:
        self._use()
        with self._lock:
            self._called("end_capture")
            assert self._recording is not None
            graph = next(self._handles)
            self._graphs[graph], self._recording = self._recording, None
            return graph

    def launch(self, graph: int, stream: int) -> None:
        self._use()
        with self._lock:
            self._called("launch")
            for label, work in self._graphs[graph]:
                self.put(stream, label, work)
            self._launched[graph] = self._end

    def free_graph(self, graph: int) -> None:
        if self._gone():
            return
        with self._lock:
            self._called("free_graph")
            assert self._launched.get(graph, 0) <= self._done, "freed under a launch"
            del self._graphs[graph]

    def create_event(self, *, timed: bool = False) -> int:
        self._use()
        self._events[event := next(self._handles)] = (0, timed)
        return event

    def record(self, event: int, stream: int) -> None:
        self._use()
        with self._lock:
            assert self._recording is None, "an event is not a part of a graph"
            self._called("record")
            self._events[event] = (self._end, self._events[event][1])

    def wait(self, event: int) -> None:
        self._meet()
        with self._lock:
            self._called("wait")
            self._run_to(self._events[event][0])

    def elapsed_s(self, first: int, second: int) -> float:
        """Every piece of work takes a thousandth of a second here."""
        self._use()
        (start, start_timed), (end, end_timed) = self._events[first], self._events[second]
        assert start_timed and end_timed, "these events keep no time"
        assert max(start, end) <= self._done, "these events have not happened"
        return (end - start) / 1e3

    def destroy_event(self, event: int) -> None:
        if self._gone():
            return
        del self._events[event]

    def free_bytes(self) -> int:
        self._use()
        return 1 << 30
