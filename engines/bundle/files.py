"""A bundle on disk: opening it, checking its files, and writing it so that a killed run leaves nothing broken."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import msgspec

from latentrt.engines.bundle.consistency import faults
from latentrt.engines.bundle.manifest import (
    ENGINE_RECORD,
    MANIFEST,
    SCHEMA_VERSION,
    EngineRecord,
    FileRecord,
    Manifest,
)
from latentrt.engines.bundle.parsing import ParseError, brief, decode, parse, read_content
from latentrt.engines.bundle.schema_1 import upgrade
from latentrt.engines.errors import BundleError

Check = Literal["hash", "size"]
T = TypeVar("T")

HUB_REPOSITORY = re.compile(r"(models|datasets|spaces)--.")  # how the hub's cache names a repository's directory


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """An opened bundle. Only files that the manifest or an engine's record names are ever read."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> Bundle:
        """Read the manifest of the bundle at `root`. Raises BundleError; files are checked when they are used."""
        path = Path(root)
        if not path.exists():
            raise BundleError(
                f"there is no bundle at '{path}'; make one with `latentrt export CHECKPOINT {typed(path)}`"
            )
        file = inside(path, MANIFEST) if path.is_dir() else None
        if file is None or not file.is_file():
            found = "it is a file" if file is None else f"it holds no {MANIFEST}"
            command = f"latentrt export {typed(path)} BUNDLE"
            raise BundleError(f"'{path}' is not a bundle: {found}; of a checkpoint make one with `{command}`")
        return cls(root=path, manifest=manifest_from_json(_content(file), where=str(file)))

    @property
    def name(self) -> str:
        """Return what the bundle is called: as its directory, or in the hub's cache as its repository."""
        home = self.root.resolve()
        blobs = _blobs(home)
        return blobs.parent.name.split("--")[-1] if blobs and home.parent.parent == blobs.parent else home.name

    def path(self, relative: str, *, check: Check = "size") -> Path:
        """Return the path of a file that the manifest names, after checking its size or its SHA-256."""
        record = self.manifest.files.get(relative)
        if record is None:
            raise BundleError(f"'{relative}' is not named in {self.root / MANIFEST}; export the checkpoint again")
        return check_file(self.root, relative, record, check=check)

    def engine_homes(self) -> tuple[Path, ...]:
        """Return where engines of this bundle may lie: beside its graphs and, where that is read-only, in the cache."""
        cache = cache_folder()
        own = self.root / "engines"
        return (own,) if cache is None else (own, cache / "engines" / self.manifest.graphs_digest()[:32])

    def engine_directories(self) -> dict[Path, EngineRecord]:
        """Return the engine directories of this bundle with their records; of two of one name the bundle's own.

        Raises BundleError.
        """
        found: dict[str, Path] = {}
        for home in self.engine_homes():
            root = self.root if home.is_relative_to(self.root) else home
            for file in sorted(home.glob(f"[!.]*/{ENGINE_RECORD}")):  # what begins with a dot is being prepared
                directory = inside(root, file.relative_to(root).as_posix()).parent
                found.setdefault(directory.name, directory)
        return {directory: read_engine_record(directory) for directory in found.values()}


def typed(path: str | os.PathLike[str]) -> str:
    """Return a path as it is typed in a shell: quoted where it holds spaces or the like."""
    import shlex  # for sentences about what is wrong

    return shlex.quote(os.fspath(path))


def cache_folder() -> Path | None:
    """Return the folder of what can be made again: $LATENTRT_CACHE, else `latentrt` in the platform's cache folder.

    None if neither is known: a user without a home.
    """
    if own := os.environ.get("LATENTRT_CACHE"):
        return Path(own)
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with contextlib.suppress(RuntimeError):  # there is no home
        # A relative path is to be ignored (XDG Base Directory Specification).
        shared = shared if shared.is_absolute() else Path.home() / ".cache"
    return shared / "latentrt" if shared.is_absolute() else None


def read_engine_record(directory: Path) -> EngineRecord:
    """Read the record of one engine directory. Raises BundleError."""
    file = directory / ENGINE_RECORD
    return engine_record_from_json(_content(file), where=str(file))


def _content(file: Path) -> bytes:
    try:
        return read_content(file)
    except ParseError as error:
        raise BundleError(f"{file} {error}; copy the bundle again") from None


def inside(root: Path, relative: str) -> Path:
    """Join a path that a manifest gave to its root. Raises BundleError if it would lead outside.

    A link may lead to a file below the root, or, where the root lies in a cache of the Hugging Face hub, to one of the
    `blobs` of the same repository: there each file of a snapshot is such a link, and nothing lies among them but what
    was fetched from that repository, whose author wrote the bundle too.
    """
    pure = PurePosixPath(relative)
    path = root / relative
    try:
        target, home = path.resolve(), root.resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle; a NUL or half a character, which no path has
        raise BundleError(
            f"the path {relative!r} in the bundle '{root}' leads nowhere; do not use this bundle"
        ) from None
    leaves = pure.is_absolute() or ".." in pure.parts or "\\" in relative or not pure.parts
    if leaves or not (target.is_relative_to(home) or target.parent == _blobs(home)):
        raise BundleError(f"the path {relative!r} leads outside the bundle '{root}'; do not use this bundle")
    return path


def _blobs(home: Path) -> Path | None:
    """Return where the hub's cache keeps the files of the repository that a directory is part of, None elsewhere.

    home: without links, so that nothing but the place itself makes it part of `models--user--name/snapshots/revision`.
        The answer is not resolved: were `blobs` a link itself, nothing that resolves would lie in it.
    """
    for snapshots in home.parents:
        if snapshots.name == "snapshots" and HUB_REPOSITORY.match(snapshots.parent.name):
            return snapshots.parent / "blobs"
    return None


def check_file(root: Path, relative: str, record: FileRecord, *, check: Check) -> Path:
    """Return the file's path if it is there and is what was recorded. Raises BundleError."""
    path = inside(root, relative)
    shown = brief(str(path))  # a record may say anything
    if not os.path.isfile(path):  # noqa: PTH113 - is False too for a name that is too long, where pathlib's raises
        raise BundleError(f"{shown} is missing; copy the bundle again or export the checkpoint again")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleError(
            f"{shown} holds {size} bytes where its record says {record.bytes}: it is truncated or altered; "
            "copy the bundle again or export the checkpoint again"
        )
    try:
        altered = check == "hash" and hash_file(path) != record.sha256
    except OSError as error:
        raise BundleError(f"{shown} could not be read: {error.strerror}; copy the bundle again") from None
    if altered:
        raise BundleError(
            f"{shown} was altered: its SHA-256 is not the recorded one; "
            "copy the bundle again or export the checkpoint again"
        )
    return path


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    import hashlib  # with OpenSSL, for what opens a bundle

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_file(root: Path, relative: str) -> FileRecord:
    """Measure and hash one file of a bundle that is being written."""
    path = inside(root, relative)
    return FileRecord(bytes=path.stat().st_size, sha256=hash_file(path))


def record_tree(root: Path) -> Mapping[str, FileRecord]:
    """Measure and hash every file below `root`, by relative path."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {name: record_file(root, name) for name in (path.relative_to(root).as_posix() for path in files)}


def write_manifest(root: Path, manifest: Manifest | EngineRecord) -> None:
    """Write manifest.json, or engine.json for an engine record, in one step."""
    name = MANIFEST if isinstance(manifest, Manifest) else ENGINE_RECORD
    with disk_errors(root), atomic_write(root / name) as beside:
        beside.write_text(manifest_to_json(manifest), encoding="utf-8")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give the path beside a file at which it is written; flushed to the disk, it takes its place when the block ends.

    A block that fails, or a process that is killed, leaves what was there. The folder is made. Two that write the same
    file at once must not: `staging.staged_file` lets them wait. Raises OSError: wrap it in `disk_errors`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # /dev/null, a pipe: written to, and never replaced
        import tempfile  # for those few

        with tempfile.TemporaryDirectory() as folder:
            yield (content := Path(folder) / path.name)
            path.write_bytes(content.read_bytes())
        return
    beside = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into one sentence: it is full or read-only, or nothing can lie at that path."""
    sentences = {
        errno.ENOSPC: "the disk is full; free some space and run the command again: it resumes",
        errno.EDQUOT: "the disk quota is used up; free some space and run the command again: it resumes",
        errno.EACCES: "permission was denied; choose a directory that you may write to",
        errno.EPERM: "permission was denied; choose a directory that you may write to",
        errno.EROFS: "the file system is read-only; choose a directory that you may write to",
        **dict.fromkeys(
            (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP),
            "its file system has no locks (flock); choose a directory on another one",
        ),
    }
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not from the disk
            raise
        sentence = sentences.get(error.errno, f"{error.strerror}; choose another place")
        raise BundleError(f"{path} could not be written: {sentence}") from error


def require_writable(path: Path) -> None:
    """Raise BundleError where nothing can be put at a path, so far as can be told without writing."""
    with disk_errors(path):  # of names that no file system holds
        folder = next(parent for parent in path.parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise BundleError(f"{path} could not be written: nothing can be put into '{folder}'; choose another place")


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest_to_json(manifest: Manifest | EngineRecord) -> str:
    """Write a manifest or an engine record as indented JSON."""
    return json.dumps(msgspec.to_builtins(manifest), indent=1, allow_nan=False) + "\n"


def manifest_from_json(content: bytes | str, *, where: str) -> Manifest:
    """Read a manifest strictly; `where` is the file's path, for the error. Raises BundleError."""
    manifest = _decode(Manifest, content, where=where, fix="export the checkpoint again")
    for fault in faults(manifest):
        raise BundleError(f"{where} {brief(fault)}")
    return manifest


def engine_record_from_json(content: bytes | str, *, where: str) -> EngineRecord:
    """Read an engine record strictly; `where` is the file's path, for the error. Raises BundleError."""
    record = _decode(EngineRecord, content, where=where, fix="delete its directory and run `latentrt build`")
    for component, entry in record.entries.items():
        if entry not in record.files or component not in record.specs:
            raise BundleError(
                f"{where} $.entries.{brief(component)}: '{brief(entry)}' is not among $.files, or the component is not "
                "among $.specs; delete its directory and run `latentrt build`"
            )
    return record


def _decode(kind: type[T], content: bytes | str, *, where: str, fix: str) -> T:
    try:
        document = decode(content, strict=True)
    except ParseError as error:
        raise BundleError(f"{where} {error}; {fix}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version}, this latentrt reads up to {SCHEMA_VERSION}; upgrade latentrt"
        )
    try:
        return parse(kind, upgrade(document) if kind is Manifest else document)
    except ParseError as error:
        raise BundleError(f"{where} {error}; {fix}") from None
