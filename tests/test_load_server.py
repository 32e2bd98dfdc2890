"""`latentrt bench-serve --url` against the service itself, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from latentrt.__main__ import cli
from latentrt.engines.errors import QueueFullError, RequestError
from latentrt.runtime.bench.load.arrivals import Item
from latentrt.runtime.bench.load.drive import drive
from latentrt.runtime.bench.load.remote import body_of, events, server
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions
from tests.serving import served


@pytest.fixture(scope="module")
def address(sd1_bundle: Path) -> Iterator[str]:
    options = ServeOptions(slots=2, waiting=4)
    loading = {"backend": "cpu", "threads": 1}
    with Models({"tiny": sd1_bundle}, options, loading) as models, served(build(models)) as address:
        yield address


def test_a_server_answers_every_request_with_a_partial_picture_first(address: str) -> None:
    items = [Item(at_s=0.3 * number, steps=4 + number % 2, guidance=1.0 + number % 2) for number in range(4)]
    with server(address, None) as submit:
        outcomes = drive(submit, items, most_s=120, skips_idle=False)
    assert [outcome.status for outcome in outcomes] == ["answered"] * 4
    for outcome in outcomes:
        assert outcome.first_s is not None and outcome.latency_s is not None
        assert 0 < outcome.first_s < outcome.latency_s


def test_a_full_line_is_a_rejection_and_what_cannot_be_drawn_a_failure(address: str) -> None:
    errors: list[BaseException] = []
    items = [*[Item(at_s=0.0, steps=100)] * 20, Item(at_s=0.0, sampler="magic")]
    with server(address, None) as submit:
        outcomes = drive(submit, items, most_s=120, skips_idle=False, error=errors.append)
    status = [outcome.status for outcome in outcomes]
    assert status[-1] == "failed" and "rejected" in status and "answered" in status
    assert {type(error) for error in errors} == {QueueFullError, RequestError}


def test_the_command_measures_a_server(address: str) -> None:
    options = ["--mix", "2:1", "--requests", "4", "--seeds", "1", "--rate", "8", "--slots", "2", "--json", "-"]
    done = CliRunner().invoke(cli, ["bench-serve", "--url", address, *options])
    assert done.exit_code == 0, done.output
    ((serving,), method) = (json.loads(done.stdout)[name] for name in ("servings", "method"))
    assert (serving["name"], method["skips_idle"], method["target"]) == ("server", False, address)
    assert serving["seeds"][0]["runs"][0]["overall"]["unanswered"] == 0


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "ftp://127.0.0.1"])
def test_where_no_server_answers_it_is_said(url: str) -> None:
    done = CliRunner().invoke(cli, ["bench-serve", "--url", url, "--json", "-"])
    assert done.exit_code == 2, done.output
    assert json.loads(done.stdout)["error"]["field"] == "url"


def test_what_is_not_given_is_not_asked_for() -> None:
    assert set(body_of(Item(at_s=0), 3, "tiny")) == {
        *("model", "prompt", "stream", "partial_images", "seed", "steps", "guidance")
    }
    full = body_of(Item(at_s=0, size=(64, 32), seed=0, sampler="euler", negative_prompt=""), 3, "tiny")
    assert (full["size"], full["seed"], full["negative_prompt"]) == ("64x32", 0, "")


def test_events_are_read_and_comments_passed_over() -> None:
    async def read(*lines: str) -> list[dict[str, Any]]:
        async def stream() -> AsyncIterator[str]:
            for line in lines:
                yield line

        return [event async for event in events(stream())]

    lines = ": heartbeat||event: a|data: {'type':|data: 'a'}||data: {'type': 'b'}||data: [DONE]||".replace("'", '"')
    assert asyncio.run(read(*lines.split("|"))) == [{"type": "a"}, {"type": "b"}]
