"""Any file or directory as it lies in a cache of the Hugging Face hub: links to blobs with hashes for names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from latentrt.engines.bundle.files import hash_file

REVISION = "5d1c3b2a0f9e8d7c6b5a49382716051423344556"


def in_hub_cache(given: Path, cache: Path, *, repository: str = "models--user--name") -> Path:
    """Lay a file or a directory out as huggingface_hub does, as the branch `main`; return its path in the snapshot.

    Every file is a relative link `models--user--name/snapshots/REVISION/unet/config.json -> ../../../blobs/SHA-256`.
    """
    home = cache / repository
    snapshot = home / "snapshots" / REVISION
    files = [path for path in given.rglob("*") if path.is_file()] if given.is_dir() else [given]
    above = given if given.is_dir() else given.parent
    for file in files:
        blob, link = home / "blobs" / hash_file(file), snapshot / file.relative_to(above)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(REVISION)
    return snapshot if given.is_dir() else snapshot / given.name
