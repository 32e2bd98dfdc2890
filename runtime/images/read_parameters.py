"""Settings out of a picture's text: what `write_png` wrote, or A1111's interface and those that write as it does."""

from __future__ import annotations

import io
import json
import re

import msgspec
from PIL import Image

from latentrt.engines.errors import RequestError
from latentrt.runtime.images.jpeg_parts import is_endless
from latentrt.runtime.sampling.catalogue import find

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 8192 * 8192
EXIF, USER_COMMENT = 0x8769, 0x9286  # where a JPEG or WebP holds what a PNG has in its chunk
CODES = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}
PAIR = re.compile(r'\s*([\w][\w /+.-]*): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
LONGEST = 2**64  # of seeds, and of what JSON is written with
NEGATIVE = "Negative prompt: "
LORA = re.compile(r"(\S.*?):(-?[\d.]+(?:e[+-]?\d+)?)(?:\s+|$)")


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What a picture's text says that it was drawn with; None where it does not say it, or nothing that is known here.

    text: as it was found; size: (width, height); loras: (file's name, scale); pairs: all of the last line, by name
    """

    text: str
    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    strength: float | None = None
    model: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    pairs: dict[str, str] = {}


def read_text(file: bytes) -> str | None:
    """Return the settings' text of a PNG, JPEG or WebP, None if it has none; no pixel is decoded.

    Raises RequestError on what is no such picture, or says that it has more pixels or parts than any.
    """
    if is_endless(file):
        raise RequestError("image: it has more segments or scans than any picture")
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            pixels = image.width * image.height
            text = image.info.get("parameters")
            if text is None and image.format != "PNG":
                text = _comment(image.getexif().get_ifd(EXIF).get(USER_COMMENT))
    except Exception as error:  # Pillow raises whatever its parsers meet
        raise RequestError("image: this is not a PNG, JPEG or WebP that can be read") from error
    if pixels > MOST_PIXELS:
        raise RequestError(f"image: it has {pixels} pixels, and at most {MOST_PIXELS} are read")
    return str(text) if isinstance(text, str) else None  # a plain one: Pillow gives a kind of its own


def _comment(value: object) -> str | None:
    if not isinstance(value, bytes):
        return None
    return value[8:].decode(CODES.get(value[:8], "utf-8"), errors="replace")


def parse(text: str) -> Written:
    """Return what a text says. It never fails: a text without settings is a prompt."""
    lines = text.split("\n")
    pairs = _pairs(lines[-1]) if len(lines) > 1 else {}
    body = lines[:-1] if "Steps" in pairs else lines
    pairs = pairs if "Steps" in pairs else {}
    start = next((number for number, line in enumerate(body) if line.startswith(NEGATIVE)), len(body))
    negative = "\n".join(body[start:]).removeprefix(NEGATIVE) if start < len(body) else None
    return Written(
        text=text,
        prompt="\n".join(body[:start]),
        negative_prompt=negative,
        steps=_whole(pairs.get("Steps")),
        sampler=_sampler(pairs),
        guidance=_number(pairs.get("CFG scale")),
        seed=_whole(pairs.get("Seed")),
        size=_size(pairs.get("Size")),
        strength=_number(pairs.get("Denoising strength")),
        model=pairs.get("Model"),
        loras=tuple((name, float(scale)) for name, scale in LORA.findall(pairs.get("Loras", ""))),
        pairs=pairs,
    )


def _pairs(line: str) -> dict[str, str]:
    return {name.strip(): _unquoted(value.strip()) for name, value in PAIR.findall(line)}


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _sampler(pairs: dict[str, str]) -> str | None:
    """Return the canonical name; newer interfaces write the spacing beside the sampler, as `Schedule type`."""
    schedule = pairs.get("Schedule type", "")
    for name in (f"{pairs.get('Sampler', '')} {schedule}", pairs.get("Sampler", "")):
        try:
            return str(find(name))
        except RequestError:
            continue
    return None


def _whole(text: str | None) -> int | None:
    found = int(text) if text is not None and re.fullmatch(r"\d{1,20}", text, re.ASCII) else LONGEST
    return found if found < LONGEST else None


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", text, re.ASCII) else None


def _size(text: str | None) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text or "", re.ASCII)
    return (int(found[1]), int(found[2])) if found else None
