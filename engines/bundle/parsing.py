"""JSON into frozen dataclasses, strictly: an unknown key, a missing key or a wrong type is an error with its path."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 61


class ParseError(ValueError):
    """What was found at a path of the document, and what was expected there."""


def parse(kind: type[T], value: object, where: str = "$") -> T:
    """Turn decoded JSON into an instance of a frozen dataclass.

    Supports nested dataclasses, `tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, X]`, `Literal`, unions and scalars.
    Raises ParseError, which names the path, what was found and what was expected.
    """
    return typing.cast(T, _parse(kind, value, where))


def _parse(kind: Any, value: object, where: str) -> object:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is Literal:
        return _literal(get_args(kind), value, where)
    if origin in (Union, types.UnionType):
        return _union(get_args(kind), value, where)
    if origin is tuple:
        return _tuple(get_args(kind), value, where)
    if origin is Mapping:
        return _mapping(get_args(kind)[1], value, where)
    return _scalar(kind, value, where)


def _dataclass(kind: Any, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise _unexpected(value, "an object", where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ParseError(f"{where}.{name}: unknown key, expected one of {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    parsed = {}
    for name, field in fields.items():
        if name in value:
            parsed[name] = _parse(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ParseError(f"{where}.{name}: missing")
    return kind(**parsed)


def _literal(choices: tuple[object, ...], value: object, where: str) -> object:
    if value not in choices or type(value) not in {type(choice) for choice in choices}:
        raise _unexpected(value, "one of " + ", ".join(map(str, choices)), where)
    return value


def _union(kinds: tuple[Any, ...], value: object, where: str) -> object:
    if value is None and types.NoneType in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is types.NoneType:
            continue
        try:
            return _parse(kind, value, where)
        except ParseError as error:
            errors.append(error)
    raise (errors[0] if len(errors) == 1 else _unexpected(value, " or ".join(_name(kind) for kind in kinds), where))


def _tuple(kinds: tuple[Any, ...], value: object, where: str) -> object:
    if not isinstance(value, list):
        raise _unexpected(value, "a list", where)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _unexpected(value, f"a list of {len(kinds)}", where)
    return tuple(_parse(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _mapping(kind: Any, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise _unexpected(value, "an object", where)
    return {str(name): _parse(kind, item, f"{where}.{name}") for name, item in value.items()}


def _scalar(kind: Any, value: object, where: str) -> object:
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise _unexpected(value, "a number that a float can hold", where) from None
    if type(value) is not kind:  # exact: True is not an int here
        raise _unexpected(value, _name(kind), where)
    return value


def _name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, "nothing" if kind is types.NoneType else str(getattr(kind, "__name__", kind)))


def _unexpected(value: object, expected: str, where: str) -> ParseError:
    found = _BRIEF.repr(value)  # to a few levels: a document may be nested as deeply as Python recurses
    return ParseError(f"{where}: found {found if len(found) <= 60 else found[:57] + '…'}, expected {expected}")


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
