"""JSON documents as they come from a disk or a store: whatever bytes they are, the only error is a ParseError."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.parsing import ParseError

LARGEST_NUMBER = 2**63  # of sizes, offsets and ids


def read_document(path: Path, *, strict: bool) -> object:
    """Return what a JSON file says. strict, raises: as in `decode`"""
    return decode(read_content(path), strict=strict)


def read_content(path: Path) -> bytes:
    """Return a file's bytes. Raises ParseError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ParseError(f"cannot be read ({error.strerror})") from None


def decode(content: bytes | str, *, strict: bool) -> object:
    """Return what a JSON document says.

    strict: for what we wrote ourselves: no key twice, and no number that is not finite or too large for 64 bits.
        Other people's documents have these: a scheduler of diffusers is saved with -Infinity, a tokenizer with 1e30.
    Raises ParseError, whose sentence follows the document's name.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        document = json.loads(text, **(_STRICT if strict else {}))
        if "\\ud" in text.lower():  # half a surrogate pair can neither be printed nor name a file
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ParseError("is not JSON that is known here: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ParseError("is not text in UTF-8") from None
    except UnicodeEncodeError:
        raise ParseError("holds half a character (a lone surrogate)") from None
    except ValueError as error:
        raise ParseError(f"is not JSON ({error})") from None
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _whole(text: str) -> int:
    number = int(text)
    if abs(number) >= LARGEST_NUMBER:
        raise ValueError(f"the number {text[:20]}… is too large")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _unique,
    "parse_constant": _finite,
    "parse_float": _finite,
    "parse_int": _whole,
}
