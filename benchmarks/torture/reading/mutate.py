"""Changes to bytes, drawn from a generator: of the bytes alone, of a JSON document, or of a safetensors header."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "\x00",
    "../../../etc/passwd",
    "/etc/passwd",
    "a" * 5000,
    "\ud800",
    "é",
    [],
    {},
    [[]],
    [None],
    {"": {}},
    {"a": 1},
)
BYTES = (b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x80", b"{", b"[", b'"', b"\\u", b"\n", b"<?", b"9" * 30)


def mutate(data: bytes, chance: random.Random, kind: str) -> bytes:
    """Return bytes with one to four changes.

    kind: `bytes`, `json`, `tensors`, or `folder`: a byte that chooses, and JSON behind it
    """
    if kind == "folder":
        first = data[:1] if chance.random() < 0.95 else bytes([chance.randrange(256)])
        return first + mutate(data[1:], chance, "json")
    changes = KINDS[kind]
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(changes)(data, chance)
    return data


def _flip(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return bytes([chance.randrange(256)])
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _cut(data: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + data[last:] if chance.random() < 0.5 else data[:first]


def _grow(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(BYTES) * chance.choice((1, 1, 2, 100)) + data[at:]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    first = chance.randrange(len(data) + 1)
    last = min(len(data), first + chance.choice((1, 4, 64, 1024)))
    at = chance.randrange(len(data) + 1)
    return data[:at] + data[first:last] * chance.choice((1, 2)) + data[at:]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        pairs: Any = value.items()
    else:
        pairs = enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        if len(found) > 2000:
            break
        place = (*path, key)
        found += _places(inner, place) if isinstance(inner, dict | list) else [place]
    return found


@functools.lru_cache(maxsize=64)  # most changes are the first one of a seed
def _parsed(data: bytes) -> tuple[Any, list[tuple[Any, ...]]]:
    """Return a JSON document, which nobody may change, and the path of each value in it. Raises ValueError."""
    document = json.loads(data)
    return document, _places(document)


def _at(document: Any, path: Sequence[Any]) -> Any:
    for step in path:
        document = document[step]
    return document


def _copied(document: Any, path: Sequence[Any]) -> tuple[Any, Any]:
    """Copy a document as far as what lies at a path may be changed. Return the copy, and its part at the path."""
    copy = document.copy() if isinstance(document, dict | list) else document
    if not path:
        return copy, copy
    copy[path[0]], part = _copied(document[path[0]], path[1:])
    return copy, part


def _document(data: bytes, chance: random.Random) -> bytes:
    """Change one place of a JSON document: another value, none, another key, a copy of another place."""
    try:
        document, places = _parsed(data)
    except (ValueError, RecursionError):
        return _flip(data, chance)
    *outer, last = chance.choice(places) or (None,)
    document, parent = _copied(document, outer)
    if last is None or not isinstance(parent, dict | list):
        return json.dumps(chance.choice(ODD)).encode()
    act = chance.randrange(4)
    if act == 0:
        del parent[last]
    elif act == 1 and isinstance(parent, dict):
        parent[str(chance.choice(ODD))[:200]] = parent.pop(last)
    elif act == 2:
        parent[last] = _at(_parsed(data)[0], chance.choice(places))
    else:
        parent[last] = chance.choice(ODD)
    return json.dumps(document).encode()


def _header(data: bytes, chance: random.Random) -> bytes:
    """Change the header of a safetensors file, with its length in front as it is then."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        return _flip(data, chance)
    header = _document(data[8 : 8 + length], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


Change = Callable[[bytes, random.Random], bytes]
KINDS: dict[str, tuple[Change, ...]] = {
    "bytes": (_flip, _cut, _grow, _repeat),
    "json": (_document, _document, _document, _flip, _cut, _grow, _repeat),
    "tensors": (_header, _header, _header, _flip, _cut, _grow, _repeat),
}
