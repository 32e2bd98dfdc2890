"""Who waits for an answer: idempotency keys, clients that leave, readers that do not read, heartbeats."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from latentrt.engines.errors import CancelledError, EngineError
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.openai import routes
from latentrt.runtime.serve.openai.kept import Kept, Reader
from latentrt.runtime.serve.openai.streams import frame
from latentrt.runtime.serve.options import ConnectionLimits, ServeOptions
from latentrt.runtime.serve.web_errors import WebError
from tests.test_openai_pictures import close, file_of, grey, pixels_of

ASKED = {"steps": 4}
LONG = {"steps": 150, "sampler": "heun"}


@pytest.fixture(scope="module")
def models(sd1_bundle: Path) -> Iterator[Models]:
    options = ServeOptions(slots=4, connecting=ConnectionLimits(reader_s=1.0))
    with Models({"tiny": sd1_bundle}, options, {"backend": "cpu", "threads": 1}) as opened:
        yield opened


@pytest.fixture
def busy(models: Models) -> Callable[[], int]:
    """Return how many pictures wait or are drawn."""
    batcher = models.all()[0].batcher
    return lambda: batcher.waiting + batcher.drawing


def until(true: Callable[[], Any]) -> None:
    """Wait until something is true, for a minute at the most."""
    for _ in range(6000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not become true in a minute")


def keyed(client: openai.OpenAI, key: str, prompt: str = "a star", **more: Any) -> str | None:
    answer = client.images.generate(prompt=prompt, extra_headers={"Idempotency-Key": key}, extra_body=ASKED | more)
    assert answer.data is not None
    return answer.data[0].b64_json


# --- idempotency keys ---


def test_a_key_joins_what_is_drawn_and_gives_what_was_drawn(
    client: openai.OpenAI, models: Models, busy: Callable[[], int]
) -> None:
    model = models.all()[0]
    with ThreadPoolExecutor() as threads, model.pipe.loaded.turn.hold():  # nothing is drawn meanwhile
        both = [threads.submit(keyed, client, "joined") for _ in range(2)]
        until(lambda: busy() == 1)
        with pytest.raises(openai.ConflictError) as refused:
            keyed(client, "joined", "a cat")
        assert refused.value.code == "idempotency_key_reused"
    first, second = (one.result() for one in both)  # of random seeds
    assert first == second == keyed(client, "joined") != keyed(client, "another")
    with pytest.raises(openai.ConflictError):
        keyed(client, "joined", steps=5)


def test_a_key_is_its_owners_alone(client: openai.OpenAI) -> None:
    other = client.with_options(api_key="another")
    assert keyed(client, "shared") == keyed(client, "shared") != keyed(other, "shared")


def test_a_form_has_a_key_too_whatever_its_boundary_is(client: openai.OpenAI) -> None:
    def edit() -> Any:
        return client.images.edit(
            image=file_of(grey()), prompt="a star", extra_headers={"Idempotency-Key": "form"}, extra_body=ASKED
        ).model_dump()

    assert edit() == edit()


def test_what_failed_under_a_key_is_tried_again(
    client: openai.OpenAI, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(models.all()[0].batcher.__class__, "submit", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError):
            keyed(client.with_options(max_retries=0), "failing")
    assert keyed(client, "failing")


def make(*parts: bytes, until: asyncio.Event | None = None) -> Callable[[], Any]:
    async def give() -> AsyncIterator[bytes]:
        for part in parts:
            yield part
        if until is not None:
            await until.wait()

    async def start() -> AsyncIterator[bytes]:
        return give()

    return start


def test_what_was_sent_is_compared_where_there_is_a_key_and_beside_the_event_loop(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loops = routes._digest, list[bool]()

    def digest(*given: Any) -> bytes:
        loops.append(asyncio._get_running_loop() is not None)
        return real(*given)

    monkeypatch.setattr(routes, "_digest", digest)
    client.images.generate(prompt="a star", extra_body=ASKED)
    assert loops == []
    client.images.generate(prompt="a star", extra_body=ASKED, extra_headers={"idempotency-key": "compared"})
    assert loops == [False]


def test_kept_answers_are_bounded_in_count_bytes_and_age() -> None:
    async def scenario() -> None:
        kept = Kept(count=2, most_bytes=100, age_s=0.2)

        async def ask(key: str, part: bytes) -> bytes:
            reader = kept.join(key, b"", make(part))
            try:
                return await reader.whole()
            finally:
                reader.leave()
                await asyncio.sleep(0)  # until it is settled

        for number in range(3):
            await ask(str(number), b"first")
        assert [await ask(key, b"second") for key in "21"] == [b"first", b"first"]
        assert await ask("0", b"second") == b"second"  # which the third made room for
        assert await ask("large", b"x" * 101) == b"x" * 101
        assert await ask("large", b"y") == b"y"
        await asyncio.sleep(0.3)
        assert await ask("2", b"third") == b"third"

    asyncio.run(scenario())


def test_making_goes_on_while_one_of_several_waits_and_ends_with_the_last() -> None:
    async def scenario() -> None:
        kept, gate = Kept(), asyncio.Event()
        readers = [kept.join("key", b"", make(b"part", until=gate)) for _ in range(2)]
        await readers[0].taken()
        readers[0].leave()
        readers[0].leave()
        waiting = asyncio.create_task(readers[1].whole())
        await asyncio.sleep(0)
        gate.set()
        assert await waiting == b"part"

        last: Reader = kept.join("other", b"", make(b"part", until=asyncio.Event()))
        await last.taken()
        last.leave()
        again = kept.join("other", b"", make(b"new"))  # before the first has ended
        assert await again.whole() == b"new"
        with pytest.raises(CancelledError):
            await last.whole()
        with pytest.raises(WebError):
            kept.join("other", b"else", make(b""))

    asyncio.run(scenario())


def test_who_waits_for_an_answer_is_told_of_an_end_that_is_no_exception() -> None:
    class Panic(BaseException):
        """What a library in Rust raises."""

    async def panic() -> AsyncIterator[bytes]:
        raise Panic

    async def scenario() -> None:
        reader = Kept().join("key", b"", panic)
        with pytest.raises(EngineError):
            await asyncio.wait_for(reader.taken(), 60)

    asyncio.run(scenario())


# --- clients that leave ---


def raw(address: str, body: dict[str, Any], *, length: int | None = None) -> socket.socket:
    """Send a request on a socket of its own."""
    data = json.dumps(body).encode()
    there = urlsplit(address)
    connection = socket.create_connection((there.hostname or "", there.port or 0), timeout=60)
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: {there.netloc}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {length or len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(address: str, busy: Callable[[], int], stream: bool) -> None:
    with raw(address, {"prompt": "a star", "n": 10, "stream": stream, "partial_images": 3, **LONG}):
        until(lambda: busy() == 10)
    until(lambda: busy() == 0)


def test_a_client_that_leaves_during_its_upload_leaves_nothing(
    address: str, client: openai.OpenAI, busy: Callable[[], int]
) -> None:
    raw(address, {"prompt": "a star"}, length=10_000).close()
    assert client.images.generate(prompt="a star", extra_body=ASKED).data
    assert busy() == 0


def test_the_neighbours_of_one_that_leaves_are_drawn_as_ever(
    address: str, client: openai.OpenAI, busy: Callable[[], int]
) -> None:
    extra = {"steps": 20, "seed": 5}
    expected = client.images.generate(prompt="a star", extra_body=extra).model_dump()["data"][0]["b64_json"]
    with ThreadPoolExecutor() as threads:
        leaving = raw(address, {"prompt": "a cat", "n": 3, **LONG})
        until(lambda: busy() == 3)
        found = threads.submit(client.images.generate, prompt="a star", extra_body=extra)
        until(lambda: busy() == 4 or found.done())
        leaving.close()
        pictures = found.result().model_dump()["data"]
    until(lambda: busy() == 0)
    assert close(pixels_of(expected), pixels_of(pictures[0]["b64_json"]))


def test_a_client_that_joined_leaves_and_the_other_gets_its_picture(
    client: openai.OpenAI, models: Models, busy: Callable[[], int]
) -> None:
    with ThreadPoolExecutor() as threads:
        with models.all()[0].pipe.loaded.turn.hold():
            staying = threads.submit(keyed, client, "left by one")
            until(lambda: busy() == 1)
            with pytest.raises(openai.APITimeoutError):
                keyed(client.with_options(timeout=0.2, max_retries=0), "left by one")
        assert staying.result()


def test_what_is_refused_does_not_wait_for_files_to_be_written(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, many = threading.Event(), 36  # more than the event loop's own pool has threads
    monkeypatch.setattr("latentrt.runtime.serve.openai.telling.encode", lambda *_, **__: go_on.wait(60) and b"file")
    with ThreadPoolExecutor(many) as threads:
        try:
            asked = [
                threads.submit(client.images.generate, prompt="a star", extra_body={"steps": 1}) for _ in range(many)
            ]
            with pytest.raises(openai.BadRequestError):
                client.with_options(timeout=30, max_retries=0).images.generate(prompt="a star", size="17x17")
            assert not any(one.done() for one in asked)
        finally:
            go_on.set()
        assert all(one.result().data for one in asked)


# --- streams ---


def test_a_stream_has_heartbeats_while_nothing_comes(
    address: str, models: Models, monkeypatch: pytest.MonkeyPatch, busy: Callable[[], int]
) -> None:
    monkeypatch.setattr("latentrt.runtime.serve.openai.streams.HEARTBEAT_S", 0.05)
    with models.all()[0].pipe.loaded.turn.hold():
        connection = raw(address, {"prompt": "a star", "stream": True, **ASKED})
        seen = b""
        while seen.count(b": still drawing") < 3:
            seen += connection.recv(4096)
    while b"completed" not in seen:
        seen += connection.recv(65536)
    connection.close()
    assert b"event: error" not in seen
    until(lambda: busy() == 0)


def test_a_reader_that_does_not_read_is_cut_and_frees_its_slots(
    address: str, client: openai.OpenAI, busy: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def long_frame(kind: str, data: bytes) -> bytes:
        return b": %s\n" % (b"x" * 2**24) + frame(kind, data)  # more than the buffers of both ends have room for

    monkeypatch.setattr("latentrt.runtime.serve.openai.telling.frame", long_frame)
    with raw(address, {"prompt": "a star", "n": 10, "stream": True, "partial_images": 3, **LONG}) as connection:
        until(lambda: busy() == 10)
        assert client.images.generate(prompt="a cat", extra_body=ASKED).data  # others go on
        until(lambda: busy() == 0)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
