"""Whether a backend draws the pictures that the CPU's engines of a bundle draw: every kind of request, end to end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gpu_kinds import KINDS, Draw, picture

from latentrt.engines.spec import Array
from latentrt.export.checkpoint import DEMO
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Lora

PROMPTS = ("a large red circle on a striped blue background", "a medium yellow star on a plain purple background")
COMMON: Mapping[str, Any] = {"steps": 8, "guidance": 3.0, "seed": 7, "sampler": "dpmpp_2m_karras"}
SIDE = 128
LARGEST = 4.0  # levels of 255, the mean over a picture: float16 against float32 after eight steps
RANK = 4
CHANGED = (  # layers of the demo's UNet that the LoRA changes
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.resnets.0.conv1",
)


def requests(folder: Path) -> dict[str, dict[str, Any]]:
    """Return a request of each kind: with text, images, masks, other sizes, LoRAs, and the base again after them."""
    across = np.linspace(0, 255, SIDE).astype(np.uint8)
    image = np.stack(
        [np.tile(across, (SIDE, 1)), np.tile(across[:, None], (1, SIDE)), np.full((SIDE, SIDE), 90, np.uint8)], 2
    )
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[32:96, 32:96] = 255
    lora = write_lora(folder / "changes.safetensors")
    return {
        "text": {},
        "three of two prompts": {"prompt": list(PROMPTS), "n": 3},
        "without guidance": {"guidance": 1.0},
        "guidance in the middle": {"guidance_interval": (0.25, 0.75)},
        "noise at each step": {"sampler": "euler_ancestral"},
        "two evaluations a step": {"sampler": "heun"},
        "another size": {"size": (96, 160)},
        "a long prompt": {"prompt": ", ".join(PROMPTS * 6)},
        "an image": {"image": image, "strength": 0.6},
        "a mask": {"image": image, "mask": mask},
        "a LoRA": {"loras": [Lora(file=lora, scale=2.0)]},
        "two LoRAs": {"loras": [Lora(file=lora, scale=0.5), Lora(file=lora, scale=-1.0)]},
        "text again": {},
    }


def write_lora(path: Path) -> Path:
    """Write a random LoRA for the demo's UNet, in PEFT's names."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    numbers, tensors = np.random.default_rng(3), dict[str, Array]()
    with safe_open(str(DEMO / "unet" / "diffusion_pytorch_model.safetensors"), "np") as weights:
        for layer in CHANGED:
            out, *into = weights.get_slice(f"{layer}.weight").get_shape()
            down, up = (RANK, *into), (out, RANK, *[1] * (len(into) - 1))
            for role, shape in (("A", down), ("B", up)):
                spread = 1.5 / np.sqrt(np.prod(shape[1:]))
                values = numbers.normal(0, spread, shape).astype(np.float32)
                tensors[f"unet.{layer}.lora_{role}.weight"] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def requests_of(bundle: str, folder: Path) -> Mapping[str, Draw]:
    """Return what is drawn with a bundle of that name."""
    if bundle in KINDS:
        return KINDS[bundle].requests()
    return {
        name: picture(**{"prompt": PROMPTS[0], "size": (SIDE, SIDE), **COMMON, **asked})
        for name, asked in requests(folder).items()
    }


def draw_all(
    root: str, backend: str, requests: Mapping[str, Draw], *, cuda_graphs: bool | None = None
) -> dict[str, Any]:
    """Draw every request. Returns the pictures of each, (n, height, width, 3), or what went wrong with it, as text."""
    drawn: dict[str, Any] = {}
    with Pipeline.load(root, backend, cuda_graphs=cuda_graphs, check="size") as pipe:
        for name, draw in requests.items():
            try:
                drawn[name] = draw(pipe)
            except Exception as error:  # every other request is drawn all the same
                drawn[name] = f"{type(error).__name__}: {error}"
    return drawn


def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare pictures of two ways to draw: mean and largest difference in levels of 255, and whether it is small."""
    return {name: _compare(expected[name], found[name]) for name in expected}


def _compare(expected: Any, found: Any) -> dict[str, Any]:
    wrong = [each for each in (expected, found) if isinstance(each, str)]
    if wrong or expected.shape != found.shape:
        return {"ok": False, "error": "; ".join(wrong) or f"found {found.shape}, expected {expected.shape}"}
    distance = np.abs(expected.astype(np.int16) - found.astype(np.int16))
    mean = float(distance.mean(axis=(1, 2, 3)).max())
    return {"ok": mean <= LARGEST, "mean": mean, "largest": int(distance.max())}


def unlike(drawn: Mapping[str, Any], first: str, second: str) -> float | None:
    """Return the mean difference of two requests' pictures; None where one was not drawn or is of another size."""
    found: float | None = _compare(drawn[first], drawn[second]).get("mean")
    return found
