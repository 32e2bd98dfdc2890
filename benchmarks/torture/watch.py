"""Whether commands still get somewhere: what waits for ever is told from what a busy machine keeps waiting."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

STILL_S = 60.0
MOST_S = 900.0  # of the processor: what turns in circles ends too
READY = "RD"  # of the states of proc_pid_stat(5): it runs or could, or waits for a disk


class Watch:
    """Looks at all that this process has started."""

    def __init__(self) -> None:
        self._used_s, self._since = -1.0, time.monotonic()

    def stuck(self) -> bool:
        """Tell whether for a minute none of it has had the processor or could have used it, or whether it never ends.

        To be asked about once a second.
        """
        used_s, ready = activity(os.getpid())
        if ready or used_s != self._used_s:
            self._used_s, self._since = used_s, time.monotonic()
        return time.monotonic() - self._since > STILL_S or used_s > MOST_S


def activity(process: int) -> tuple[float, bool]:
    """Return the seconds of the processor that a process's descendants have had, and whether one of them is ready."""
    seconds, ready = 0.0, False
    for one in descendants(process):
        for file in Path(f"/proc/{one}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                state, *rest = fields(file)
                ready = ready or state in READY
                seconds += (int(rest[10]) + int(rest[11])) / os.sysconf("SC_CLK_TCK")
    return seconds, ready


def descendants(process: int) -> Iterator[int]:
    """Yield the ids of a process's children, and of theirs."""
    parents = dict[int, int]()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(fields(file)[1])
    for one, parent in parents.items():
        while parent in parents and parent != process:
            parent = parents[parent]
        if parent == process:
            yield one


def fields(file: Path) -> list[str]:
    """Return the fields of a `stat` from the third one, the state, on; the second one may hold spaces."""
    return file.read_text(errors="replace").rpartition(")")[2].split()


def end_of(process: subprocess.Popen[str]) -> tuple[str, str] | None:
    """Wait for the end of a process that leads a session. Return what it printed; None if it was stuck, and is ended.

    Raises nothing for how it ended: `process.returncode` says so.
    """
    watch = Watch()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=1.0)
            return out or "", err or ""
        if watch.stuck():
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None
