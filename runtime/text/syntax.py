r"""The syntax of weighted prompts: parts between BREAKs, each a row of segments with a weight.

    (words)      weight 1.1, and 1.21 in ((two)) pairs        [words]   weight 1 / 1.1
    (words:1.3)  weight 1.3; nested weights multiply          BREAK     what follows is encoded on its own
    \( \) \[ \] \: \| \\                                      the sign itself
    <lora:name:0.8>  embedding:name                        refused: both are loaded beside the prompt

These are the rules of the community's interfaces, without their guesses: a bracket that is not closed, a weight that is
no number, and `[from:to:when]` or `[this|that]`, which change a prompt between steps, are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from latentrt.engines.errors import RequestError

Syntax = Literal["plain", "weighted"]

STRONGER = 1.1  # what a pair of round brackets multiplies by, and a pair of square ones divides by
LARGEST_WEIGHT = 100.0  # far above what draws anything; a slip of the finger ends here
# Patterns are compiled when they are first used: most programs never read a weighted prompt.
NUMBER = r"\+?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
# A colon counts where only its own text stands between it and the closing bracket.
SIGN = r"""(?x)
        \\(?P<escaped>[\\()\[\]:|])
      | (?P<open>[(\[])
      | (?::(?P<tail>[^\\:()\[\]|]*))?(?P<close>[)\]])
      | \b(?P<break>BREAK)\b
      | (?P<bar>\|)"""
# What plain prompts hold only if their author meant the other syntax. Short, so that no text makes it slow.
EXPLICIT_WEIGHT = r"\([^()]{1,200}: ?[0-9]{0,2}\.?[0-9]{1,3} ?\)"
# What other interfaces load because the prompt names it, and where it is loaded here.
LOADED = {
    r"<(?:lora|lyco):[^<>]{1,200}>": "LoRAs are given beside the prompt, with "
    "loras=[Lora(file=..., scale=...)] or --lora FILE:SCALE",
    r"<hypernet:[^<>]{1,200}>": "hypernetworks are not supported",
    r"\bembedding:[^\s,:()\[\]]{1,200}": "learned words are loaded beside the prompt, with "
    "pipe.add_embedding(file) or --embedding FILE, and then written without 'embedding:'",
}


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of text with one weight, tokenised on its own."""

    text: str
    weight: float = 1.0


Part = tuple[Segment, ...]
Signs = Sequence[re.Match[str]]


def parse_weighted(text: str) -> tuple[Part, ...]:
    """Split a weighted prompt into its parts, at least one; neighbours of equal weight are one segment.

    White space between segments goes with the one before, so that `(a:0.5) (b:0.5)` is one segment. Parts without
    text are left out. Raises RequestError, which names the character, counted from 1.
    """
    for found, where in loaded_by_name(text):
        raise _error(found.start(), f"'{shorten(found[0])}' loads nothing here: {where}", ":")
    signs = tuple(re.finditer(SIGN, text))
    parts: list[list[Segment]] = [[]]
    for piece in _pieces(text, signs, _factors(signs)):
        if piece is None:
            parts.append([])
        else:
            _append(parts[-1], piece)
    return tuple(tuple(part) for part in parts if any(segment.text.strip() for segment in part)) or ((),)


def loaded_by_name(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Give what a prompt means to load, and where that is loaded instead."""
    for pattern, where in LOADED.items():
        if found := re.search(pattern, text, re.IGNORECASE):
            yield found, where


def _factors(signs: Signs) -> dict[int, float]:
    """Return what each opening bracket multiplies by, by its place among the signs. Raises RequestError."""
    factors: dict[int, float] = {}
    opened: list[int] = []
    for place, sign in enumerate(signs):
        if sign["open"]:
            opened.append(place)
        elif sign["close"]:
            if not opened or signs[opened[-1]]["open"] + sign["close"] not in ("()", "[]"):
                raise _error(sign.start("close"), f"'{sign['close']}' closes no bracket", sign["close"])
            factors[opened.pop()] = _factor(sign)
        elif sign["bar"] and opened and signs[opened[-1]]["open"] == "[":
            raise _error(sign.start(), "'[this|that]' changes the prompt between steps, which cannot be drawn", "|")
    if opened:
        sign = signs[opened[-1]]
        raise _error(sign.start(), f"'{sign['open']}' is never closed", sign["open"])
    return factors


def _factor(sign: re.Match[str]) -> float:
    tail: str | None = sign["tail"]
    if sign["close"] == "]":
        if tail is not None:
            what = (
                "'[from:to:when]' changes the prompt between steps, which cannot be drawn; a weight is (words:weight)"
            )
            raise _error(sign.start(), what, ":")
        return 1 / STRONGER
    if tail is None:
        return STRONGER
    number = tail.strip()
    if not re.fullmatch(NUMBER, number) or not float(number) <= LARGEST_WEIGHT:
        what = f"found the weight '{shorten(number)}', expected a number from 0 to {LARGEST_WEIGHT:g}"
        raise _error(sign.start(), what, ":")
    return float(number)


def shorten(text: str) -> str:
    """Return a text with at most 20 characters, for a sentence."""
    return text if len(text) <= 20 else text[:19] + "…"


def _error(place: int, what: str, sign: str) -> RequestError:
    return RequestError(f"prompt, character {place + 1}: {what}; write \\{sign} for the sign itself")


def _pieces(text: str, signs: Signs, factors: dict[int, float]) -> Iterator[Segment | None]:
    """Give the text between the signs with the product of the brackets around it, None for each BREAK."""
    weights, end = [1.0], 0
    for place, sign in enumerate(signs):
        yield Segment(text=text[end : sign.start()], weight=weights[-1])
        end = sign.end()
        if sign["open"]:
            weights.append(round(weights[-1] * factors[place], 9))  # ([a]) is 1, not almost 1
            if weights[-1] > LARGEST_WEIGHT:
                what = f"nested weights multiply to {weights[-1]:.4g}, more than {LARGEST_WEIGHT:g}"
                raise _error(sign.start(), what, sign["open"])
        elif sign["close"]:
            weights.pop()
        elif sign["break"]:
            yield None
        else:
            yield Segment(text=sign["escaped"] or sign["bar"], weight=weights[-1])
    yield Segment(text=text[end:])


def _append(part: list[Segment], piece: Segment) -> None:
    if not piece.text:
        return
    if part and (not piece.text.strip() or part[-1].weight == piece.weight):
        part[-1] = Segment(text=part[-1].text + piece.text, weight=part[-1].weight)
    else:
        part.append(piece)
