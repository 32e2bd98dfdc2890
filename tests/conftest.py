"""What many tests share: tiny checkpoints, the bundles exported from them, and the demo's. Made once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions, ControlNetOption
from tests.sd3 import make_sd3, save_sd3_controlnet
from tests.svd import make_svd
from tests.tiny import (
    save_adapter,
    save_controlnet,
    save_image_encoder,
    save_ip_adapter,
    save_motion,
    save_tiny,
)

ROOT = Path(__file__).parent.parent
REFINED = "refined"
FORGOTTEN_S = 6 * 3600
Make = Callable[[str, str], tuple[Path, Path]]
"""(family, variant) -> a tiny checkpoint and its bundle"""


@dataclass(frozen=True)
class Controlled:
    """A tiny checkpoint, ControlNets or adapters for it by name, and the bundle of all."""

    checkpoint: Path
    networks: dict[str, Path]
    bundle: Path


MakeControlled = Callable[[str, str], Controlled]
"""(family, variant) -> a checkpoint with ControlNets"""

settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Engines of the user's own cache are not found; a test that wants them there sets a place of its own. Graphs that were
# traced are kept here from one session to the next.
os.environ["LATENTRT_CACHE"] = str(ROOT / ".cache" / "latentrt")


@pytest.fixture(scope="session")
def workshop() -> Path:
    """A directory for what tests share. They read from it and never write into it.

    It outlives the session: exporting takes most of the suite's time, and gives the same while no source changes.
    """
    shelf = ROOT / ".cache" / "workshops"
    workshop = shelf / _sources()
    workshop.mkdir(parents=True, exist_ok=True)
    for old in set(shelf.iterdir()) - {workshop}:
        if time.time() - old.lstat().st_mtime > FORGOTTEN_S:  # another session may be at work in a younger one
            shutil.rmtree(old, ignore_errors=True)
    return workshop


def _sources() -> str:
    """Return a digest of all that a shared bundle depends on: our code and the libraries."""
    files = sorted(path for folder in ("export", "engines", "tests") for path in (ROOT / folder).rglob("*.py"))
    made_of = [*files, *sorted((ROOT / "export" / "demo" / "checkpoint").rglob("*.*")), ROOT / "constraints.txt"]
    digest = hashlib.sha256(sys.version.encode())
    for path in made_of:
        if "test_" not in path.name and path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _tiny(path: Path, **options: str) -> Path:
    """Return a tiny checkpoint, made if there is none yet; in one step, so that a killed run leaves no half."""
    if not path.is_dir():
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            save_tiny(Path(beside) / path.name, **options)
            with contextlib.suppress(OSError):  # another process of this session was faster
                (Path(beside) / path.name).rename(path)
    return path


def _network(save: Callable[..., Path], path: Path, **options: Any) -> Path:
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            save(Path(beside) / path.name, **options)
            with contextlib.suppress(OSError):
                (Path(beside) / path.name).rename(path)
    return path


@pytest.fixture(scope="session")
def sd1_checkpoint(workshop: Path) -> Path:
    return _tiny(workshop / "sd1-checkpoint", family="sd1")


@pytest.fixture(scope="session")
def sd2_checkpoint(workshop: Path) -> Path:
    return _tiny(workshop / "sd2-checkpoint", family="sd2")


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
    """Make a tiny checkpoint and its bundle, once for each kind; `refined` is the plain one with its refiner.

    The variants of sd3 are `dual`, `t5` and `inpainting`, or several with spaces between them.
    """
    known = dict[tuple[str, str], tuple[Path, Path]]()

    def make(family: str, variant: str) -> tuple[Path, Path]:
        if (family, variant) not in known:
            name = f"{family}-{variant.replace(' ', '-')}" if variant else f"{family}-plain"
            own = "" if variant == REFINED else variant
            path = workshop / f"{family}-{own.replace(' ', '-') or 'plain'}-checkpoint"
            if family == "sd3":  # with what its variant names: `dual`, `t5`
                checkpoint = _network(make_sd3, path, **dict.fromkeys(own.split(), True))
            else:
                checkpoint = _tiny(path, family=family, variant=own)
            options = CheckpointOptions(refiner=str(make(family, "refiner")[0])) if variant == REFINED else None
            export_checkpoint(str(checkpoint), workshop / name, precision="fp32", options=options)
            known[family, variant] = checkpoint, workshop / name
        return known[family, variant]

    return make


@pytest.fixture(scope="session")
def motion(workshop: Path) -> Controlled:
    """A tiny checkpoint of SD 1.x, a motion adapter and a ControlNet for it, and the bundle of all: it draws videos."""
    checkpoint = _tiny(workshop / "sd1-plain-checkpoint", family="sd1")
    adapter = _network(save_motion, workshop / "sd1-motion-adapter")
    edges = _network(save_controlnet, workshop / "sd1-edges", family="sd1", seed=1)
    options = CheckpointOptions(
        motion_adapter=str(adapter), controlnets=(ControlNetOption(name="edges", path=str(edges)),)
    )
    export_checkpoint(str(checkpoint), workshop / "sd1-motion", precision="fp32", options=options)
    networks = {"motion": adapter, "edges": edges}
    return Controlled(checkpoint=checkpoint, networks=networks, bundle=workshop / "sd1-motion")


@pytest.fixture(scope="session")
def svd(workshop: Path) -> tuple[Path, Path]:
    """A tiny checkpoint of Stable Video Diffusion, and its bundle: it makes videos of an image."""
    checkpoint = _network(make_svd, workshop / "svd-checkpoint")
    export_checkpoint(str(checkpoint), workshop / "svd", precision="fp32")
    return checkpoint, workshop / "svd"


@pytest.fixture(scope="session")
def controlled(workshop: Path, made: Make) -> MakeControlled:
    """Make a tiny checkpoint, two ControlNets for it, and the bundle of all three, once for each kind."""
    known = dict[tuple[str, str], Controlled]()

    def make(family: str, variant: str) -> Controlled:
        if (family, variant) not in known:
            checkpoint, _ = made(family, variant)
            networks = {
                name: _network(save_controlnet, workshop / f"{family}-{name}", family=family, seed=seed)
                for seed, name in enumerate(("edges", "depth"), start=1)
            }
            bundle = workshop / f"{family}-{variant or 'plain'}-controlled"
            options = CheckpointOptions(
                controlnets=tuple(ControlNetOption(name=name, path=str(path)) for name, path in networks.items())
            )
            export_checkpoint(str(checkpoint), bundle, precision="fp32", options=options)
            known[family, variant] = Controlled(checkpoint=checkpoint, networks=networks, bundle=bundle)
        return known[family, variant]

    return make


@pytest.fixture(scope="session")
def followed(workshop: Path, made: Make) -> Controlled:
    """A tiny checkpoint of 3.5 medium's kind, ControlNets for it of each kind, and the bundle of all.

    Its second block may be skipped.
    """
    checkpoint, _ = made("sd3", "dual t5")
    kinds = {"edges": "pooled as zeros", "depth": "pooled as zeros", "pose": "pooled", "large": "without text"}
    networks = {
        name: _network(save_sd3_controlnet, workshop / f"sd3-{name}", kind=kind, seed=seed)
        for seed, (name, kind) in enumerate(kinds.items(), start=1)
    }
    options = CheckpointOptions(
        controlnets=tuple(ControlNetOption(name=name, path=str(path)) for name, path in networks.items()),
        skip_layers=(1,),
    )
    bundle = workshop / "sd3-followed"
    export_checkpoint(str(checkpoint), bundle, precision="fp32", options=options)
    return Controlled(checkpoint=checkpoint, networks=networks, bundle=bundle)


# A family's folder in the published repository, and the tiny IP-Adapters there.
SHOWN = {"sd1": ("models", ("plain", "plus", "full")), "sdxl": ("sdxl_models", ("plain", "plus"))}


@pytest.fixture(scope="session")
def shown(workshop: Path, made: Make) -> Callable[[str], Controlled]:
    """Make a tiny checkpoint, IP-Adapters and a ControlNet for it, and the bundle of all, once for each family.

    The adapters lie as in the published repository, whose image encoder is found beside them.
    """
    known = dict[str, Controlled]()

    def make(family: str) -> Controlled:
        if family not in known:
            checkpoint, _ = made(family, "")
            root = workshop / f"{family}-ip-adapters"
            encoder = _network(save_image_encoder, root / "models" / "image_encoder")
            folder, kinds = SHOWN[family]
            adapters = {
                kind: save_ip_adapter(root / folder / f"{kind}.safetensors", family=family, kind=kind, seed=seed)
                for seed, kind in enumerate(kinds)
            }
            edges = _network(save_controlnet, workshop / f"{family}-edges", family=family, seed=1)
            bundle = workshop / f"{family}-shown"
            options = CheckpointOptions(
                ip_adapters=tuple(ControlNetOption(name=name, path=str(path)) for name, path in adapters.items()),
                controlnets=(ControlNetOption(name="edges", path=str(edges)),),
            )
            export_checkpoint(str(checkpoint), bundle, precision="fp32", options=options)
            networks = {**adapters, "image_encoder": encoder, "edges": edges}
            known[family] = Controlled(checkpoint=checkpoint, networks=networks, bundle=bundle)
        return known[family]

    return make


@pytest.fixture(scope="session")
def adapted(workshop: Path, made: Make) -> Callable[[str], Controlled]:
    """Make a tiny checkpoint, two T2I-Adapters and a ControlNet for it, and the bundle of all, once for each family."""
    known = dict[str, Controlled]()

    def make(family: str) -> Controlled:
        if family not in known:
            checkpoint, _ = made(family, "")
            adapters = {
                name: _network(save_adapter, workshop / f"{family}-{name}", family=family, seed=seed, channels=channels)
                for name, seed, channels in (("sketch", 7, 3), ("outline", 8, 1 if family == "sd1" else 3))
            }
            edges = _network(save_controlnet, workshop / f"{family}-edges", family=family, seed=1)
            bundle = workshop / f"{family}-adapted"
            options = CheckpointOptions(
                adapters=tuple(ControlNetOption(name=name, path=str(path)) for name, path in adapters.items()),
                controlnets=(ControlNetOption(name="edges", path=str(edges)),),
            )
            export_checkpoint(str(checkpoint), bundle, precision="fp32", options=options)
            known[family] = Controlled(checkpoint=checkpoint, networks=adapters, bundle=bundle)
        return known[family]

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: tiny networks take longer to divide among threads than to compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def address(models: Any) -> Iterator[str]:
    """The address of a service of the models that a test file has as `models`."""
    from latentrt.runtime.serve.app import build
    from tests.serving import served

    with served(build(models)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    """OpenAI's client of that service."""
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        yield client
