"""Several bundles: within a budget of memory, loaded when they are asked for, and again when they were replaced."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from latentrt.engines.bundle.manifest import MANIFEST
from latentrt.engines.errors import BundleError, ClosedError, EngineError, OutOfMemoryError
from latentrt.runtime.request import Request
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Model, Models
from latentrt.runtime.serve.operation.notes import CURRENT, Note
from latentrt.runtime.serve.options import Access, ServeOptions
from latentrt.runtime.serve.web_errors import WebError
from tests.serving import served

CPU = {"backend": "cpu", "threads": 1}
ROOM = 300 * 2**20  # for one of the tiny bundles below, which count 200 MB each


@pytest.fixture
def three(sd1_bundle: Path, tmp_path: Path) -> dict[str, Path]:
    """Three bundles by name, which are the same."""
    for name in "abc":
        shutil.copytree(sd1_bundle, tmp_path / name)
    return {name: tmp_path / name for name in "abc"}


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every bundle count 200 MB."""
    monkeypatch.setattr("latentrt.runtime.serve.models.weights_bytes", lambda bundle: 200 * 2**20)
    monkeypatch.setattr("latentrt.runtime.serve.models.resident_bytes", lambda: 0)


@pytest.fixture
def tight(three: dict[str, Path], weighed: None) -> Iterator[Models]:
    """Three bundles where one has room."""
    with Models(three, ServeOptions(memory=ROOM, room_s=0.2), CPU) as models:
        yield models


def loaded(models: Models) -> list[str]:
    return [model.name for model in models.all()]


def drawn(model: Model) -> int:
    (future,) = model.batcher.submit(Request(prompt="a circle", steps=1))
    return len(future.result().pixels)


def test_what_has_room_is_loaded_and_the_rest_when_it_is_asked_for(tight: Models) -> None:
    assert loaded(tight) == ["a"] and tight.names == ["a", "b", "c"]
    for name in "bca":
        assert drawn(asyncio.run(tight.find(name))) == 1
        assert loaded(tight) == [name]


def test_the_one_that_was_asked_for_longest_ago_makes_room(three: dict[str, Path], weighed: None) -> None:
    with Models(three, ServeOptions(memory=2 * ROOM - 100 * 2**20), CPU) as models:
        assert loaded(models) == ["a", "b"]
        asyncio.run(models.find("a"))
        asyncio.run(models.find("c"))
        assert loaded(models) == ["a", "c"]


def test_a_service_that_still_loads_is_alive_and_not_ready(three: dict[str, Path]) -> None:
    with Models(three, ServeOptions(), CPU, load=False) as models, served(build(models)) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError) as refused:
            client.get("/readyz", cast_to=object)
        assert (refused.value.status_code, refused.value.code) == (503, "loading")
        assert client.get("/healthz", cast_to=object) == {"status": "ok", "models": []}
        assert drawn(asyncio.run(models.find("b"))) == 1  # whoever asks before it is ready waits
        models.load()
        assert client.get("/readyz", cast_to=object) == {"status": "ready", "models": ["b", "a", "c"]}
        assert models.loads.total() == 3
        client.close()


def test_two_requests_for_the_same_model_load_it_once(tight: Models) -> None:
    async def both() -> list[Model]:
        return await asyncio.gather(tight.find("b"), tight.find("b"), tight.find("b"))

    first, *others = asyncio.run(both())
    assert all(one is first for one in others)
    assert tight.loads["b", "loaded"] == 1


def test_two_models_that_have_room_for_one_do_not_replace_each_other_before_they_are_used(
    three: dict[str, Path], weighed: None
) -> None:
    async def use(name: str) -> str:
        note = Note(request_id=name, began=0.0)
        CURRENT.set(note)  # in this task
        model = await models.find(name)
        for end in note.ends:
            end()
        return model.name

    async def both() -> list[str]:
        return await asyncio.wait_for(asyncio.gather(use("b"), use("c")), 120)

    with Models(three, ServeOptions(memory=ROOM, room_s=100), CPU) as models:
        assert asyncio.run(both()) == ["b", "c"]
        assert models.loads["b", "loaded"] == models.loads["c", "loaded"] == 1


def test_a_model_that_a_request_has_in_hand_or_that_draws_is_never_closed(tight: Models) -> None:
    note = Note(request_id="one", began=0.0)
    token = CURRENT.set(note)
    model = asyncio.run(tight.find("a"))
    CURRENT.reset(token)
    with pytest.raises(WebError) as refused:
        asyncio.run(tight.find("b"))
    assert (refused.value.status, refused.value.headers) == (503, {"retry-after": "5"})
    going, seen = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        seen.set()
        going.wait(60)

    (future,) = model.batcher.submit(Request(prompt="a circle", steps=2), on_step=wait)
    assert seen.wait(60)
    for end in note.ends:
        end()
    with pytest.raises(WebError):
        asyncio.run(tight.find("b"))
    going.set()
    assert len(future.result(60).pixels) == 1
    assert asyncio.run(tight.find("b")).name == "b" and loaded(tight) == ["b"]


def test_a_model_that_cannot_be_loaded_is_an_error_of_its_own(three: dict[str, Path], tight: Models) -> None:
    shutil.rmtree(three["b"] / "onnx")
    shutil.rmtree(three["b"] / "engines")
    (three["b"] / MANIFEST).unlink()
    with pytest.raises(BundleError):
        asyncio.run(tight.find("b"))
    assert tight.loads["b", "failed"] == 1
    assert loaded(tight) == ["a"] and drawn(asyncio.run(tight.find("a"))) == 1
    assert drawn(asyncio.run(tight.find("c"))) == 1


def test_one_that_never_has_room_is_refused_and_closes_none(three: dict[str, Path], tight: Models) -> None:
    tight._needs["b"] = 2 * ROOM
    with pytest.raises(OutOfMemoryError):
        asyncio.run(tight.find("b"))
    assert loaded(tight) == ["a"]


def test_a_model_that_fails_its_test_is_not_served(three: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise EngineError("it draws something else")

    monkeypatch.setattr("latentrt.runtime.serve.operation.self_test.self_test", fails)
    with pytest.raises(EngineError):
        Models({"a": three["a"]}, ServeOptions(), CPU)


def test_engines_that_compute_something_else_fail_the_test(
    three: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrt.engines.verify import verify

    monkeypatch.setattr(verify, "tolerance", lambda *_: 0.0)
    with pytest.raises(EngineError, match=r"' .*\b(text_encoder|unet|vae_encoder|vae_decoder)\b.*`latentrt verify`"):
        Models({"a": three["a"]}, ServeOptions(), CPU)


def test_a_batcher_that_draws_something_else_fails_the_test(
    three: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrt.runtime.serve.operation import self_test

    # Another seed each time: two pictures that differ.
    monkeypatch.setattr(self_test, "ordinary", lambda manifest: Request(prompt="a circle", steps=3))
    with pytest.raises(EngineError):
        Models({"a": three["a"]}, ServeOptions(), CPU)


def alter(bundle: Path) -> None:
    """Make a bundle another one, of the same files."""
    file = bundle / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["default_size"] = [40, 32]
    file.write_text(json.dumps(manifest))


def test_a_bundle_that_was_replaced_is_served_without_a_pause(three: dict[str, Path]) -> None:
    options = ServeOptions(access=Access(keys=("key",)))
    with (
        Models({"a": three["a"], "b": three["b"]}, options, CPU) as models,
        served(build(models)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        over = threading.Event()

        def draw(seed: int) -> int:
            pictures = 0
            while not over.is_set():
                more: Any = {"steps": 3, "seed": seed}
                pictures += len(client.images.generate(prompt="a circle", model="a", extra_body=more).data or ())
            return pictures

        asked = [pool.submit(draw, seed) for seed in range(3)]
        old = models.all()[0]
        assert reload(client) == {"a": "unchanged", "b": "unchanged"}
        alter(three["a"])
        assert reload(client) == {"a": "loaded", "b": "unchanged"}
        new = next(model for model in models.all() if model.name == "a")
        assert new is not old
        (future,) = new.batcher.submit(Request(prompt="a circle", steps=1))
        assert future.result().settings[0].size == (40, 32)
        (three["b"] / MANIFEST).write_text("{")
        with pytest.raises(openai.InternalServerError) as failed:
            reload(client)
        assert failed.value.code == "reload_failed"
        over.set()
        assert all(one.result(120) > 0 for one in asked)  # nobody was refused meanwhile


def reload(client: openai.OpenAI) -> Any:
    return client.post("../admin/reload", cast_to=object)["models"]  # type: ignore[index]


def test_a_replaced_model_that_cannot_be_closed_is_told_of_and_let_go(
    three: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Models({"a": three["a"]}, ServeOptions(), CPU) as models:
        (old,) = models.all()
        monkeypatch.setattr(old.pipe.loaded.opened, "close", broken)
        alter(three["a"])
        assert models.reload() == {"a": "loaded"}
        assert models.drain()  # of the new one and, until it is let go, the old one
    assert [record.exc_info is not None for record in caplog.records if record.levelname == "ERROR"] == [True]
    assert models._retiring == []


def broken() -> None:
    raise OSError("the driver refuses")


def test_closing_cancels_what_a_replaced_model_still_draws(three: dict[str, Path]) -> None:
    with Models({"a": three["a"]}, ServeOptions(slots=1, drain_s=10_000), CPU) as models:
        token = CURRENT.set(Note(request_id="one", began=0.0))
        model = asyncio.run(models.find("a"))  # and nobody lets it go
        CURRENT.reset(token)
        *_, last = model.batcher.submit(Request(prompt="a circle", steps=1000, n=20))
        alter(three["a"])
        assert models.reload() == {"a": "loaded"}
        closing = threading.Thread(target=models.close, daemon=True)
        closing.start()
        closing.join(120)
        assert not closing.is_alive()
        assert isinstance(last.exception(0), ClosedError)


def test_a_broken_bundle_leaves_the_old_one(three: dict[str, Path]) -> None:
    with Models({"a": three["a"]}, ServeOptions(), CPU) as models:
        (old,) = models.all()
        (three["a"] / MANIFEST).write_text("{")
        assert models.reload() == {"a": "failed"}
        assert models.all() == [old] and drawn(old) == 1
        assert models.loads == {("a", "loaded"): 1, ("a", "failed"): 1}


def test_nobody_reloads_a_service_without_keys() -> None:
    with served(build(Models({}))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        with client, pytest.raises(openai.PermissionDeniedError):
            reload(client)
