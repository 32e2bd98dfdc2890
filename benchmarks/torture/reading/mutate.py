"""Changes to bytes, drawn from a generator: of the bytes alone, of a JSON document, or of a safetensors header."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
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
        found += _places(inner, (*path, key))
    return found


def _document(data: bytes, chance: random.Random) -> bytes:
    """Change one place of a JSON document: another value, none, another key, a copy of another place."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return _flip(data, chance)
    places = _places(document)
    *outer, last = chance.choice(places) or (None,)
    parent = document
    for step in outer:
        parent = parent[step]
    if last is None or not isinstance(parent, dict | list):
        return json.dumps(chance.choice(ODD)).encode()
    act = chance.randrange(4)
    if act == 0:
        del parent[last]
    elif act == 1 and isinstance(parent, dict):
        parent[str(chance.choice(ODD))[:200]] = parent.pop(last)
    elif act == 2:
        value: Any = document
        for step in chance.choice(places):
            value = value[step]
        parent[last] = json.loads(json.dumps(value))  # no circle
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
