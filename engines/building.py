"""Build a bundle's engines for this machine, or for the target that the options name."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from latentrt.engines.backends import BACKENDS
from latentrt.engines.bundle import (
    Bundle,
    disk_errors,
    publish,
    read_engine_record,
    record_tree,
    staging,
    write_manifest,
)
from latentrt.engines.errors import EngineError
from latentrt.engines.manifest import ENGINE_RECORD, SCHEMA_VERSION, EngineRecord
from latentrt.engines.options import BuildOptions
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import BackendName, EngineKey

DEFAULTS = BuildOptions()


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
