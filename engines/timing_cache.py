"""What TensorRT measured when it chose kernels, kept in a file, so that the next build measures only what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentrt.engines.bundle import disk_errors
from latentrt.engines.errors import EngineError
from latentrt.engines.staging import staged_file


def attach_timing_cache(config: Any, file: Path) -> None:
    """Let a builder's configuration start from a file, or from nothing where there is none yet. Raises EngineError."""
    content = file.read_bytes() if file.exists() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            f"--timing-cache: {file} is no timing cache of this TensorRT on this GPU; name another file, or delete it"
        )


def save_timing_cache(config: Any, file: Path) -> None:
    """Write what is known now in one step. Of two builds that share a file the last one's knowledge stays."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(file) as beside:
            beside.write_bytes(config.get_timing_cache().serialize())
