"""Build a bundle's engines for this machine, and open them again. An engine runs only where its key matches."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentrt.engines.backends import BACKENDS, Choice, choose
from latentrt.engines.bundle import (
    Bundle,
    Check,
    check_file,
    disk_errors,
    publish,
    read_engine_record,
    record_tree,
    staging,
    write_manifest,
)
from latentrt.engines.canvas import Canvas, CanvasShape
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.manifest import ENGINE_RECORD, SCHEMA_VERSION, EngineRecord, LatentSpec
from latentrt.engines.options import BuildOptions
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import BackendName, Engine, EngineKey

DEFAULTS = BuildOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenEngines:
    """The engines of a bundle, ready to run, by component."""

    engines: dict[str, Engine]
    choice: Choice
    key: EngineKey
    load_s: float
    load: Callable[[str], Engine]  # opens one more component

    def canvas(self, space: LatentSpec, shape: CanvasShape, *, state_rows: int) -> Canvas:
        """Return what a batch of this shape is drawn on. Raises EngineError where no engine serves the shape."""
        return BACKENDS[self.choice.backend].canvas(self.engines, space, shape, state_rows)

    def close(self) -> None:
        """Close every engine."""
        for engine in self.engines.values():
            engine.close()


def build_engines(
    bundle: Bundle,
    backend: BackendName,
    *,
    options: BuildOptions = DEFAULTS,
    force: bool = False,
    report: Report = silent,
) -> EngineRecord:
    """Build every component's engine for this machine and put them below the bundle's `engines/`.

    Engines that are there already under the same key are kept, unless `force`. Two processes that build the same
    key do not harm each other: each works in a directory of its own, and the last rename wins.
    Raises EngineError (backend), BundleError (files) and RequestError (options).
    """
    reason = BACKENDS[backend].cannot_build(options)
    if reason is not None:
        raise EngineError(f"the backend '{backend}' cannot build here: {reason}")
    key = BACKENDS[backend].key(bundle, options)
    target = bundle.root / "engines" / key.directory
    if not force and (target / ENGINE_RECORD).is_file():
        return read_engine_record(target)
    staged = staging(target, f"{os.getpid():x}-{time.monotonic_ns():x}"[-12:])
    try:
        with disk_errors(target):
            record = _build_into(bundle, backend, key, options, staged, report)
        publish(staged, target, overwrite=force)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return record


def _build_into(
    bundle: Bundle, backend: BackendName, key: EngineKey, options: BuildOptions, staged: Path, report: Report
) -> EngineRecord:
    start = time.perf_counter()
    built = BACKENDS[backend].build(bundle, staged, options, report)
    record = EngineRecord(
        schema_version=SCHEMA_VERSION,
        key=key,
        specs={component: spec for component, (_, spec) in built.items()},
        entries={component: entry for component, (entry, _) in built.items()},
        files=record_tree(staged),
        build_s=round(time.perf_counter() - start, 3),
    )
    write_manifest(staged, record)
    return record


def find_engines(bundle: Bundle, backend: BackendName) -> tuple[Path, EngineRecord]:
    """Find the engines that were built for this machine. Raises EngineError, which names the mend.

    Shapes and options do not matter here: of several the first by name is taken.
    """
    reason = BACKENDS[backend].unavailable()
    if reason is not None:
        raise EngineError(f"the backend '{backend}' cannot run here: {reason}")
    key = BACKENDS[backend].key(bundle, DEFAULTS)
    directory = bundle.root / "engines" / key.directory
    if (directory / ENGINE_RECORD).is_file():
        record = read_engine_record(directory)
        if record.key == key:
            return directory, record
        raise BundleError(
            f"{directory / ENGINE_RECORD} was built for something else than its name says "
            f"({'; '.join(key.differences(record.key))}); "
            f"run `latentrt build {bundle.root} --backend {backend} --force`"
        )
    for path, record in bundle.engine_directories().items():
        if record.key.target == key.target and path.name == record.key.directory:
            return path, record
    raise EngineError(_no_engine(bundle, backend, key))


def _no_engine(bundle: Bundle, backend: BackendName, key: EngineKey) -> str:
    mend = f"run `latentrt build {bundle.root} --backend {backend}` on this machine"
    others = [record.key for record in bundle.engine_directories().values() if record.key.backend == backend]
    if not others:
        return f"'{bundle.root}' holds no engines for the backend '{backend}'; {mend}"
    differences = min((key.target.differences(other.target) for other in others), key=len)
    return f"the engines in '{bundle.root}' are for another target ({'; '.join(differences)}); {mend}"


def open_engines(
    bundle: Bundle,
    backend: str = "auto",
    *,
    components: tuple[str, ...] | None = None,
    threads: int | None = None,
    check: Check = "hash",
) -> OpenEngines:
    """Open the engines of a bundle for this machine, all of them or the named components.

    backend: `auto` or a backend's name; see `choose`
    threads: how many CPU threads a run may use, None for the backend's own choice
    check: what is compared before a file is opened: its SHA-256, or only its size
    Raises EngineError and BundleError.
    """
    start = time.perf_counter()
    choice = choose(backend)
    directory, record = find_engines(bundle, choice.backend)
    for name, file in record.files.items():
        check_file(directory, name, file, check=check)

    def load(name: str) -> Engine:
        return BACKENDS[choice.backend].load(directory / record.entries[name], record.specs[name], threads)

    engines = {name: load(name) for name in (components or tuple(record.entries))}
    return OpenEngines(engines=engines, choice=choice, key=record.key, load_s=time.perf_counter() - start, load=load)
