"""TensorRT's logger: what it said becomes the error where the library answers with nothing."""

from __future__ import annotations

import functools
from collections import deque
from types import ModuleType
from typing import Any

from latentrt.engines.errors import EngineError, backend_error

KEPT_LINES = 3  # of the last errors
LONGEST_LINE = 400


@functools.cache
def logger_of(library: ModuleType) -> Any:
    """Return the one logger of a library, which keeps its last errors in `lines`, counts them, and prints nothing.

    There is one because the library keeps the first that it is given for the whole process, whoever gives it another.
    """

    class Logger(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=KEPT_LINES)
            self.count = 0

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.INTERNAL_ERROR, library.ILogger.Severity.ERROR):
                self.lines.append(" ".join(message.split())[:LONGEST_LINE])
                self.count += 1

    return Logger()


class LogScope:
    """What a library's logger reports from now on."""

    def __init__(self, library: ModuleType) -> None:
        self.logger = logger_of(library)
        self._start = self.logger.count

    @property
    def lines(self) -> list[str]:
        """Return the last errors, at most `KEPT_LINES`; none if it had none."""
        lines = list(self.logger.lines)
        return lines[len(lines) - min(self.logger.count - self._start, len(lines)) :]

    def given(self, result: Any, failure: str) -> Any:
        """Return what the library returned, unless that is its None for a failure: an EngineError with its words."""
        if result is None:
            raise self.error(failure)
        return result

    def error(self, failure: str) -> EngineError:
        """Return the error of a failure, with what the library said of it."""
        words = "; ".join(self.lines) or "the library gave no reason"
        return backend_error(f"{failure}: {words}", words)
