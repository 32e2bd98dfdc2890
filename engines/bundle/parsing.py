"""JSON documents, strictly: what msgspec does not refuse, and the path of what it does."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

# A step of a path: into a field, into an item, into the value of some key.
STEP = r"\.(?P<name>\w+)|\[(?P<index>\d+)\]|\[\.\.\.\]"
FIELD = r"(?s)Object (?:contains )?(?P<fault>unknown field|missing required field) `(?P<name>.*)`"
CHOICE = "Invalid enum value "
LONGEST = 400


class ParseError(ValueError):
    """What was found at a path of the document, and what was expected there."""


def parse(kind: type[T], document: Any) -> T:
    """Turn decoded JSON into a `Document` or a dataclass. One that is refused is spent: it keeps what was at fault.

    Raises ParseError, which names the path, what was found and what was expected.
    """
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise ParseError(brief(_tell(kind, document, *_fault(error)))) from None


def brief(text: str) -> str:
    """Return a sentence that says what a document holds: printable, and without its middle where it is long."""
    plain = text if text.isprintable() else repr(text)[1:-1]
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST // 2]}…{plain[-LONGEST // 2 :]}"


def _tell(kind: type[Any], document: Any, sentence: str, path: str) -> str:
    """Return a fault with its whole path, and with what was expected."""
    spelled = _spell(kind, document, path)
    if field := re.fullmatch(FIELD, sentence):
        return f"{spelled}.{field['name']}: {field['fault']}"
    if sentence.startswith(CHOICE):
        schema = msgspec.json.schema(kind)
        choices = _choices(schema, schema["$defs"], list(re.finditer(STEP, path)))
        return f"{spelled}: found {sentence.removeprefix(CHOICE)}, expected one of {', '.join(map(str, choices))}"
    return f"{spelled}: {sentence[0].lower()}{sentence[1:]}"


def _choices(part: dict[str, Any], parts: dict[str, Any], steps: list[re.Match[str]]) -> list[object]:
    """Return what a part of a schema allows at the end of some steps into it."""
    if "$ref" in part:
        return _choices(parts[part["$ref"].rpartition("/")[2]], parts, steps)
    if "anyOf" in part:
        return [choice for one in part["anyOf"] if one != {"type": "null"} for choice in _choices(one, parts, steps)]
    if not steps:
        choices: list[object] = part.get("enum", [])
        return choices
    step, *rest = steps
    within = part["properties"] if step["name"] else part
    inner = within[step["name"] or ("items" if step["index"] else "additionalProperties")]
    return _choices(inner, parts, rest)


def _fault(error: msgspec.ValidationError) -> tuple[str, str]:
    """Return msgspec's sentence, and the path that ends it where it is not the whole document's."""
    sentence, at, path = str(error).rpartition(" - at `$")
    return (sentence, path.removesuffix("`")) if at else (path, "")


def _spell(kind: type[Any], document: Any, path: str) -> str:
    """Return a path with its keys: msgspec says `$.components[...].role` of whichever component.

    Each mapping is left with one key after the other, until what is left is refused at that path too.
    """
    spelled, here = "$", document
    for step in re.finditer(STEP, path):
        if step["name"]:
            spelled, here = f"{spelled}.{step['name']}", here[step["name"]]
        elif step["index"]:
            spelled, here = f"{spelled}[{step['index']}]", here[int(step["index"])]
        else:
            key = _key_at_fault(kind, document, path, here)
            spelled, here = f"{spelled}.{key}", here[key]
    return spelled


def _key_at_fault(kind: type[Any], document: Any, path: str, mapping: dict[str, Any]) -> str:
    whole = dict(mapping)
    for key, value in whole.items():
        mapping.clear()
        mapping[key] = value
        try:
            msgspec.convert(document, kind)
        except msgspec.ValidationError as error:
            if _fault(error)[1] == path:
                return key
    raise AssertionError(path)


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a `Document` and of all that it holds; docstrings are the descriptions."""
    import inspect

    schema = msgspec.json.schema(kind)
    for part in schema["$defs"].values():
        part["description"] = inspect.cleandoc(part["description"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


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
        raise ParseError("is nested too deeply") from None
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
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice in one object")
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
