"""Whatever is sent to the service, it answers: never with an error of its own, and in the form that is documented."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as some
from PIL import Image
from schemathesis import GenerationMode
from starlette.types import ASGIApp, Message

from latentrt.runtime.serve.a1111.schema import Img2Img, PngInfo, Txt2Img
from latentrt.runtime.serve.a1111.settings import FIXED
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.openai.schema import Edit, Generation
from latentrt.runtime.serve.options import Limits, ServeOptions

QUICK, LONG, PARTS = 200, 40_000, 10
Call = tuple[str, str, bytes, dict[str, str], bool]
"""method, path, body, headers, and whether it has a deadline, which may pass"""
A1111_FORM = {"error", "detail", "body", "errors"}
OPENAI_FORM = {"message", "type", "param", "code"}
ROUTES = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/sdapi/v1/png-info",
    "/sdapi/v1/options",
    "/sdapi/v1/interrupt",
)
READ = ("/v1/models", "/v1/models/tiny", "/sdapi/v1/progress", "/sdapi/v1/samplers", "/sdapi/v1/options", "/nope")


class Answer(msgspec.Struct, frozen=True):
    status: int
    headers: dict[str, str]
    body: bytes


class Service:
    """An application that is called directly, on an event loop of its own: a thousand calls a second."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._runner = app, asyncio.Runner()

    def __call__(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, query: str = ""
    ) -> Answer:
        return self._runner.run(self._call(method, path, body, {"host": "127.0.0.1:8000"} | (headers or {}), query))

    async def _call(self, method: str, path: str, body: bytes, headers: dict[str, str], query: str) -> Answer:
        sent: list[Message] = []
        left = [{"type": "http.request", "body": body[:100], "more_body": True}]
        left += [{"type": "http.request", "body": body[100:], "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if left:
                return left.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode("latin-1", "replace"),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()],
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8000),
        }
        try:
            await asyncio.wait_for(self._app(scope, receive, send), 60)
        finally:
            gone.set()
        start = next(message for message in sent if message["type"] == "http.response.start")
        found = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
        whole = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
        return Answer(start["status"], found, whole)

    def close(self) -> None:
        self._runner.close()


@pytest.fixture(scope="module")
def service(sd1_bundle: Path) -> Iterator[Service]:
    limits = Limits(pixels=64 * 64, steps=2, pictures=2, body_bytes=2**20)
    loading = {"backend": "cpu", "threads": 1}
    with Models({"tiny": sd1_bundle}, ServeOptions(slots=4, aliases={"gpt": "tiny"}, limits=limits), loading) as models:
        service = Service(build(models))
        yield service
        service.close()


def check(answer: Answer, path: str, *, deadline: bool = False) -> None:
    """Assert that an answer is none of the service's own errors, and in the form of its path."""
    assert answer.status < 500 or (deadline and answer.status == 504), answer
    assert "x-request-id" in answer.headers
    if answer.status < 400:
        return
    found = json.loads(answer.body)
    if path.startswith("/sdapi/"):
        assert set(found) == A1111_FORM, answer
    else:
        assert set(found) == {"error"} and set(found["error"]) == OPENAI_FORM, answer
        assert all(isinstance(found["error"][name], str) for name in ("message", "type", "code")), answer


# --- what is sent ---


def picture(mode: str, size: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(
        np.arange(size[0] * size[1] * 3, dtype=np.uint32).astype(np.uint8).reshape(size[1], size[0], 3)
    ).convert(mode).save(file, kind)
    return file.getvalue()


PICTURES = [
    picture("RGB", (32, 32), "PNG"),
    picture("RGBA", (32, 32), "PNG"),
    picture("L", (40, 24), "PNG"),
    picture("RGB", (32, 32), "JPEG"),
    picture("RGB", (16, 48), "WEBP"),
    picture("RGB", (200, 200), "PNG"),  # more pixels than may be sent
    picture("P", (32, 32), "GIF"),
    picture("RGB", (1, 1), "PNG"),
    b"",
    b"\x89PNG\r\n\x1a\n",
]
FILES = some.sampled_from(PICTURES) | some.sampled_from(PICTURES).flatmap(
    lambda whole: some.tuples(some.just(whole), some.integers(0, max(0, len(whole) - 1)), some.binary(max_size=3))
).map(lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] + len(cut[2]) :])
BASE64 = FILES.map(lambda file: base64.b64encode(file).decode())
TEXTS = (
    some.text(max_size=20)
    | some.sampled_from(
        [
            "",
            "auto",
            "32x32",
            "0x0",
            "33x32",
            "64x64",
            "9999999999x1",
            "nan",
            "inf",
            "-1",
            "1e999",
            "true",
            "null",
            "\x00",
            "a" * 40000,
            "((((",
            "(a:1.2)",
            "[a:b:0.5]",
            "<lora:a:1>",
            "BREAK",
            "euler",
            "DPM++ 2M Karras",
            "../../etc/passwd",
            "http://127.0.0.1/a.png",
            "data:image/png;base64,",
            "tiny",
            "gpt",
            "png",
            "url",
            "b64_json",
            "standard",
        ]
    )
    | BASE64
    | BASE64.map(lambda text: f"data:image/png;base64,{text}")
)
NUMBERS = (
    some.integers(-3, 70)
    | some.integers()
    | some.floats(allow_nan=False)
    | some.sampled_from(
        [0, 1, 2, 32, 64, 0.5, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, 1e308, -1e308, 5e-324]
    )
)
PLAIN = some.none() | some.booleans() | NUMBERS | TEXTS
VALUES = PLAIN | PLAIN | some.lists(PLAIN, max_size=3) | some.dictionaries(some.text(max_size=8), PLAIN, max_size=3)
A_PICTURE = base64.b64encode(PICTURES[0]).decode()
BASES: dict[str, dict[str, Any]] = {
    "/v1/images/generations": {"prompt": "a circle", "size": "32x32", "steps": 1},
    "/v1/images/edits": {"prompt": "a circle", "steps": 2},
    "/sdapi/v1/txt2img": {"prompt": "a circle", "width": 32, "height": 32, "steps": 1},
    "/sdapi/v1/img2img": {"prompt": "a circle", "steps": 2, "init_images": [A_PICTURE]},
    "/sdapi/v1/png-info": {"image": A_PICTURE},
    "/sdapi/v1/options": {},
    "/sdapi/v1/interrupt": {},
}
NAMES: dict[str, tuple[str, ...]] = {
    "/v1/images/generations": Generation.__struct_encode_fields__,
    "/v1/images/edits": (*Edit.__struct_encode_fields__, "image", "mask"),
    "/sdapi/v1/txt2img": (*Txt2Img.__struct_encode_fields__, "styles", "alwayson_scripts", "s_noise", "hr_scale"),
    "/sdapi/v1/img2img": Img2Img.__struct_encode_fields__,
    "/sdapi/v1/png-info": PngInfo.__struct_encode_fields__,
    "/sdapi/v1/options": ("sd_model_checkpoint", "CLIP_stop_at_last_layers", "randn_source", *FIXED),
    "/sdapi/v1/interrupt": ("a",),
}


# A body that would be drawn has some of its fields changed, and sometimes one that nobody knows.
CHANGES = {
    path: some.dictionaries(some.sampled_from(names) | some.text(max_size=10), VALUES, max_size=4)
    for path, names in NAMES.items()
}
SENT_FILES = some.lists(
    some.tuples(some.sampled_from(["image", "image", "image[]", "mask", "controls[]", "other"]), FILES), max_size=3
)
DAMAGED = [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"\x00", b"NaN", b"1e999", b'"\\ud800"']
OTHER_MEDIA = some.sampled_from(["", "text/plain", "multipart/form-data", "multipart/form-data; boundary=", "a/b;c"])
OTHER_HEADERS = some.dictionaries(
    some.sampled_from(["idempotency-key", "authorization", "accept", "content-length"]),
    some.text(max_size=12),
    max_size=2,
)
OTHER_METHODS = some.sampled_from(["GET", "PUT", "HEAD", "OPTIONS"])
PATH, DIE, PLACE, BYTES = (
    some.sampled_from(ROUTES),
    some.integers(0, 19),
    some.integers(0, 2**16),
    some.binary(max_size=99),
)
DAMAGES = some.sampled_from(DAMAGED)


def as_form(fields: dict[str, Any], files: list[tuple[str, bytes]]) -> tuple[bytes, str]:
    """Return a multipart form as clients send it."""
    parts = []
    for name, value in fields.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        parts.append(f'content-disposition: form-data; name="{name}"\r\n\r\n{shown}'.encode("utf-8", "replace"))
    for name, file in files:
        head = f'content-disposition: form-data; name="{name}"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n'
        parts.append(head.encode() + file)
    return b"".join(
        b"--cut\r\n" + part + b"\r\n" for part in parts
    ) + b"--cut--\r\n", "multipart/form-data; boundary=cut"


@some.composite
def calls(draw: some.DrawFn) -> Call:
    """A call, as often as not of what can be drawn."""
    path = draw(PATH)
    fields = BASES[path] | draw(CHANGES[path])
    if path == "/v1/images/edits" and draw(DIE):
        body, media = as_form(fields, draw(SENT_FILES) or [("image", PICTURES[0])])
    else:
        body, media = json.dumps(fields).encode("utf-8", "surrogatepass"), "application/json"
    headers: dict[str, str] = {}
    method = "POST"
    match draw(DIE):
        case 0:  # damaged on its way
            at = draw(PLACE) % (len(body) + 1)
            body = body[:at] + draw(BYTES) + body[at:]
        case 1:
            body = draw(BYTES)
        case 2:
            body = json.dumps(draw(VALUES)).encode()
        case 3:
            body = draw(DAMAGES)
        case 4:
            media = draw(OTHER_MEDIA)
        case 5:
            headers = draw(OTHER_HEADERS)
        case 6:
            method = draw(OTHER_METHODS)
    return method, path, body, {"content-type": media} | headers, "deadline" in fields or b"deadline" in body


def send_and_check(service: Service, call: Call) -> None:
    method, path, body, headers, deadline = call
    answer = service(method, path, body, headers)
    assert answer.status < 500 or deadline, answer
    if method != "HEAD":
        check(answer, path, deadline=deadline)


@given(call=calls())
@settings(max_examples=QUICK, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_is_answered(service: Service, call: Call) -> None:
    send_and_check(service, call)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_is_sent_is_answered_tens_of_thousands_of_times(service: Service, part: int) -> None:
    @seed(part)
    @given(call=calls())
    @settings(max_examples=LONG // PARTS, suppress_health_check=list(HealthCheck), derandomize=False, database=None)
    def send(call: Call) -> None:
        send_and_check(service, call)

    send()


# --- what the OpenAPI document allows, and what it does not ---


def operations(service: Service) -> list[Any]:
    """Return the operations of the service's own document, as schemathesis reads them."""
    document = json.loads(service("GET", "/openapi.json").body)
    return [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]


def follow(service: Service, operation: Any, mode: GenerationMode, count: int, start: int = 0) -> None:
    """Send what schemathesis makes of an operation. mode: bodies as they are described, or others"""

    @seed(start)
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None, derandomize=not start)
    def send(case: Any) -> None:
        sent = requests.Request(**case.as_transport_kwargs(base_url="http://127.0.0.1:8000")).prepare()
        body = sent.body.encode() if isinstance(sent.body, str) else sent.body or b""
        url = urlsplit(str(sent.url))
        answer = service(str(sent.method), unquote(url.path), body, dict(sent.headers), url.query)
        check(answer, url.path, deadline=b"deadline" in body)

    send()


def test_schemathesis_finds_no_error_of_the_service(service: Service) -> None:
    for operation in operations(service):
        follow(service, operation, GenerationMode.POSITIVE, 6 if operation.body else 1)
        if operation.body:
            follow(service, operation, GenerationMode.NEGATIVE, 4)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_schemathesis_finds_none_in_tens_of_thousands_of_cases(service: Service, part: int) -> None:
    for operation in operations(service):
        follow(service, operation, GenerationMode.POSITIVE, 200 if operation.body else 5, part)
        if operation.body:
            follow(service, operation, GenerationMode.NEGATIVE, 100, part)
