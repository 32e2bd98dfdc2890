"""Multipart forms: text fields become a struct as JSON's would, files stay bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from latentrt.runtime.serve.bodies import invalid, media_type, refuse_nul
from latentrt.runtime.serve.web_errors import WebError

T = TypeVar("T")
FILES, FIELDS, FIELD_BYTES = 17, 64, 64 * 1024  # sixteen images and a mask; every field once, and short lists
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
NAME = re.compile(r"(\w+)(\[\])?(?:\[(\w+)\])?")


class Form(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a form holds, by name: texts, lists of texts and of objects as clients write them; and files."""

    fields: Mapping[str, Any]
    files: Mapping[str, list[bytes]]

    def parse(self, kind: type[T]) -> T:
        """Return its texts as a struct: `true`, `3` and `null` mean what they mean in JSON. Raises WebError, 400."""
        try:
            parsed = msgspec.convert(self.fields, kind, strict=False)
        except msgspec.ValidationError as error:
            raise invalid(error) from error
        for name, value in _numbers(msgspec.to_builtins(parsed)):
            if not math.isfinite(value):
                raise WebError(f"{name}: found {value}, expected a finite number", code="invalid_type", param=name)
        return parsed


class _Parser(MultiPartParser):
    """Starlette's parser, which is told of a form's end but does not ask for one."""

    ended = False

    def on_end(self) -> None:
        """Note the end."""
        self.ended = True


async def read_form(web: Request) -> Form:
    """Read a multipart form within the limits. Raises WebError: 413, 415 or 400."""
    if (media := media_type(web)) != "multipart/form-data":
        raise WebError(
            f"content-type: found '{media or 'none'}', expected multipart/form-data",
            status=415,
            code="unsupported_media_type",
        )
    parser = _Parser(web.headers, web.stream(), max_files=FILES, max_fields=FIELDS, max_part_size=FIELD_BYTES)
    try:
        charset = parse_options_header(web.headers["content-type"])[1].get(b"charset", CHARSETS[0])
        if charset.lower() not in CHARSETS:  # any of Python's codecs would be taken: some make texts that are none
            raise WebError("content-type: found another charset, expected utf-8", code="invalid_form")
        data = await parser.parse()
    except MultiPartException as error:
        raise WebError(f"the form cannot be read: {error.message}", code="invalid_form") from error
    except (UnicodeError, ValueError) as error:  # of headers that are no text
        raise WebError("the form cannot be read: its headers are damaged", code="invalid_form") from error
    if not parser.ended:
        await data.close()
        raise WebError("the form cannot be read: it ends in the middle", code="invalid_form")
    try:
        texts: dict[str, list[str]] = {}
        files: dict[str, list[bytes]] = {}
        for name, value in data.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name, []).append(await value.read())
            else:
                texts.setdefault(name, []).append(value)
    finally:
        await data.close()
    return Form(fields=nested(texts), files=files)


def nested(texts: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return form fields as JSON would have them: `steps`, `sigmas[]`, `loras[][name]`. Raises WebError, 400."""
    fields: dict[str, Any] = {}
    columns: dict[str, dict[str, list[str]]] = {}
    for key, values in texts.items():
        found = NAME.fullmatch(key)
        name, listed, inner = found.groups() if found else (key, None, None)
        refuse_nul(values, name)
        if inner is not None:
            columns.setdefault(name, {})[inner] = values
        elif listed is None and len(values) > 1:
            raise WebError(f"{name}: found {len(values)} times, expected once", code="duplicate_field", param=name)
        else:
            fields[name] = values if listed else values[0]
    for name, by_field in columns.items():
        if len(set(map(len, by_field.values()))) > 1 or name in fields:
            raise WebError(f"{name}: its objects do not all have the same fields; give each of them all", param=name)
        rows = zip(*by_field.values(), strict=True)
        fields[name] = [dict(zip(by_field, row, strict=True)) for row in rows]
    return fields


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Give every float of nested lists and objects, with the field of the outermost that it is in."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, name or key)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, name)
