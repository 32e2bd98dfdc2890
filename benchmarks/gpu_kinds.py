"""Tiny bundles of every kind for a GPU machine that can make none, and what is drawn with each.

    python benchmarks/gpu_kinds.py .gpu/bundles      # export each of the tests' tiny checkpoints in fp16, and pack it

Weights are random: whether a backend draws what the CPU's engines draw needs no trained ones (gpu_pictures.py).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Control, ImagePrompt

Draw = Callable[[Pipeline], Array]  # of (n, height, width, 3), uint8

PROMPT = "a red circle on blue"
SIZE = (64, 48)
ASKED: Mapping[str, Any] = {"steps": 4, "guidance": 5.0, "seed": 7, "size": SIZE}
TESTS = Path(__file__).parent.parent  # the folder that `tests` lies in


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A tiny bundle: `export` makes its checkpoint in a folder and a bundle at a path; `requests` are its pictures."""

    export: Callable[[Path, Path], None]
    requests: Callable[[], Mapping[str, Draw]]


def picture(**options: Any) -> Draw:
    """Return a request for pictures."""

    def draw(pipe: Pipeline) -> Array:
        return np.stack([np.asarray(image) for image in pipe(**{"prompt": PROMPT, **ASKED, **options}).images])

    return draw


def video(frames: int, prompt: Any = PROMPT, **options: Any) -> Draw:
    """Return a request for a video."""

    def draw(pipe: Pipeline) -> Array:
        found = pipe.video(prompt, frames, **{**ASKED, **options}).frames
        return found.reshape(-1, *found.shape[-3:])

    return draw


def photo() -> Array:
    """Return an image (48, 64, 3), uint8."""
    across, down = np.linspace(0, 255, SIZE[0]), np.linspace(255, 0, SIZE[1])
    image = np.stack(np.broadcast_arrays(across, down[:, None], 90.0), 2)
    return image.astype(np.uint8)


def mask() -> Array:
    """Return a mask (48, 64), uint8, white on the right."""
    return np.where(np.arange(SIZE[0]) < SIZE[0] // 2, 0, 255).astype(np.uint8)[None].repeat(SIZE[1], 0)


def _export(checkpoint: Path, bundle: Path, **options: Any) -> None:
    from latentrt.export.export import export_checkpoint
    from latentrt.export.options import CheckpointOptions

    export_checkpoint(str(checkpoint), bundle, precision="fp16", options=CheckpointOptions(**options))


def _named(**files: Path) -> tuple[Any, ...]:
    from latentrt.export.options import ControlNetOption

    return tuple(ControlNetOption(name=name, path=str(path)) for name, path in files.items())


def _network(save: Callable[..., Any], path: Path, **options: Any) -> Path:
    save(path, **options)
    return path


def _three(folder: Path, bundle: Path) -> None:
    from tests.sd3 import make_sd3

    _export(make_sd3(folder / "checkpoint", t5=True, dual=True), bundle, skip_layers=(0, 1))


def _motion(folder: Path, bundle: Path) -> None:
    from tests.tiny import save_controlnet, save_motion, save_tiny

    checkpoint = _network(save_tiny, folder / "checkpoint", family="sd1")
    _export(
        checkpoint,
        bundle,
        motion_adapter=str(_network(save_motion, folder / "motion")),
        controlnets=_named(edges=_network(save_controlnet, folder / "edges", family="sd1")),
    )


def _shown(folder: Path, bundle: Path, family: str, kinds: tuple[str, ...]) -> None:
    from tests.tiny import save_controlnet, save_image_encoder, save_ip_adapter, save_tiny

    checkpoint = _network(save_tiny, folder / "checkpoint", family=family)
    save_image_encoder(folder / "models" / "image_encoder")
    models = folder / ("models" if family == "sd1" else "sdxl_models")
    adapters = {
        kind: save_ip_adapter(models / f"{kind}.safetensors", family=family, kind=kind, seed=seed)
        for seed, kind in enumerate(kinds)
    }
    edges = {
        name: _network(save_controlnet, folder / name, family=family, seed=seed)
        for seed, name in enumerate(("edges", "depth"), start=1)
    }
    _export(checkpoint, bundle, ip_adapters=_named(**adapters), controlnets=_named(**edges))


def _refined(folder: Path, bundle: Path) -> None:
    from tests.tiny import save_tiny

    checkpoint = _network(save_tiny, folder / "checkpoint", family="sdxl")
    refiner = _network(save_tiny, folder / "refiner", family="sdxl", variant="refiner")
    _export(checkpoint, bundle, refiner=str(refiner))


def _plain(folder: Path, bundle: Path, family: str, variant: str) -> None:
    from tests.tiny import save_tiny

    _export(_network(save_tiny, folder / "checkpoint", family=family, variant=variant), bundle)


def _moving(folder: Path, bundle: Path) -> None:
    from tests.svd import make_svd

    _export(_network(make_svd, folder / "checkpoint"), bundle)


def _moving_requests() -> Mapping[str, Draw]:
    return {
        "a video": video(4, prompt=None, image=photo()),
        "guidance from frame to frame": video(4, prompt=None, image=photo(), first_guidance=1.5, guidance=4.0),
        "a video again": video(4, prompt=None, image=photo()),
    }


def _three_requests() -> Mapping[str, Draw]:
    return {
        "text": picture(),
        "three pictures": picture(n=3),
        "layers left out": picture(skip_layer_guidance=2.8, skip_layer_interval=(0.0, 0.5)),
        "without guidance": picture(guidance=1.0),
        "two evaluations a step": picture(sampler="heun"),
        "an image": picture(image=photo(), strength=0.6),
        "a mask": picture(image=photo(), mask=mask()),
        "another size": picture(size=(48, 80)),
        "text again": picture(),
    }


def _motion_requests() -> Mapping[str, Draw]:
    edges = Control(name="edges", image=photo(), scale=0.8)
    return {
        "one window": video(16),
        "windows that overlap": video(20, window=8, overlap=4),
        "prompts by frame": video(16, prompt={0: PROMPT, 15: "a blue square"}),
        "a control": video(16, controls=[edges]),
        "an image": video(16, image=photo(), strength=0.7),
        "one window again": video(16),
    }


def _shown_requests() -> Mapping[str, Draw]:
    plain, plus = (ImagePrompt(name=name, image=photo(), scale=0.8) for name in ("plain", "plus"))
    edges, depth = (Control(name=name, image=photo(), scale=0.7) for name in ("edges", "depth"))
    return {
        "text": picture(),
        "an image prompt": picture(image_prompts=[plain]),
        "two image prompts": picture(image_prompts=[plain, plus]),
        "a control": picture(controls=[edges]),
        "two controls for a while": picture(controls=[edges, depth], n=2),
        "an image prompt and a control": picture(image_prompts=[plus], controls=[edges]),
        "text again": picture(),
    }


def _plain_requests() -> Mapping[str, Draw]:
    return {
        "text": picture(),
        "an image": picture(image=photo(), strength=0.6),
        "a mask": picture(image=photo(), mask=mask()),
        "noise at each step": picture(sampler="euler_ancestral"),
        "text again": picture(),
    }


KINDS: Mapping[str, Kind] = {
    "tiny-sd3": Kind(export=_three, requests=_three_requests),
    "tiny-video": Kind(export=_motion, requests=_motion_requests),
    "tiny-svd": Kind(export=_moving, requests=_moving_requests),
    "tiny-shown": Kind(
        export=lambda folder, bundle: _shown(folder, bundle, "sd1", ("plain", "plus")), requests=_shown_requests
    ),
    "tiny-shown-xl": Kind(
        export=lambda folder, bundle: _shown(folder, bundle, "sdxl", ("plain", "plus")), requests=_shown_requests
    ),
    "tiny-refined": Kind(export=_refined, requests=_plain_requests),
    "tiny-inpainting": Kind(
        export=lambda folder, bundle: _plain(folder, bundle, "sd1", "inpainting"),
        requests=lambda: {name: draw for name, draw in _plain_requests().items() if name == "a mask"},
    ),
    "tiny-lcm": Kind(
        export=lambda folder, bundle: _plain(folder, bundle, "sd1", "lcm"),
        requests=lambda: {"text": picture(), "an image": picture(image=photo(), strength=0.6)},
    ),
    "tiny-sd2": Kind(export=lambda folder, bundle: _plain(folder, bundle, "sd2", ""), requests=_plain_requests),
}


def main() -> None:
    from packed_bundle import pack

    sys.path.insert(0, str(TESTS))
    target = Path(sys.argv[1])
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            kind.export(Path(folder), Path(folder) / "bundle")
            packed = pack(Path(folder) / "bundle", [], target / f"{name}.tar.gz")
        print(f"{packed}: {packed.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
