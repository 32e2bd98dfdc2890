"""A store of engines that machines of one kind share: any place that fsspec reaches, engines by their key.

`URL/KEY/engine.json` is the record of one build, and `URL/sha256/HASH` is the content of each file that it names.
Content is written first and the record last, so a build that is cut off or runs twice leaves nothing that is half
there; what is fetched has the recorded SHA-256 or is refused.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from latentrt.engines.bundle.files import check_file, disk_errors, engine_record_from_json, inside, write_manifest
from latentrt.engines.bundle.manifest import ENGINE_RECORD, EngineRecord, FileRecord
from latentrt.engines.bundle.staging import staged_file
from latentrt.engines.errors import BundleError, EngineError, LatentrtError, NotInstalledError
from latentrt.engines.progress import Report
from latentrt.engines.spec import EngineKey

_log = logging.getLogger(__name__)


class Store:
    """Engines at a URL: a directory, `file://…`, `s3://…`, or whatever else fsspec has a driver for.

    Raises EngineError if fsspec or the URL's driver is missing, or the place does not answer.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise NotInstalledError("--store needs fsspec", install="pip install 'latentrt[store]'") from None
        self.url = url.rstrip("/")
        with self._errors():
            self._files, root = fsspec.url_to_fs(self.url)
            self._root = str(root).rstrip("/")

    def holds(self, key: EngineKey) -> bool:
        """Tell whether engines of this key are here, whole.

        Their record is read: a driver's `exists` may say no where nothing answers, and everything would be built.
        """
        with self._errors():
            try:
                self._files.cat_file(self._record(key))
            except FileNotFoundError:
                return False
            return True

    def fetch(self, key: EngineKey, directory: Path, report: Report) -> EngineRecord:
        """Write the engines of a key and their record into an empty directory.

        Raises BundleError if they are not what was published, and EngineError if the store cannot be read.
        """
        where = f"{self.url}/{key.directory}/{ENGINE_RECORD}"
        with self._errors():
            content = self._files.cat_file(self._record(key))
        record = engine_record_from_json(content, where=where)
        if record.key != key:
            words = "; ".join(key.differences(record.key))
            raise BundleError(f"{where} was built for something other than its name says ({words}); {self._fix}")
        for number, (name, file) in enumerate(record.files.items()):
            report(f"fetch from {self.url}", number, len(record.files))
            self._fetch_file(name, file, directory)
        write_manifest(directory, record)
        report(f"fetch from {self.url}", len(record.files), len(record.files))
        return record

    def _fetch_file(self, name: str, file: FileRecord, directory: Path) -> None:
        path = inside(directory, name)
        with self._errors(), disk_errors(path):  # this machine's full disk is not the store's fault
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(self._content(file), str(path))
        try:
            check_file(directory, name, file, check="hash")
        except BundleError:
            raise BundleError(
                f"{self.url} holds different content for {name} than its record says; {self._fix}"
            ) from None

    @property
    def _fix(self) -> str:
        return "remove it from the store, or build without --store"

    def publish(self, directory: Path, record: EngineRecord, report: Report, *, overwrite: bool = False) -> None:
        """Put engines here, their record last. Those that are here under the same key stay, unless `overwrite`."""
        if not overwrite and self.holds(record.key):
            return
        for number, (name, file) in enumerate(record.files.items()):
            report(f"publish to {self.url}", number, len(record.files))
            path = check_file(directory, name, file, check="hash")
            with self._errors():
                if not self._has(file):
                    self._put(self._content(file), path)
        with self._errors():
            self._put(self._record(record.key), directory / ENGINE_RECORD)
        report(f"publish to {self.url}", len(record.files), len(record.files))
        _log.info("published %s to %s", record.key.directory, self.url)

    def _record(self, key: EngineKey) -> str:
        return f"{self._root}/{key.directory}/{ENGINE_RECORD}"

    def _content(self, file: FileRecord) -> str:
        if not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise BundleError(f"{self.url}: '{file.sha256}' is not a SHA-256; {self._fix}")
        return f"{self._root}/sha256/{file.sha256}"

    def _has(self, file: FileRecord) -> bool:
        """Tell whether a file's content is here whole: an upload that was cut off is shorter."""
        path = self._content(file)
        return bool(self._files.exists(path)) and self._files.size(path) == file.bytes

    def _put(self, path: str, source: Path) -> None:
        """Put a file here in one step: object stores do so by themselves, directories by renaming."""
        from fsspec.implementations.local import LocalFileSystem

        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if not isinstance(self._files, LocalFileSystem):
            self._files.put_file(str(source), path)
            return
        with staged_file(Path(path)) as beside:
            self._files.put_file(str(source), str(beside))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what a store's driver raises into one sentence."""
        try:
            yield
        except LatentrtError:
            raise
        except Exception as error:  # each driver has classes of its own, straight from Exception
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EngineError(
                f"--store: {self.url} cannot be used ({type(error).__name__}: {first}); name another URL, or omit "
                "--store"
            ) from error
