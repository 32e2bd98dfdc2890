"""Files that are compared with their records while something else is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from latentrt.engines.bundle.files import Check, check_file
from latentrt.engines.bundle.manifest import FileRecord

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor


WEIGHTS = ".data"  # how files end that hold nothing but numbers: these may be mapped while they are compared


class Comparison:
    """The files of a folder: their sizes are compared at once, their hashes on threads, those of weights last.

    A context manager: at its end nothing is read any more. Raises BundleError, for hashes in `wait`.
    """

    def __init__(self, folder: Path, files: Mapping[str, FileRecord], *, check: Check) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._hashing: dict[str, Future[Path]] = {}
        for name, file in files.items():
            check_file(folder, name, file, check="size")
        if check == "hash" and files:
            from concurrent.futures import ThreadPoolExecutor  # for what opens a bundle

            self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="latentrt-check")
            for name in sorted(files, key=lambda name: name.endswith(WEIGHTS)):
                self._hashing[name] = self._threads.submit(check_file, folder, name, files[name], check="hash")

    def wait(self, *, weights: bool) -> None:
        """Wait until hashes are compared, those of weights too or all but those. Raises BundleError."""
        for name, hashing in self._hashing.items():
            if weights or not name.endswith(WEIGHTS):
                hashing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
