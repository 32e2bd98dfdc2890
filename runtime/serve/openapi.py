"""The service's OpenAPI document, made of the structs that its bodies are parsed into and its answers made of."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.requests import Request as WebRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from latentrt import __version__

JSON, FORM, EVENTS = "application/json", "multipart/form-data", "text/event-stream"
REF = "#/components/schemas/{name}"


class ErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong. param: the field at fault; code: for programs"""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to what cannot be done."""

    error: ErrorObject


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """What can be asked at a path.

    body: what is sent; files: of a form, by name; answer: what comes back, None for a file
    events: what a stream is made of, where there may be one
    """

    path: str
    method: Literal["get", "post"]
    summary: str
    answer: Any = None
    body: Any = None
    files: tuple[str, ...] = ()
    events: tuple[Any, ...] = ()
    error: Any = ErrorAnswer


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of some operations."""
    kinds = list({kind: None for one in operations for kind in (one.body, one.answer, one.error, *one.events) if kind})
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REF)
    known = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method] = _described(one, known, components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "latentrt", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _described(one: Operation, known: dict[Any, Any], components: dict[str, Any]) -> dict[str, Any]:
    answers = {JSON: {"schema": known[one.answer]}} if one.answer else {}
    if one.events:
        answers[EVENTS] = {
            "schema": {"type": "string", "description": "events of: " + ", ".join(map(_name, one.events))}
        }
    described: dict[str, Any] = {
        "summary": one.summary,
        "responses": {
            "200": {"description": "what was asked for", **({"content": answers} if answers else {})},
            "default": {"description": "an error", "content": {JSON: {"schema": known[one.error]}}},
        },
    }
    if one.body:
        sent = {FORM: _form(one, components)} if one.files else {JSON: known[one.body]}
        content = {media: {"schema": schema} for media, schema in sent.items()}
        described["requestBody"] = {"required": True, "content": content}
    names = [part[1:-1] for part in one.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return described


def _form(one: Operation, components: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a form: the texts, and the files beside them, of which the first is needed."""
    form: dict[str, Any] = copy.deepcopy(components[_name(one.body)])
    files: dict[str, Any] = {
        name: {"type": "array", "items": {"type": "string", "format": "binary"}}
        if name.endswith("[]")
        else {"type": "string", "format": "binary"}
        for name in one.files
    }
    form["properties"] |= files
    form["required"] = [*form.get("required", ()), one.files[0]]
    return form


def _name(kind: Any) -> str:
    return str(kind.__name__)


def route() -> Route:
    """Return the route of the document."""
    return Route("/openapi.json", show, methods=["GET"])


async def show(web: WebRequest) -> Response:
    """Give the document of the operations that the app's state names."""
    return JSONResponse(document(web.app.state.operations))
