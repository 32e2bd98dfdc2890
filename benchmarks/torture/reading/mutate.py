"""Changes to bytes, drawn from a generator: of the bytes alone, of a JSON document, or of a safetensors header."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
Path = tuple[Any, ...]
"""The keys and numbers that lead to a value of a document."""
BYTES = (b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x80", b"{", b"[", b'"', b"\\u", b"\n", b"<?", b"9" * 30)


def mutate(data: bytes, chance: random.Random, kind: str) -> bytes:
    """Return bytes with one to four changes.

    kind: `bytes`, `json`, `tensors`, or `folder`: a byte that chooses, and JSON behind it
    """
    if kind == "folder":
        first = data[:1] if chance.random() < 0.95 else bytes([chance.randrange(256)])
        return first + mutate(data[1:], chance, "json")
    changes = KINDS[kind]
    held: bytes | Document = data
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        change = chance.choice(changes)
        held = _document(held, chance) if change is _document else change(_written(held), chance)
    return _written(held)


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


def _places(value: Any, path: Path = ()) -> list[Path]:
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


class Document(NamedTuple):
    """A JSON document, which nobody may change, between two changes of its bytes.

    texts: of parts that lie at its top, by their identity: most of them stay as they were
    """

    value: Any
    texts: Mapping[int, str]


@functools.lru_cache(maxsize=64)  # most changes are the first one of a seed
def _parsed(data: bytes) -> tuple[Document, list[Path]]:
    """Return a JSON document, and the path of each value in it. Raises ValueError."""
    value = json.loads(data)
    parts = value.values() if isinstance(value, dict) else ()
    return Document(value, {id(part): json.dumps(part) for part in parts}), _places(value)


def _written(held: bytes | Document) -> bytes:
    """Return bytes, of a document those that `json.dumps` gives."""
    if isinstance(held, bytes):
        return held
    if not isinstance(held.value, dict):
        return json.dumps(held.value).encode()
    parts = (f"{_quoted(key)}: {held.texts.get(id(part)) or json.dumps(part)}" for key, part in held.value.items())
    return f"{{{', '.join(parts)}}}".encode()


_quoted = functools.lru_cache(maxsize=1 << 16)(json.dumps)


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


def _document(held: bytes | Document, chance: random.Random) -> bytes | Document:
    """Change one place of a JSON document: another value, none, another key, a copy of another place."""
    if isinstance(held, bytes):
        try:
            before, places = _parsed(held)
        except (ValueError, RecursionError):
            return _flip(held, chance)
    else:
        before, places = held, _places(held.value)
    *outer, last = chance.choice(places) or (None,)
    value, parent = _copied(before.value, outer)
    if last is None or not isinstance(parent, dict | list):
        return Document(chance.choice(ODD), {})
    act = chance.randrange(4)
    if act == 0:
        del parent[last]
    elif act == 1 and isinstance(parent, dict):
        parent[str(chance.choice(ODD))[:200]] = parent.pop(last)
    elif act == 2:
        parent[last] = _at(before.value, chance.choice(places))
    else:
        parent[last] = chance.choice(ODD)
    return Document(value, before.texts)


def _header(data: bytes, chance: random.Random) -> bytes:
    """Change the header of a safetensors file, with its length in front as it is then."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= len(data) - 8:
        return _flip(data, chance)
    header = _written(_document(data[8 : 8 + length], chance))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


KINDS: dict[str, tuple[Callable[..., Any], ...]] = {
    "bytes": (_flip, _cut, _grow, _repeat),
    "json": (_document, _document, _document, _flip, _cut, _grow, _repeat),
    "tensors": (_header, _header, _header, _flip, _cut, _grow, _repeat),
}
