"""Work in a foreign library that Ctrl-C can stop: done in a thread, while this one listens for the signal."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

POLL_S = 0.02

T = TypeVar("T")
Cancelled = Callable[[], bool]

_log = logging.getLogger(__name__)


def run_interruptibly(work: Callable[[Cancelled], T]) -> T:
    """Return what `work` returns, or raise what it raises; KeyboardInterrupt only after it has ended.

    work: called in another thread, with a function that tells whether Ctrl-C was pressed and that it asks as often as
    it can. What the library calls back (a logger, a progress monitor) then runs in that thread too, where Python
    raises no KeyboardInterrupt into C++ frames that cannot pass it on.
    """
    job = _Job(work)
    try:
        threading.Thread(target=job.run, name="latentrt-work").start()
        job.wait()
    except KeyboardInterrupt:
        job.stop()
        raise
    return job.result()


class _Job(Generic[T]):
    """One call of `work`.

    Whether it runs is told by plain flags, never by `Thread.join` or `Thread.is_alive`: in Python before 3.13 a join
    that a signal interrupts marks the thread as stopped though it runs on, every later join returns at once, and the
    compiler's callbacks then meet an interpreter that has ended, which aborts the process
    (https://github.com/python/cpython/issues/90882). Nor by an Event, whose lock an interrupt can leave taken.
    """

    def __init__(self, work: Callable[[Cancelled], T]) -> None:
        self._work = work
        self._begun = self._ended = self._cancelled = False
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        self._begun = True  # set before the question is asked: either `stop` sees it, or it sees `stop`
        try:
            if not self._cancelled:
                self._results.append(self._work(lambda: self._cancelled))
        except BaseException as error:  # it belongs to whoever waits
            self._error = error
        finally:
            self._ended = True

    def wait(self) -> None:
        while not self._ended:
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Cancel the work and wait until it has ended, however often Ctrl-C is pressed: it cannot be left behind."""
        self._cancelled = True
        while self._begun and not self._ended:
            try:
                _log.warning("interrupted: waiting for the work to stop at its next step")
                self.wait()
            except KeyboardInterrupt:
                continue

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._results[0]
