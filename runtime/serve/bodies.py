"""Request bodies: read within a limit, and parsed into structs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from latentrt.runtime.serve.web_errors import WebError

T = TypeVar("T")
LONG = 256 * 1024  # bytes that take longer to parse than the event loop has
SHORT, SENTENCE = 64, 300  # characters of a name, and of what a schema says, that a client is told
ABSENT = (  # how msgspec's sentences begin, the error's code, and what is said of the field
    ("Object contains unknown field `", "unknown_parameter", "this service knows no such field"),
    ("Object missing required field `", "missing_required_parameter", "it is missing"),
)
MOST_COMMAS = 100_000  # of texts too; the longest request has a fraction, and each value takes far more than its bytes


async def read_json(request: Request, kind: type[T]) -> T:
    """Read a body as JSON of a kind. Raises WebError: 413, 415, or 400 with the field at fault."""
    if (media := media_type(request)) != "application/json":
        raise WebError(
            f"content-type: found '{media or 'none'}', expected application/json",
            status=415,
            code="unsupported_media_type",
        )
    body = await read(request)
    return parse_json(body, kind) if len(body) < LONG else await asyncio.to_thread(parse_json, body, kind)


def media_type(request: Request) -> str:
    """Return what a body says that it is, without parameters; empty where it says nothing."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read(request: Request) -> bytes:
    """Read a body, of which the guards let no more pass than the service takes."""
    return await request.body()


def parse_json(body: bytes, kind: type[T]) -> T:
    """Parse a body as JSON of a kind. Raises WebError, 400, with the field at fault."""
    if body.count(b",") > MOST_COMMAS:
        raise WebError("the body holds more values than any request has", code="invalid_json")
    try:
        parsed = msgspec.json.decode(body, type=kind)
        plain = json.loads(body, object_pairs_hook=_distinct)
        for name, value in plain.items() if b"\\u0000" in body and isinstance(plain, dict) else ():
            refuse_nul(value, name)
        return parsed
    except msgspec.ValidationError as error:
        raise invalid(error) from error
    except (msgspec.DecodeError, ValueError) as error:  # of which bad UTF-8 is one
        raise WebError("the body is not JSON, or not in UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise WebError("the body is nested more deeply than any request is", code="invalid_json") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, whose names must differ. Raises WebError, 400."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = shortened(next(name for name in names if names.count(name) > 1))
        raise WebError(f"{twice}: found twice, expected once", code="duplicate_field", param=twice)
    return found


def refuse_nul(value: Any, name: str) -> None:
    """Refuse texts with a zero character, which no prompt and no name has. Raises WebError, 400."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, str) and "\0" in value:
        raise WebError(f"{name}: it holds the character NUL; leave it out", param=name)
    for one in inner:
        refuse_nul(one, name)


def invalid(error: msgspec.ValidationError) -> WebError:
    """Return what a body's schema refuses, by its place: `loras[0].scale: Expected float`, whose `param` is `loras`."""
    sentence, _, path = str(error).partition(" - at `")
    place = path.strip("`").removeprefix("$").lstrip(".")
    code, said = "invalid_type", shortened(sentence, SENTENCE)
    for start, its_code, what in ABSENT:
        if sentence.startswith(start):
            name = shortened(sentence.split("`")[1])
            place, code, said = f"{place}.{name}" if place else name, its_code, what
    param = re.split(r"[.\[]", place)[0] or None
    return WebError(f"{place or 'the body'}: {said}", code=code, param=param)


def shortened(text: str, most: int = SHORT) -> str:
    """Return what a client sent, short enough for a sentence."""
    return text if len(text) <= most else f"{text[:most]}…"


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
