"""`<lora:name:0.8>` in prompts: taken out, and applied as a LoRA of the service's listing."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

from latentrt.engines.errors import RequestError
from latentrt.runtime.request import Lora

TAG = re.compile(r"<(lora|lyco):([^<>]*)>")
Listing = Mapping[str, "os.PathLike[str]"]
"""the files of LoRAs by their names"""


def take_loras(prompt: str, listing: Listing, *, apply: bool = True) -> tuple[str, list[Lora]]:
    """Return a prompt without its `<lora:name:scale>`, and the LoRAs.

    A scale that is left out is 1; of two, one is for the text encoder and one for the UNet, and they must be the same.
    A LoRA that is named twice has the sum of its scales. apply: whether they are applied, or only taken out
    Raises RequestError on a name that is not in the listing, and a scale that is no number.
    """
    scales: dict[str, float] = {}
    for tag in TAG.finditer(prompt):
        name, *given = tag[2].split(":")
        if name not in listing:
            known = ", ".join(sorted(listing)) or "none"
            raise RequestError(f"prompt: '{tag[0]}' names no LoRA of this service; there are: {known}")
        scales[name] = scales.get(name, 0.0) + _scale(given, tag[0])
    loras = [Lora(file=listing[name], scale=scale) for name, scale in scales.items()]
    return TAG.sub("", prompt), loras if apply else []


def _scale(given: list[str], tag: str) -> float:
    try:
        numbers = {float(one.partition("=")[2] or one) for one in given} or {1.0}
    except ValueError:
        numbers = {math.nan}
    number = next(iter(numbers))
    if len(numbers) > 1 or not math.isfinite(number):
        raise RequestError(f"prompt: found '{tag}', expected one scale that is a number, as in <lora:name:0.8>")
    return number
