"""Pictures as files: PNG with the settings in the text chunk that the community's tools read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentrt.engines.bundle.files import atomic_write, disk_errors
from latentrt.runtime.sampling.catalogue import OWN, SAMPLERS, find

if TYPE_CHECKING:
    from latentrt.runtime.result import Settings


def save_png(image: Image.Image, path: Path, settings: Settings, seed: int) -> None:
    """Write one picture with its settings, in one step: a killed run leaves no half picture. Raises BundleError."""
    with disk_errors(path), atomic_write(path) as beside, beside.open("wb") as file:
        encode_png(image, file, parameters(settings, seed))


def encode_png(image: Image.Image, file: IO[bytes], text: str | None) -> None:
    """Write a picture as PNG, with its settings as `parameters` writes them; None for none.

    zlib looks for runs of one byte alone, not for what was there before: in a quarter of the time of Pillow's own
    setting, and up to a ninth larger (docs/figures.md). Safe to use from many threads, which run side by side.
    """
    info = PngInfo()
    if text is not None:
        info.add_itxt("parameters", text)
    image.save(file, format="PNG", pnginfo=info, compress_level=1, compress_type=Image.RLE)


def parameters(settings: Settings, seed: int) -> str:
    """Return the settings as text, in the layout of the `parameters` chunk that A1111's interface introduced."""
    width, height = settings.size
    pairs = {
        "Steps": settings.steps,
        "Sampler": _plain(community_name(settings.sampler)),
        "CFG scale": f"{settings.guidance:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
        **{_title(name): _plain(value) for name, value in settings.further.items()},
        "Model": _plain(settings.model),
        "Version": settings.version,
    }
    lines = [settings.prompt]
    if settings.negative_prompt is not None:  # an empty one is not the same as none, see `Request`
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items()))
    return "\n".join(lines)


def _title(name: str) -> str:
    return {"strength": "Denoising strength"}.get(name, name.replace("_", " ").capitalize())


def _plain(value: object) -> str:
    if isinstance(value, list):
        return _plain(" ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    # As that interface does: what would end its pair is quoted.
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,"\n]', text) else text


def community_name(sampler: str) -> str:
    """Return the name under which other interfaces list a sampler, e.g. `DPM++ 2M Karras`."""
    name = find(sampler.removeprefix(f"{OWN}:"))
    return f"{SAMPLERS[name.sampler].title} {(name.spacing or '').capitalize()}".strip()
