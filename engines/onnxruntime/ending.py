"""What ONNX Runtime computes on a daemon thread when the program ends: it is let finish, and nothing new begins.

Such a thread would come back to an interpreter that is gone, where Python up to 3.13 ends it in the middle of C++ code
that does not allow that: the process aborts after its last line. Other threads are waited for by Python itself.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Iterator

LONGEST_S = 300.0  # of one pass; what takes longer is left to abort


class _Daemons:
    """The daemon threads that are in ONNX Runtime's code now."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._inside = 0
        self._ending = False

    def begin(self) -> None:
        with self._change:
            if not self._ending:
                self._inside += 1
                return
        threading.Event().wait()  # it ends with the process

    def end(self) -> None:
        with self._change:
            self._inside -= 1
            self._change.notify_all()
        if self._ending:
            threading.Event().wait()

    def wait(self) -> None:
        with self._change:
            self._ending = True
            self._change.wait_for(lambda: not self._inside, LONGEST_S)

    def forget(self) -> None:
        """Begin anew in a fork, which has none of them."""
        self.__init__()  # type: ignore[misc]


_DAEMONS = _Daemons()
atexit.register(_DAEMONS.wait)
os.register_at_fork(after_in_child=_DAEMONS.forget)


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Do native work in the block, which the end of the program waits for."""
    if not threading.current_thread().daemon:
        yield
        return
    _DAEMONS.begin()
    try:
        yield
    finally:
        _DAEMONS.end()
