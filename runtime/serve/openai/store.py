"""Pictures under an address, for clients that ask for a `url`: a folder, names that cannot be guessed, an age."""

from __future__ import annotations

import re
import secrets
import time
from contextlib import suppress
from pathlib import Path

from latentrt.engines.bundle.files import atomic_write, disk_errors
from latentrt.runtime.serve.openai.schema import Format

AGE_S, MOST_BYTES = 3600.0, 4 * 2**30
NAME = re.compile(r"picture-[\w-]{43}\.(png|jpeg|webp)", flags=re.ASCII)


def put(folder: Path, data: bytes, kind: Format) -> str:
    """Write a picture; return the name that it can be fetched by. Raises BundleError: a full disk.

    Those that are too old are removed, and the oldest where all of them would have more than MOST_BYTES.
    """
    name = f"picture-{secrets.token_urlsafe(32)}.{kind}"
    with disk_errors(folder), atomic_write(folder / name) as beside:
        _make_room(folder, MOST_BYTES - len(data))
        beside.write_bytes(data)
    return name


def find(folder: Path, name: str) -> bytes | None:
    """Return a picture's file; None if there is none of that name, or it is too old."""
    path = folder / name
    if not NAME.fullmatch(name):
        return None
    with suppress(FileNotFoundError):  # there is none, or no longer
        return path.read_bytes() if path.stat().st_mtime >= time.time() - AGE_S else None
    return None


def _make_room(folder: Path, most: int) -> None:
    """Remove pictures that are too old, and the oldest until the others have so many bytes at the most."""
    kept = []
    for path in folder.iterdir():
        if NAME.fullmatch(path.name):
            with suppress(FileNotFoundError):  # another request removed it
                kept.append((path.stat().st_mtime, path.stat().st_size, path))
    left = sum(size for _, size, _ in kept)
    for written, size, path in sorted(kept):
        if written >= time.time() - AGE_S and left <= most:
            break
        path.unlink(missing_ok=True)
        left -= size
