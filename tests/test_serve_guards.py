"""Who may use the service: names, sites, keys, and bodies that are too long."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest
from click.testing import CliRunner
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from latentrt.__main__ import find_command
from latentrt.engines.errors import BundleError, RequestError
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.operation.guards import LONGEST, Guards
from latentrt.runtime.serve.options import Access, Limits, ServeOptions
from latentrt.runtime.serve.server import Server
from latentrt.runtime.serve.web_errors import WebError
from tests.serving import served

MOST = 100_000
ODD = (
    "localhost/x",
    "a@localhost",
    "localhost?",
    "localhost#",
    "localhost:x",
    "localhost:80:80",
    "[::1",
    "[::1]x",
    "[localhost]",
    "localhost.",
)


def service(**access: Any) -> ServeOptions:
    return ServeOptions(access=Access(**access), limits=Limits(body_bytes=MOST))


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    """The address of a service without keys."""
    with served(build(Models({}, service(hosts=("draw.example",), origins=("https://page.example",))))) as address:
        yield address


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    """The address of a service with keys."""
    with served(build(Models({}, service(keys=("first-key", "second-key"))))) as address:
        yield address


def ask(address: str, path: str = "/v1/models", method: str = "GET", **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Return status, JSON and headers of an answer."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        body = answer.read()
        return answer.status, json.loads(body) if body[:1] == b"{" else None, dict(answer.headers)
    finally:
        connection.close()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:80", "10.0.0.7", "Draw.Example"])
def test_names_that_the_service_has_are_served(plain: str, host: str) -> None:
    assert ask(plain, host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a@b:x", *ODD]
)
def test_foreign_names_are_refused(plain: str, host: str) -> None:
    status, body, _ = ask(plain, host=host)
    assert (status, body["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE", "HEAD"])
@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "",
        "http://127.0.0.1:1",
        "http://localhost",
        "file://",
        "https://page.example.evil",
    ],
)
def test_pages_of_other_sites_are_refused_whatever_their_method(plain: str, method: str, origin: str) -> None:
    assert ask(plain, method=method, origin=origin)[0] == 403


def test_a_page_of_the_service_is_served_and_so_is_one_behind_a_proxy_with_tls(plain: str) -> None:
    assert ask(plain, origin=plain)[0] == 200
    assert ask(plain, host="draw.example", origin="https://draw.example")[0] == 200
    assert ask(plain, host="draw.example:80", origin="http://draw.example")[0] == 200


def test_only_a_site_that_is_allowed_may_read_answers(plain: str) -> None:
    status, _, headers = ask(plain, origin="https://page.example")
    assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example")
    first = ask(plain, method="OPTIONS", origin="https://page.example", access_control_request_method="POST")
    assert first[0] == 200
    ends = ask(plain, "/jobs/x", "OPTIONS", origin="https://page.example", access_control_request_method="DELETE")
    assert ends[0] == 200
    assert {"retry-after", "x-should-retry"} <= set(headers["access-control-expose-headers"].split(", "))
    assert "access-control-allow-origin" not in ask(plain)[2]
    assert "access-control-allow-origin" not in ask(plain, origin="https://evil.example")[2]


def test_what_another_sites_page_loads_without_an_origin_is_refused_but_a_link_may_be_followed(plain: str) -> None:
    assert ask(plain, sec_fetch_site="cross-site", sec_fetch_mode="no-cors")[0] == 403
    assert ask(plain, sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200
    assert ask(plain, sec_fetch_site="same-origin", sec_fetch_mode="cors")[0] == 200
    assert ask(plain, method="POST", sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 403


def test_a_key_is_asked_for_and_the_real_client_brings_it(locked: str) -> None:
    with openai.OpenAI(base_url=f"{locked}/v1", api_key="second-key", max_retries=0) as client:
        assert list(client.models.list()) == []
    wrong = openai.OpenAI(base_url=f"{locked}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError) as refused:
        wrong.models.list()
    assert refused.value.code == "invalid_api_key"


def basic(word: str) -> str:
    return "Basic " + base64.b64encode(word.encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer first-key", 200),
        ("bearer  first-key ", 200),
        (basic("anyone:first-key"), 200),
        ("", 401),
        ("Bearer", 401),
        ("Bearer first-ke", 401),
        ("first-key", 401),
        ("Bearer \xe9", 401),
        (basic("first-key"), 401),
        ("Basic !", 401),
        ("Basic \xe9", 401),
    ],
)
def test_keys_are_bearer_tokens_or_passwords(locked: str, authorization: str, status: int) -> None:
    assert ask(locked, authorization=authorization)[0] == status


def test_without_keys_an_empty_authorization_is_fine(plain: str) -> None:
    assert ask(plain, authorization="")[0] == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/images/generations", "/metrics", "/admin/reload", "/nowhere", "//"]
)
def test_every_path_needs_the_key(locked: str, path: str) -> None:
    status, body, headers = ask(locked, path, "POST")
    assert (status, body["error"]["type"]) == (401, "invalid_request_error")
    assert headers["www-authenticate"].startswith("Bearer") and headers["x-request-id"]


def test_answers_say_how_browsers_must_treat_them(plain: str, locked: str) -> None:
    for headers in (ask(plain)[2], ask(locked)[2], ask(plain, "/nowhere")[2]):
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-frame-options"] == "DENY"


def raw(address: str, sent: bytes) -> tuple[int, Any]:
    """Send bytes that may be half a request; return the status and JSON of the answer that comes all the same."""
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("media", ["application/json", "multipart/form-data; boundary=x", "text/plain"])
@pytest.mark.parametrize(
    "length", [f"Content-Length: {10**10}\r\n\r\n", f"Transfer-Encoding: chunked\r\n\r\n{MOST + 1:x}\r\n"]
)
def test_too_long_a_body_is_refused_before_it_has_come(plain: str, media: str, length: str) -> None:
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media}\r\n{length}"
    status, body = raw(plain, head.encode() + b" " * (MOST + 1) * ("chunked" in head))
    expected = (413, "body_too_large") if "chunked" not in head or "json" in media else (415, "unsupported_media_type")
    assert (status, body["error"]["code"]) == expected


def serve_refuses(*arguments: str, **environment: str) -> Exception | None:
    command = find_command("serve")
    assert command is not None
    return CliRunner().invoke(command, [*arguments, "--port", "0"], env=environment).exception  # type: ignore[return-value]


def test_other_machines_are_served_with_a_key_or_on_purpose_only(tmp_path: Path) -> None:
    keys, none = tmp_path / "keys", tmp_path / "none"
    keys.write_text("# of the tests\nfirst-key\n")
    none.write_text("# nothing\n")
    nowhere = str(tmp_path / "nowhere")  # there is no bundle, which is said only where the address is allowed
    for host in ("0.0.0.0", "::", "draw.example"):
        assert isinstance(serve_refuses(nowhere, "--host", host), RequestError)
    assert isinstance(serve_refuses(nowhere, "--api-key-file", str(none)), RequestError)
    assert isinstance(serve_refuses(nowhere, LATENTRT_SERVE_HOST="0.0.0.0"), RequestError)
    assert isinstance(serve_refuses(nowhere, "--api-key-file", str(keys)), BundleError)


def test_a_service_that_is_mounted_in_another_is_the_same() -> None:
    whole = Starlette(routes=[Mount("/draw", build(Models({}, service(keys=("first-key",)))))])
    with served(whole) as address:
        paths = {"/healthz": 200, "/": 200, "/page/main.js": 200, "/metrics": 401}
        assert {path: ask(address, f"/draw{path}")[0] for path in paths} == paths
        status, body, _ = ask(address, "/draw/sdapi/v1/options")
        assert status == 401 and set(body) == {"error", "detail", "body", "errors"}


def test_long_bodies_have_so_much_room_together_and_short_ones_always() -> None:
    most, refused, taken = 2 * 2**20, list[WebError](), list[int]()

    async def crowd() -> None:
        enough = asyncio.Event()

        async def app(_: Scope, receive: Receive, __: Send) -> None:
            try:
                taken.append(len((await receive())["body"]))
                await enough.wait()
            except WebError as error:
                refused.append(error)

        guards = Guards(app, access=Access(), body_bytes=most)

        async def ask(size: int) -> None:
            async def receive() -> Message:
                return {"type": "http.request", "body": bytes(size)}

            async def send(_: Message) -> None:
                raise AssertionError

            scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}
            await guards(scope, receive, send)

        for _ in range(2):  # the room is given back
            enough.clear()
            every = asyncio.gather(*(ask(most) for _ in range(LONGEST * 2 + 3)), *(ask(2**20) for _ in range(5)))
            while len(taken) + len(refused) < LONGEST * 2 + 8:
                await asyncio.sleep(0)
            assert (len(refused), {error.status for error in refused}) == (3, {429})
            assert taken.count(2**20) == 5
            enough.set()
            await every
            taken.clear()
            refused.clear()

    asyncio.run(crowd())


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with who asks, and how, as an application sees it."""
    if scope["type"] == "http":
        body = json.dumps({"scheme": scope["scheme"], "client": scope["client"][0]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("proxies", "scheme", "client"),
    [
        ((), "http", "127.0.0.1"),
        (("10.0.0.0/8",), "http", "127.0.0.1"),
        (("10.0.0.0/8", "127.0.0.1/32"), "https", "203.0.113.7"),
    ],
)
def test_a_proxy_is_believed_only_where_it_is_trusted(proxies: tuple[str, ...], scheme: str, client: str) -> None:
    told = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.7"}
    with served(echo, proxies=proxies) as address:
        assert httpx.get(address, headers=told).json() == {"scheme": scheme, "client": client}


def test_the_service_trusts_the_proxies_that_it_is_told() -> None:
    for proxies in ((), ("10.0.0.0/8",)):
        config = Server(Models({}, service(proxies=proxies)), lambda: None).config
        assert (config.proxy_headers, config.forwarded_allow_ips) == (bool(proxies), list(proxies))


@pytest.mark.parametrize(("proxy", "right"), [("10.0.0.7", True), ("::1", True), ("10.0.0.7/8", False), ("*", False)])
def test_a_proxy_is_an_address_or_a_network(proxy: str, right: bool, tmp_path: Path) -> None:
    found = serve_refuses(str(tmp_path / "nowhere"), "--trust-proxy", proxy)
    assert isinstance(found, BundleError if right else SystemExit)
