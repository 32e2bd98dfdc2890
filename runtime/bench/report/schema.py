"""The JSON Schema of a result, read off the dataclasses: one source for code, file and documentation."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}


def json_schema(kind: type) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a frozen dataclass and of all that it holds.

    Every field is required and nothing else is allowed; the docstrings are the descriptions.
    """
    definitions: dict[str, Any] = {}
    root = _schema(kind, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _reference(kind, definitions)
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(one, definitions) for one in get_args(kind)]}
    if origin is tuple:  # every one here is of one kind and any length
        return {"type": "array", "items": _schema(get_args(kind)[0], definitions)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema(get_args(kind)[1], definitions)}
    return {"type": SCALARS[kind]}


def _reference(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # taken, before its own fields ask for it
        hints = typing.get_type_hints(kind)
        fields = [field.name for field in dataclasses.fields(kind)]
        definitions[name] = {
            "type": "object",
            "description": inspect.getdoc(kind),
            "properties": {field: _schema(hints[field], definitions) for field in fields},
            "required": fields,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}
