"""What many tests share: tiny checkpoints, the bundles exported from them, and the demo's. Made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from latentrt.export.exporting import export_checkpoint
from tests.tiny import save_tiny

Make = Callable[[str, str], tuple[Path, Path]]
"""(family, variant) -> a tiny checkpoint and its bundle"""

settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for what the whole session shares. Tests read from it and never write into it."""
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="session")
def sd1_checkpoint(workshop: Path) -> Path:
    return save_tiny(workshop / "sd1-checkpoint", family="sd1")


@pytest.fixture(scope="session")
def sd2_checkpoint(workshop: Path) -> Path:
    return save_tiny(workshop / "sd2-checkpoint", family="sd2")


@pytest.fixture(scope="session")
def sd1_bundle(workshop: Path, sd1_checkpoint: Path) -> Path:
    export_checkpoint(str(sd1_checkpoint), workshop / "sd1", precision="fp32")
    return workshop / "sd1"


@pytest.fixture(scope="session")
def sd2_bundle(workshop: Path, sd2_checkpoint: Path) -> Path:
    export_checkpoint(str(sd2_checkpoint), workshop / "sd2", precision="fp32")
    return workshop / "sd2"


@pytest.fixture(scope="session")
def demo_bundle(workshop: Path) -> Path:
    export_checkpoint("demo", workshop / "shapes", precision="fp32")
    return workshop / "shapes"


@pytest.fixture(scope="session")
def sd1_half_bundle(workshop: Path, sd1_checkpoint: Path) -> Path:
    export_checkpoint(str(sd1_checkpoint), workshop / "sd1-fp16", precision="fp16")
    return workshop / "sd1-fp16"


@pytest.fixture(scope="session")
def demo_half_bundle(workshop: Path) -> Path:
    export_checkpoint("demo", workshop / "shapes-fp16", precision="fp16")
    return workshop / "shapes-fp16"


@pytest.fixture(scope="session")
def made(workshop: Path) -> Make:
    """Make a tiny checkpoint and its bundle, once for each kind."""
    known = dict[tuple[str, str], tuple[Path, Path]]()

    def make(family: str, variant: str) -> tuple[Path, Path]:
        if (family, variant) not in known:
            name = f"{family}-{variant}" if variant else f"{family}-plain"
            checkpoint = save_tiny(workshop / f"{name}-checkpoint", family=family, variant=variant)
            export_checkpoint(str(checkpoint), workshop / name, precision="fp32")
            known[family, variant] = checkpoint, workshop / name
        return known[family, variant]

    return make
