"""What a body of the Images API asks of the runtime."""

from __future__ import annotations

import re
from typing import Any

from latentrt.runtime.request import Request
from latentrt.runtime.serve.openai.schema import Drawing
from latentrt.runtime.serve.options import Limits
from latentrt.runtime.serve.web_errors import WebError

OWN = ("negative_prompt", "seed", "steps", "guidance", "sampler", "deadline")  # named alike in a `Request`


def request_of(body: Drawing, limits: Limits, **further: Any) -> Request:
    """Return the request of a body. Raises WebError on more than the limits allow, before any work is done.

    further: fields that come from elsewhere, such as images
    """
    count = 1 if body.n is None else body.n
    if not 1 <= count <= limits.pictures:
        raise WebError(f"n: found {count}, expected 1 to {limits.pictures}", param="n")
    if body.steps is not None and body.steps > limits.steps:
        raise WebError(f"steps: found {body.steps}, expected at most {limits.steps}", param="steps")
    own = {name: value for name in OWN if (value := getattr(body, name)) is not None}
    return Request(prompt=body.prompt, n=count, size=size_of(body.size, limits), **own, **further)


def size_of(text: str | None, limits: Limits) -> tuple[int, int] | None:
    """Return width and height of `512x768`; None for the model's own, for which `auto` stands too. Raises WebError."""
    if text is None or text == "auto":
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise WebError(f"size: found '{text}', expected WIDTHxHEIGHT in pixels, as in 512x768", param="size")
    width, height = int(found[1]), int(found[2])
    if width * height > limits.pixels:
        raise WebError(f"size: {text} is more than the {limits.pixels} pixels that may be drawn", param="size")
    return width, height
