"""Build a bundle's engines for this machine, or for the target that the options name."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from latentrt.engines.backends import Backend, backend_on
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle, disk_errors, read_engine_record, record_tree, write_manifest
from latentrt.engines.bundle.manifest import ENGINE_RECORD, SCHEMA_VERSION, EngineRecord
from latentrt.engines.bundle.staging import can_hold, publish, staged, sweep
from latentrt.engines.bundle.store import Store
from latentrt.engines.errors import BundleError, EngineError, RequestError
from latentrt.engines.find import Choice, cannot_build, choose, choose_to_build, serves
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import BackendName, EngineKey, EngineSpec
from latentrt.engines.verify.references import write_references

DEFAULTS = BuildOptions()

_log = logging.getLogger(__name__)


def build_engines(
    bundle: Bundle,
    backend: BackendName,
    *,
    options: BuildOptions = DEFAULTS,
    device: int = 0,
    force: bool = False,
    store: str | None = None,
    fetch_only: bool = False,
    report: Report = silent,
) -> EngineRecord:
    """Put every component's engine for this machine below the bundle's `engines/`: built, or fetched from a store.

    Where nothing can be written there, they go into the user's cache (`Bundle.engine_homes`). Engines that are in
    either under the same key are kept, unless `force`. Of two processes that build the same key one waits for the
    other; what a killed one left is removed.
    device: which of the visible GPUs to build for and on, from 0
    store: a URL where engines lie by their keys: fetched from there where it has them, else built and published there
    fetch_only: build nothing
    Raises EngineError (backend, store), BundleError (files) and RequestError (options).
    """
    if fetch_only and (store is None or force):
        raise RequestError("--fetch-only needs --store URL to fetch from, and builds nothing with --force")
    try:
        key = backend_on(backend, device).key(bundle, options)
    except EngineError:
        check_can_build(backend, options, device)  # which says more
        raise
    shelf = Store(store) if store is not None else None
    there = None if force else engines_at(bundle, key)
    if there is not None:
        sweep(there.parent)
        record = read_engine_record(there)
    elif not force and shelf is not None and shelf.holds(key):
        return _put(_home(bundle) / key.directory, lambda directory: shelf.fetch(key, directory, report))
    elif fetch_only:
        raise EngineError(
            f"{store} holds no engines for this machine and these options ({key.directory}); run the same command "
            "without --fetch-only to build them and to publish them there"
        )
    else:
        before = f"{store} holds no engines of {key.directory}, and none can be built: " if shelf else ""
        check_can_build(backend, options, device, before)
        there = _place(bundle, key)
        building = partial(_build_into, bundle, backend_on(backend, device), key, options, report=report)
        record = _put(there, building, overwrite=force)
        _log.info("built %s for %s in %.2f s", there, backend, record.build_s)
    if shelf is not None and not fetch_only:
        shelf.publish(there, record, report, overwrite=force)
    return record


def build_missing(bundle: Bundle, asked: str, *, device: int = 0) -> Choice:
    """Choose a backend to run on as `choose` does, and build its engines where the bundle has none for this machine.

    What `latentrt build` builds without options is built. Raises EngineError and BundleError.
    """
    if serves(asked, bundle, device=device):
        return choose(asked, bundle, device=device)
    choice = choose_to_build(asked, DEFAULTS, device=device)
    unavailable = backend_on(choice.backend, device).unavailable()
    reason = unavailable or cannot_build(choice.backend, DEFAULTS, device=device)
    if reason is not None:
        raise reason.within(f"'{bundle.root}' holds no engines for this machine, and none can be built: ")
    _log.warning("'%s' holds no engines for this machine: building them for %s, once", bundle.root, choice.backend)
    record = build_engines(bundle, choice.backend, device=device)
    place = engines_at(bundle, record.key)
    _log.warning("built %s in %.1f s", place, record.build_s)
    return msgspec.structs.replace(choice, reason=f"{choice.reason}; built when it was loaded, in {place}")


def check_can_build(backend: BackendName, options: BuildOptions = DEFAULTS, device: int = 0, before: str = "") -> None:
    """Raise EngineError where a backend's engines cannot be built on this machine. before: begins its sentence"""
    reason = cannot_build(backend, options, device=device)
    if reason is not None:
        raise reason.within(f"{before}backend '{backend}': ")


def engines_at(bundle: Bundle, key: EngineKey) -> Path | None:
    """Return where the engines of a key lie, the bundle's own before the cache's; None if there are none."""
    places = (home / key.directory for home in bundle.engine_homes())
    return next((place for place in places if (place / ENGINE_RECORD).is_file()), None)


def _home(bundle: Bundle) -> Path:
    """Return the first folder in which engines can be put, without what killed builds left there."""
    homes = bundle.engine_homes()
    for home in homes:
        with disk_errors(home):
            if can_hold(home):
                sweep(home)
                return home
    raise BundleError(
        f"nothing can be written in {' or in '.join(map(str, homes))}; name a folder for engines with the environment "
        "variable LATENTRT_CACHE"
    )


def _place(bundle: Bundle, key: EngineKey) -> Path:
    """Return where engines are to be built. Raises BundleError where nobody would find them: older ones go first."""
    place, own = _home(bundle) / key.directory, bundle.root / "engines" / key.directory
    if place != own and (own / ENGINE_RECORD).is_file():
        raise BundleError(
            f"{own} cannot be replaced: nothing can be written in {own.parent}, and what was built in {place.parent} "
            "would not be used as long as it is there; run this where you may write to the bundle, or on a copy of it"
        )
    return place


def _put(target: Path, fill: Callable[[Path], EngineRecord], *, overwrite: bool = False) -> EngineRecord:
    """Fill a directory beside `target`, then put it in its place: by one process at a time."""
    with staged(target, "build") as directory:
        try:
            if not overwrite and (target / ENGINE_RECORD).is_file():  # another process was faster
                return read_engine_record(target)
            with disk_errors(target):
                shutil.rmtree(directory)  # what a killed process left
                directory.mkdir()
                record = fill(directory)
            publish(directory, target, overwrite=overwrite)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    return record


def _write_references(bundle: Bundle, specs: Sequence[EngineSpec], directory: Path, report: Report) -> None:
    """Write beside engines that were compiled for sizes what each must compute at them."""
    for spec in (spec for spec in specs if spec.profiles):
        what = f"references of {spec.component} (cpu)"
        report(what, 0, 1)
        write_references(bundle, spec, directory)
        report(what, 1, 1)


def _build_into(
    bundle: Bundle, backend: Backend, key: EngineKey, options: BuildOptions, directory: Path, *, report: Report
) -> EngineRecord:
    start = time.perf_counter()
    built = backend.build(bundle, directory, options, report)
    _write_references(bundle, [spec for _, spec in built.values()] if options.references else [], directory, report)
    record = EngineRecord(
        schema_version=SCHEMA_VERSION,
        key=key,
        specs={component: spec for component, (_, spec) in built.items()},
        entries={component: entry for component, (entry, _) in built.items()},
        files=record_tree(directory),
        build_s=round(time.perf_counter() - start, 3),
    )
    write_manifest(directory, record)
    return record
