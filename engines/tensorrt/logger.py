"""TensorRT's loggers: what it said becomes the error where it answers with nothing."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from latentrt.engines.errors import backend_error


@functools.cache
def logger_of(library: ModuleType) -> Any:
    """Return the one logger of a library: it keeps the first it is given for the whole process."""
    return make_logger(library)


class Told:
    """What a logger is told from now on."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._start = len(logger.lines)

    @property
    def lines(self) -> list[str]:
        return list(self._logger.lines[self._start :])


KEPT_LINES = 3  # of what the logger was told last
LONGEST_LINE = 400


def make_logger(library: ModuleType) -> Any:
    """Return a logger of the library that keeps its errors in `lines` and prints nothing."""

    class Logger(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.INTERNAL_ERROR, library.ILogger.Severity.ERROR):
                self.lines.append(" ".join(message.split())[:LONGEST_LINE])

    return Logger()


def _given(result: Any, failure: str, logger: Any) -> Any:
    """Return what the library returned, unless that is its None for a failure."""
    if result is None:
        words = "; ".join(logger.lines[-KEPT_LINES:]) or "the library gave no reason"
        raise backend_error(f"{failure}: {words}", words)
    return result
