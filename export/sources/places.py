"""Where what was named lies: in a directory, below a home, or in a cache of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from latentrt.engines.bundle.files import HUB_REPOSITORY
from latentrt.engines.errors import CheckpointError

HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


def find_place(name: str, *, revision: str | None = None) -> Path:
    """Return the path that a name means, whether or not anything lies there.

    `~` is a home. A repository's folder in the hub's cache (`models--user--name`) means what was fetched of a revision,
    of `main` where none is named, or the only one that was fetched.
    Raises CheckpointError for a revision of what has none.
    """
    path = Path(name)
    if name.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError:  # nobody has that name
            return path
    found = _snapshot(path, revision) if _is_repository(path) else None
    if found is None and revision is not None and path.exists():
        raise CheckpointError(
            f"there is no revision '{revision}' of '{path}'; omit --revision, which is for hub ids and their cache"
        )
    return found or path


def absent(name: str) -> str:
    """Say of a name that nothing lies there, and of one that the hub may know what to type: none is fetched."""
    fetch = f", and is not fetched: `hf download {name}` prints the directory to give" if HUB_ID.fullmatch(name) else ""
    return f"is not there{fetch}"


def _is_repository(path: Path) -> bool:
    return (path / "snapshots").is_dir() and HUB_REPOSITORY.match(path.resolve().name) is not None


def _snapshot(repository: Path, revision: str | None) -> Path | None:
    there = {path.name: path for path in (repository / "snapshots").iterdir()}
    head = repository / "refs" / (revision or "main")
    commit = head.read_text(encoding="utf-8", errors="replace").strip() if head.is_file() else revision
    if commit is None and len(there) == 1:
        (commit,) = there
    return there.get(commit or "")
