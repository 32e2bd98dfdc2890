"""The Images API when something goes wrong: what is answered, and how often the real client tries again."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from latentrt.engines.errors import (
    ClosedError,
    DeadlineError,
    DrainingError,
    EngineError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
)
from latentrt.runtime.batching.batcher import Batcher
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.serve.web_errors import WebError
from tests.serving import served

ASKED = {"seed": 3, "steps": 2}


class Counted:
    """An application that counts its requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += scope["type"] == "http"
        await self._app(scope, receive, send)


@pytest.fixture(scope="module")
def models(sd1_bundle: Path) -> Iterator[Models]:
    options = ServeOptions(slots=1, waiting=2)
    with Models({"tiny": sd1_bundle}, options, {"backend": "cpu", "threads": 1}) as opened:
        yield opened


@pytest.fixture(scope="module")
def counted(models: Models) -> Counted:
    return Counted(build(models))


@pytest.fixture(scope="module")
def address(counted: Counted) -> Iterator[str]:
    with served(counted) as address:
        yield address


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited before it tried again."""
    asked: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", asked.append)
    return asked


@pytest.mark.parametrize(
    ("error", "status", "requests", "least_s"),
    [
        (RequestError("size: found 17x17"), 400, 1, None),
        (WebError("a key is missing", status=401), 401, 1, None),
        (WebError("there is none", status=404), 404, 1, None),
        (WebError("too large", status=413), 413, 1, None),
        (WebError("cannot be processed", status=422), 422, 1, None),
        (WebError("in conflict", status=409), 409, 3, 0.0),
        (WebError("in conflict", status=409, headers={"x-should-retry": "false"}), 409, 1, None),
        (QueueFullError("full", retry_after_s=7.5), 429, 3, 8.0),
        (RuntimeError("a bug"), 500, 3, 0.0),
        (EngineError("broken"), 500, 1, None),
        (OutOfMemoryError("too large for this device"), 500, 1, None),
        (DrainingError("it ends"), 503, 3, 1.0),
        (ClosedError("it is loaded again"), 503, 3, 1.0),
        (DeadlineError("too late"), 504, 1, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_the_client_tries_again_what_may_succeed_and_nothing_else(
    client: openai.OpenAI,
    counted: Counted,
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
    sleeps: list[float],
    error: Exception,
    status: int,
    requests: int,
    least_s: float | None,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Batcher, "submit", fail)
    before = counted.requests
    with pytest.raises(openai.APIStatusError) as refused:
        client.images.generate(prompt="a star", extra_body=ASKED)
    assert refused.value.status_code == status and counted.requests - before == requests
    assert refused.value.request_id is not None and refused.value.code is not None
    assert not sleeps if least_s is None else min(sleeps) >= least_s


def test_a_full_queue_is_refused_and_the_client_succeeds_by_itself(
    client: openai.OpenAI, counted: Counted, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, slept, ask = models.all()[0], list[float](), client.with_options(timeout=120).images.generate

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        wait_for(lambda: not model.batcher.waiting)

    monkeypatch.setattr("openai._base_client.time.sleep", sleep)
    with ThreadPoolExecutor() as threads:
        with model.pipe.loaded.turn.hold():  # nothing is drawn meanwhile
            first = [threads.submit(ask, prompt="a star", extra_body=ASKED) for _ in range(2)]
            wait_for(lambda: model.batcher.waiting == 2)
            with pytest.raises(openai.RateLimitError) as refused:
                client.with_options(max_retries=0).images.generate(prompt="a dog", extra_body=ASKED)
            assert refused.value.code == "queue_full" and int(refused.value.response.headers["retry-after"]) >= 1
            before = counted.requests
            third = threads.submit(ask, prompt="a dog", extra_body=ASKED)
            wait_for(lambda: slept)
        assert all(one.result().data for one in (*first, third))
    assert counted.requests - before == 2 and slept[0] >= 1


def wait_for(true: Any) -> None:
    """Wait until something is true, for a minute at the most."""
    for _ in range(6000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not become true in a minute")


def send(address: str, path: str, body: bytes, *, method: str = "POST", **headers: str) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"content-type": "application/json", **named})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a\\u0000b"}',
        b'{"prompt": "a", "loras": [{"name": "a\\u0000b"}]}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "loras": [{"name": "a", "name": "b"}]}',
        b'{"prompt": "a", "guidance": NaN}',
        b'{"prompt": "a", "guidance": 1e999}',
        b'{"prompt": "a", "guidance": true}',
        b'{"prompt": "a", "n": true}',
        b'{"prompt": "a", "n": 1.5}',
        b'{"prompt": "a", "seed": 99999999999999999999999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": 3}',
        b'{"n": 1}',
        b'{"prompt": "a", "quality": "' + b"a" * 100_000 + b'"}',
        b'{"prompt": "a", "timesteps": [' + b"1," * 200_000 + b"1]}",
    ],
    ids=range(23),
)
def test_what_is_no_request_is_refused(address: str, body: bytes) -> None:
    status, answer, headers = send(address, "/v1/images/generations", body)
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}
    assert headers["x-request-id"] and len(answer["error"]["message"]) < 500


@pytest.mark.parametrize(
    ("inner", "code", "place"),
    [
        ({"scale": 0.5}, "missing_required_parameter", "loras[1].name"),
        ({"name": "ink", "file": "ink"}, "unknown_parameter", "loras[1].file"),
        ({"name": "ink", "scale": 1001}, "invalid_type", "loras[1].scale"),
        ({"name": "ink", "scale": "0.5"}, "invalid_type", "loras[1].scale"),
        ("ink", "invalid_type", "loras[1]"),
    ],
)
def test_a_refusal_says_where_in_a_list(address: str, inner: Any, code: str, place: str) -> None:
    body = json.dumps({"prompt": "a", "loras": [{"name": "ink"}, inner]}).encode()
    status, answer, _ = send(address, "/v1/images/generations", body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, "loras")
    assert answer["error"]["message"].startswith(f"{place}: ")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([("prompt", "a"), ("guidance", "nan")], "guidance"),
        ([("prompt", "a"), ("guidance", "1e999")], "guidance"),
        ([("prompt", "a"), ("sigmas[]", "inf"), ("sigmas[]", "0")], "sigmas"),
        ([("prompt", "a"), ("stream", "perhaps")], "stream"),
        ([("prompt", "a"), ("n", "1"), ("n", "2")], "n"),
        ([("prompt", "a\0b")], "prompt"),
        ([("prompt", "a"), ("loras[][name]", "ink"), ("loras[][name]", "oil"), ("loras[][scale]", "1")], "loras"),
        ([("prompt", "a"), ("colour", "red")], "colour"),
        ([("prompt", "a" * 70_000)], None),
        ([(f"field{number}", "") for number in range(200)], None),
        ([], "prompt"),
    ],
    ids=range(11),
)
def test_what_is_no_form_is_refused(address: str, fields: list[tuple[str, str]], param: str | None) -> None:
    parts = [f'--b\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in fields]
    body = ("".join(parts) + "--b--\r\n").encode()
    status, answer, _ = send(address, "/v1/images/edits", body, content_type="multipart/form-data; boundary=b")
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize("charset", ["unicode_escape", "punycode", "utf-7", "idna", "zlib", "x\u00e9"])
def test_a_form_in_no_plain_charset_is_refused(address: str, charset: str) -> None:
    body = b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n\\ud800\r\n--b--\r\n'
    kind = f"multipart/form-data; boundary=b; charset={charset}"
    status, answer, _ = send(address, "/v1/images/edits", body, content_type=kind)
    assert (status, answer["error"]["code"]) == (400, "invalid_form")


def test_a_form_that_ends_in_the_middle_is_refused(address: str) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=b"):
        status, answer, _ = send(address, "/v1/images/edits", b"--b\r\ncontent-disp", content_type=kind)
        assert (status, answer["error"]["code"]) == (400, "invalid_form")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/images/generations", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/images/edits", 415),
    ],
)
def test_every_refusal_has_a_request_id_and_openais_form(address: str, method: str, path: str, status: int) -> None:
    found, answer, headers = send(address, path, b"{}", method=method)
    assert found == status and headers["x-request-id"] and answer["error"]["code"]


def test_a_stream_that_fails_ends_with_an_error(client: openai.OpenAI, models: Models) -> None:
    seen: list[Any] = []
    with pytest.raises(openai.APIError) as failed:
        for event in client.images.generate(
            prompt="a star", stream=True, partial_images=3, extra_body={"steps": 150, "deadline": 0.05}
        ):
            seen.append(event)
    assert failed.value.code == "deadline_exceeded"
    assert not any(event.type == "image_generation.completed" for event in seen)
