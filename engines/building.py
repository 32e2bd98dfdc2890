"""Build a bundle's engines for this machine, or for the target that the options name."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
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
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.manifest import ENGINE_RECORD, SCHEMA_VERSION, EngineRecord
from latentrt.engines.options import BuildOptions
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import BackendName, EngineKey
from latentrt.engines.store import Store

DEFAULTS = BuildOptions()


def build_engines(
    bundle: Bundle,
    backend: BackendName,
    *,
    options: BuildOptions = DEFAULTS,
    force: bool = False,
    store: str | None = None,
    fetch_only: bool = False,
    report: Report = silent,
) -> EngineRecord:
    """Put every component's engine for this machine below the bundle's `engines/`: built, or fetched from a store.

    Engines that are there already under the same key are kept, unless `force`. Two processes that build the same
    key do not harm each other: each works in a directory of its own, and the last rename wins.
    store: a URL where engines lie by their keys: fetched from there where it has them, else built and published there
    fetch_only: build nothing
    Raises EngineError (backend, store), BundleError (files) and RequestError (options).
    """
    if fetch_only and (store is None or force):
        raise RequestError("--fetch-only needs --store URL to fetch from, and builds nothing with --force")
    reason = BACKENDS[backend].cannot_build(options)
    if reason is not None and store is None:
        raise EngineError(f"the backend '{backend}' cannot build here: {reason}")
    key = BACKENDS[backend].key(bundle, options)
    target = bundle.root / "engines" / key.directory
    shelf = Store(store) if store is not None else None
    if not force and (target / ENGINE_RECORD).is_file():
        record = read_engine_record(target)
    elif not force and shelf is not None and shelf.holds(key):
        return _put(target, lambda staged: shelf.fetch(key, staged, report))
    elif fetch_only:
        raise EngineError(
            f"{store} holds no engines for this machine and these options ({key.directory}); run the same command "
            "without --fetch-only to build them and to publish them there"
        )
    elif reason is not None:
        raise EngineError(f"{store} holds no engines of {key.directory}, and '{backend}' cannot build here: {reason}")
    else:
        record = _put(
            target, lambda staged: _build_into(bundle, backend, key, options, staged, report), overwrite=force
        )
    if shelf is not None and not fetch_only:
        shelf.publish(target, record, report, overwrite=force)
    return record


def _put(target: Path, fill: Callable[[Path], EngineRecord], *, overwrite: bool = False) -> EngineRecord:
    """Fill a directory beside `target`, then put it in its place."""
    staged = staging(target, f"{os.getpid():x}-{time.monotonic_ns():x}"[-12:])
    try:
        with disk_errors(target):
            record = fill(staged)
        publish(staged, target, overwrite=overwrite)
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
