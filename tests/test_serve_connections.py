"""Connections that ask for nothing, ask slowly or read slowly: they end, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.operation.connections import Connections
from latentrt.runtime.serve.options import ConnectionLimits
from tests.serving import served

SHORT = ConnectionLimits(connections=60, per_address=40, head_s=0.5, body_s=0.5, rest_s=0.5, reader_s=0.5, idle_s=60.0)
HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def short() -> Iterator[tuple[str, Connections]]:
    """A service with short deadlines, by its address, and its connections."""
    connections = Connections(SHORT)
    with served(build(Models({})), connections) as address:
        yield address, connections


def connected(address: str, sent: bytes = b"") -> socket.socket:
    url = urlsplit(address)
    one = socket.create_connection((url.hostname, url.port), timeout=60)
    one.sendall(sent)
    return one


def ended(one: socket.socket) -> bool:
    """Wait for the end of a connection; tell whether it came without an answer."""
    try:
        return one.recv(1000) == b""
    except ConnectionResetError:
        return True


def asks(address: str) -> int:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    with closing(connection):
        connection.request("GET", "/v1/models")
        return connection.getresponse().status


@pytest.mark.parametrize(
    ("sent", "phase"),
    [(b"", "head"), (HEAD, "head"), (HEAD + b'Content-Length: 100\r\n\r\n{"prompt"', "body")],
    ids=["silent", "half a head", "half a body"],
)
def test_who_sends_half_of_something_is_cut(short: tuple[str, Connections], sent: bytes, phase: str) -> None:
    address, connections = short
    with connected(address, sent) as one:
        assert ended(one)
    assert connections.cut == {phase: 1}


def test_a_drip_of_bytes_keeps_nothing_open(short: tuple[str, Connections]) -> None:
    address, connections = short
    with connected(address, HEAD) as one, pytest.raises(OSError):
        while time.sleep(0.1) is None:
            one.sendall(b"x")
    assert connections.cut == {"head": 1}


def test_the_rest_of_a_body_that_was_refused_is_not_waited_for(short: tuple[str, Connections]) -> None:
    address, connections = short
    with connected(address, HEAD + b"Content-Length: 99999999999\r\n\r\nxxx") as one:
        answer = http.client.HTTPResponse(one)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, "body_too_large")
        assert ended(one)
    assert connections.cut == {"rest": 1}


@pytest.mark.parametrize("sent", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 100_000])
def test_what_is_not_http_is_told_so(short: tuple[str, Connections], sent: bytes) -> None:
    address, _ = short
    with connected(address, sent) as one:
        answer = http.client.HTTPResponse(one)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (400, "invalid_http")


@pytest.mark.parametrize("answered", [True, False])
def test_a_body_that_is_not_http_ends_its_connection_alone(
    short: tuple[str, Connections], answered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    address, _ = short
    head = HEAD.replace(b"application/json", b"text/plain") if answered else HEAD
    with connected(address, head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{    \r\n") as one:
        assert not answered or one.recv(12) == b"HTTP/1.1 415"
        one.sendall(b"nonsense\r\n")
        while not ended(one):
            pass
    assert asks(address) == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_connection_is_kept_for_the_next_request(short: tuple[str, Connections]) -> None:
    address, connections = short
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    with closing(connection):
        for _ in range(3):
            connection.request("GET", "/v1/models")
            assert connection.getresponse().read()
            time.sleep(2 * SHORT.head_s)  # longer than any deadline but the one between requests
        assert connections.count == 1 and not connections.cut


def test_half_open_connections_keep_nobody_out() -> None:
    """There are more of them than may be open, and none runs into its deadline."""
    limits = ConnectionLimits(connections=60, per_address=40, head_s=600.0, body_s=600.0)
    connections = Connections(limits)
    with served(build(Models({})), connections) as address, ExitStack() as stack:
        for number in range(90):
            sent = (b"", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{")[number % 3]
            stack.enter_context(connected(address, sent))
            assert number % 10 or asks(address) == 200
        assert connections.count <= limits.per_address
        assert connections.cut["room"] >= 30


class Wire(asyncio.Transport):
    """A connection whose end, as with real ones, is told of later than it is cut."""

    cut = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 1) if name == "peername" else default

    def abort(self) -> None:
        self.cut = True


def test_each_of_many_that_come_at_the_same_moment_makes_another_one_go() -> None:
    async def come() -> None:
        connections, wires = Connections(ConnectionLimits(connections=2, per_address=2)), [Wire() for _ in range(6)]
        config = uvicorn.Config(build(Models({})), log_config=None)
        for wire in wires:
            made: Any = connections.protocol
            made(config=config, server_state=ServerState(), app_state={}).connection_made(wire)
        assert [wire.cut for wire in wires] == [True] * 4 + [False] * 2
        assert connections.count == 2 and connections.cut == {"room": 4}

    asyncio.run(come())


def test_who_is_being_answered_is_not_cut_for_others() -> None:
    going = threading.Event()

    async def slow(_: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first "
            while not going.is_set():
                await asyncio.sleep(0.02)
            yield b"last"

        return StreamingResponse(parts())

    connections = Connections(ConnectionLimits(connections=3, per_address=3))
    with served(Starlette(routes=[Route("/", slow)]), connections) as address, ExitStack() as stack:
        asked = []
        for _ in range(3):
            connection = stack.enter_context(closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)))
            connection.request("GET", "/")
            asked.append(connection.getresponse())
        assert [answer.read(6) for answer in asked] == [b"first "] * 3
        with connected(address) as one:
            assert ended(one)  # there is no room for it
        going.set()
        assert [answer.read() for answer in asked] == [b"last"] * 3


def test_who_reads_nothing_is_cut_and_others_keep_pace() -> None:
    async def endless(_: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            while True:
                yield bytes(65536)
                await asyncio.sleep(0)

        return StreamingResponse(parts())

    connections = Connections(SHORT)
    get = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with served(Starlette(routes=[Route("/", endless)]), connections) as address, ExitStack() as stack:
        stack.enter_context(connected(address, get))
        busy = stack.enter_context(connected(address, get))
        while connections.count > 1 or not connections.cut:
            assert busy.recv(65536)
        assert connections.cut == {"reader": 1}
        assert all(busy.recv(65536) for _ in range(100))
