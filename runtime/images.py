"""Pictures as files: PNG with the settings in the text chunk that the community's tools read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL.PngImagePlugin import PngInfo

from latentrt.engines.bundle import disk_errors

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.runtime.pipeline import Settings

# The names under which other interfaces list the samplers.
COMMUNITY_NAMES = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_karras": "Euler Karras",
    "euler_ancestral": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
}


def save_png(image: Image, path: Path, settings: Settings, seed: int) -> None:
    """Write one picture with its settings, in one step: a killed run leaves no half picture. Raises BundleError."""
    info = PngInfo()
    info.add_itxt("parameters", parameters(settings, seed))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        image.save(beside, format="PNG", pnginfo=info)
        beside.replace(path)


def parameters(settings: Settings, seed: int) -> str:
    """Return the settings as text, in the layout of the `parameters` chunk that A1111's interface introduced."""
    width, height = settings.size
    pairs = {
        "Steps": settings.steps,
        "Sampler": COMMUNITY_NAMES.get(settings.sampler, settings.sampler),
        "CFG scale": f"{settings.guidance:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": settings.model,
        "Version": settings.version,
    }
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items()))
    return "\n".join(lines)
