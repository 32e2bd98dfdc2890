"""Request bodies: read within a limit, and parsed into structs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from latentrt.runtime.serve.web_errors import WebError

T = TypeVar("T")


async def read_json(request: Request, kind: type[T]) -> T:
    """Read a body as JSON of a kind. Raises WebError: 413, 415, or 400 with the field at fault."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise WebError(
            f"content-type: found '{media or 'none'}', expected application/json",
            status=415,
            code="unsupported_media_type",
        )
    return parse_json(await read(request), kind)


async def read(request: Request) -> bytes:
    """Read a body. Raises WebError, 413, where it is longer than the service takes, without reading all of it."""
    most, body = request.app.state.models.options.limits.body_bytes, bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise WebError(
                f"the body has more than the {most} bytes that may be sent", status=413, code="body_too_large"
            )
    return bytes(body)


def parse_json(body: bytes, kind: type[T]) -> T:
    """Parse a body as JSON of a kind. Raises WebError, 400, with the field at fault."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise invalid(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WebError(f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise WebError("the body is nested more deeply than any request is", code="invalid_json") from error


def invalid(error: msgspec.ValidationError) -> WebError:
    """Return what a body's schema refuses, by its field: `size: Expected str`."""
    sentence, _, place = str(error).partition(" - at `")
    if sentence.startswith("Object contains unknown field `"):
        name = sentence.split("`")[1]
        return WebError(f"{name}: this service knows no such field", code="unknown_parameter", param=name)
    param = place.strip("`").removeprefix("$").lstrip(".") or None
    return WebError(f"{param or 'the body'}: {sentence}", code="invalid_type", param=param)


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for work, and end it where the client goes away. Raises ClientDisconnect, and what the work raises."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientDisconnect
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
