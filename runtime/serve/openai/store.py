"""Pictures under an address, for clients that ask for a `url`: a folder, names that cannot be guessed, an age."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path

from latentrt.engines.bundle.files import atomic_write
from latentrt.runtime.serve.openai.schema import Format

AGE_S = 3600.0
NAME = re.compile(r"picture-[\w-]{43}\.(png|jpeg|webp)", flags=re.ASCII)


def put(folder: Path, data: bytes, kind: Format) -> str:
    """Write a picture; return the name that it can be fetched by. Those that are too old are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) and _old(path):
            path.unlink(missing_ok=True)
    name = f"picture-{secrets.token_urlsafe(32)}.{kind}"
    with atomic_write(folder / name) as beside:
        beside.write_bytes(data)
    return name


def find(folder: Path, name: str) -> Path | None:
    """Return a picture's file; None if there is none of that name, or it is too old."""
    path = folder / name
    return path if NAME.fullmatch(name) and path.is_file() and not _old(path) else None


def _old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > AGE_S
    except FileNotFoundError:  # another request removed it
        return True
