"""Work that is prepared beside its place, by one living process at a time; what a dead one left is removed.

Whoever prepares something at `.NAME.partial-KEY` holds a lock on the file `.NAME.partial-KEY.lock`. The kernel gives a
lock back when its process ends, however it ends, so a path whose lock can be taken belongs to nobody.

A lock is a file of its own and not the directory that is prepared: over NFS `flock` becomes a lock of bytes, for which
the file must be open for writing (flock(2)). There, a lock that a dead machine held is free only after the server's
grace period, and a mount with `nolock` or `local_lock=flock` sees the locks of its own machine alone: do not build into
one folder from several machines that are mounted so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from latentrt.engines.bundle.files import atomic_write, disk_errors, sync

PARTIAL = ".partial-"
LOCK = ".lock"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# Nothing can be prepared in a folder: it is not ours, read-only, no folder, or on a file system without locks.
UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
)

_log = logging.getLogger(__name__)


def partial(target: Path, key: str) -> Path:
    """Return the path beside `target` at which work with this key is prepared."""
    return target.with_name(f".{target.name}{PARTIAL}{key[:12]}")


@contextlib.contextmanager
def staged(target: Path, key: str) -> Iterator[Path]:
    """Give the directory beside `target` in which work with this key is prepared to this process alone; others wait.

    The same key gives the same directory, so a second run finds what the first one finished: it stays where it is
    unless it was published or removed. Raises BundleError.
    """
    path = partial(target, key)
    with contextlib.ExitStack() as held:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(claimed(path))
            path.mkdir(exist_ok=True)
        yield path


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Give the path beside a file at which it is written; it takes its place, whole, when the block ends.

    Another one that writes the same file waits. Raises OSError.
    """
    with claimed(partial(target, "file")), atomic_write(target) as beside:
        yield beside


def publish(directory: Path, target: Path, *, overwrite: bool = False) -> None:
    """Put a finished directory in its place: flush it to the disk, then rename. Raises BundleError.

    The old directory stays until the new one is complete. With `overwrite` false, a directory that is there
    already (another process was faster) wins, and the finished one is dropped.
    """
    with disk_errors(target):
        for path in sorted(directory.rglob("*")):
            sync(path)
        while not _rename_into(directory, target):
            if not overwrite:
                shutil.rmtree(directory)
                break
            with contextlib.suppress(FileNotFoundError):  # another process moved it first
                _replace(directory, target)
                break
        sync(target.parent)


def _rename_into(directory: Path, target: Path) -> bool:
    """Rename a directory; return False where one stands in its place."""
    try:
        directory.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


def _replace(directory: Path, target: Path) -> None:
    """Put a directory where another one stands, which goes. Raises OSError, and then the old one stands as before."""
    beside = _beside(target)
    with claimed(beside):  # or whoever sweeps here would remove it
        directory.rename(beside)  # a name without a key: what a kill leaves here is never taken for finished work
        try:
            old = beside if _exchange(beside, target) else _put_aside(beside, target)
        except OSError:
            with contextlib.suppress(OSError):  # else the next sweep removes it
                beside.rename(directory)
            raise
        _remove(old)


def _put_aside(directory: Path, target: Path) -> Path:
    """Put a directory in another one's place in two steps, between which there is none. Return where the old one is."""
    old = _beside(target)
    with claimed(old):
        target.rename(old)
        try:
            directory.rename(target)
        except OSError:
            old.rename(target)
            raise
    return old


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}{PARTIAL}old-{os.getpid():x}-{time.monotonic_ns():x}")


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step (renameat2(2)); False where the file system cannot. Raises OSError."""
    import ctypes  # Python has no function for it, and only who replaces something needs it

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(other))
    return False


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold a path for this thread of this process until the block ends; whoever else wants it waits here.

    path: as `partial` gives it, whether or not there is something; its folder is there. Raises OSError.
    """
    handle = _take(path)
    if handle is None:
        _log.warning("waiting for another process, which is at work on %s", path)
    while handle is None:
        handle = _take(path, wait=True)
    try:
        yield
    finally:
        _give_back(path, handle)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what is prepared in a folder and no living process holds, where it can be removed.

    name: of the target, as a pattern
    """
    found = {path.name.removesuffix(LOCK) for path in folder.glob(f".{name}{PARTIAL}*")}
    for path in sorted(folder / name for name in found):
        with contextlib.suppress(OSError):
            handle = _take(path)
            if handle is not None:
                _remove(path)
                _give_back(path, handle)


def can_hold(folder: Path) -> bool:
    """Tell whether work can be prepared in a folder, which is made where it is missing. Raises OSError: a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        return False
    return True


def _take(path: Path, *, wait: bool = False) -> int | None:
    """Lock a path; return None if another one holds it or, after waiting, has just let it go."""
    lock = _lock_of(path)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), lock.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):  # held; or its holder has removed the file that we waited at
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _give_back(path: Path, handle: int) -> None:
    _lock_of(path).unlink(missing_ok=True)  # while it is held: whoever waits looks again
    os.close(handle)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + LOCK)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
