"""One stream of a device as a queue: events in it, memory that is freed together, and copies that never overtake."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from types import TracebackType

import numpy as np

from latentrt.engines.cuda.device import Device
from latentrt.engines.errors import DeviceLostError
from latentrt.engines.spec import Array

ALIGNMENT = 256  # bytes: what CUDA aligns its own allocations to, and TensorRT expects of addresses


def align(size: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class QueueEvent:
    """A point in the queue. Before it is first recorded it stands for the queue's beginning."""

    __slots__ = ("handle", "position")

    def __init__(self, event: int) -> None:
        self.handle = event
        self.position = 0


class Turn:
    """A lock to hold while a device is used. Meanwhile the device is the thread's current one; threads nest it.

    Taking it raises DeviceLostError in a forked process, where the thread that held it may be missing.
    """

    def __init__(self, device: Device) -> None:
        self._device, self._lock = device, threading.RLock()
        self._before: list[int] = []

    def __enter__(self) -> None:
        before = self._device.enter()
        self._lock.acquire()
        self._before.append(before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = self._before.pop()
        self._lock.release()
        self._device.leave(before)


class WorkQueue:
    """The stream that everything of one session runs in, in the order in which it was put there.

    lock: held while work is put in the queue, so that what one thread records holds no other thread's work
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.lock = Turn(device)
        with self.lock:
            self.stream = device.create_stream()
        self._positions = 0
        self._reached = 0

    def record(self, event: QueueEvent) -> None:
        """Move an event to the end of what is in the queue now."""
        self.device.record(event.handle, self.stream)
        self._positions += 1
        event.position = self._positions

    def wait_until(self, event: QueueEvent) -> None:
        """Wait until the queue reached the event. Asks nothing of the device where that is known already."""
        position = event.position
        if position > self._reached:
            self.device.wait(event.handle)
            self._reached = max(position, self._reached)

    def drain(self) -> None:
        """Wait until the queue is empty. Raises EngineError where something in it failed."""
        self.device.synchronize(self.stream)
        self._reached = self._positions

    def wait_idle(self) -> None:
        """Wait until nothing in the queue runs any more, before what it uses is freed: also where the GPU is lost."""
        with contextlib.suppress(DeviceLostError):
            self.drain()

    def close(self) -> None:
        """Destroy the stream. The queue must be empty."""
        self.device.destroy_stream(self.stream)


class Allocations:
    """The device memory, pinned memory and events of one owner, freed together."""

    def __init__(self, queue: WorkQueue) -> None:
        self._queue = queue
        self._addresses: list[int] = []
        self._blocks: list[Array] = []
        self._events: list[int] = []

    def allocate(self, size: int) -> int:
        """Return the address of fresh device memory. It is zero once the queue came here."""
        device = self._queue.device
        address = device.allocate(size)
        self._addresses.append(address)
        device.zero(address, size, self._queue.stream)
        return address

    def pinned(self, size: int) -> Array:
        """Return fresh pinned memory: (size,), uint8."""
        block = self._queue.device.allocate_pinned(size)
        self._blocks.append(block)
        return block

    def event(self, *, timed: bool = False) -> QueueEvent:
        """Return a fresh event."""
        self._events.append(self._queue.device.create_event(timed=timed))
        return QueueEvent(self._events[-1])

    def close(self) -> None:
        """Free everything. The queue must be empty."""
        device = self._queue.device
        while self._addresses:
            device.free(self._addresses.pop())
        while self._blocks:
            device.free_pinned(self._blocks.pop())
        while self._events:
            device.destroy_event(self._events.pop())


class StagingRing:
    """Pinned memory that the host fills for the device, in as many slots as there are copies under way.

    A slot is filled again only after its last copy ran; with enough slots the host never waits for that.
    """

    def __init__(self, queue: WorkQueue, allocations: Allocations, size: int, *, slots: int = 1) -> None:
        self._queue = queue
        stride = align(size)
        block = allocations.pinned(stride * slots)
        self._slots = [(block[n * stride :][:size], allocations.event()) for n in range(slots)]
        self._next = 0

    def send(self, address: int, pieces: Iterable[tuple[int, Array]]) -> None:
        """Copy contiguous arrays to device memory, each to its offset in bytes from `address`, in one copy.

        The arrays may be changed as soon as this returns.
        """
        slot, event = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        self._queue.wait_until(event)
        end = 0
        for offset, array in pieces:
            slot[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
            end = max(end, offset + array.nbytes)
        self._queue.device.copy_in(address, slot[:end], self._queue.stream)
        self._queue.record(event)
