"""Ray Serve: what the application tells Ray, and a real cluster on this machine with two replicas."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from latentrt import Pipeline, Request
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array

pytest.importorskip("ray")
from pydantic import ValidationError
from ray import serve

from latentrt.runtime.ray_app import SPARE, Args, app, check_health
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.stored import fetch_missing

ROOT = Path(__file__).parent.parent
WAIT_S = 180
NEAR_DB = 60
SMALL: dict[str, Any] = {"prompt": "a circle", "steps": 2, "seed": 1}
LONG: dict[str, Any] = {"prompt": "a star", "steps": 150, "size": "128x128", "seed": 2}
SLOTS, WAITING, PARTIALS = 1, 8, 3
OTHERS = ("first", "second", "third", "fourth")


# --- what Ray is told ---


def test_what_ray_keeps_to_follows_from_slots_and_queue() -> None:
    told = Args(bundles={"tiny": "tiny"}, slots=4, waiting=20, max_replicas=3, drain_s=60).deployment
    assert told["autoscaling_config"].target_ongoing_requests == 4
    assert told["max_ongoing_requests"] == 4 + 20 + SPARE
    assert told["max_queued_requests"] == -1
    assert told["graceful_shutdown_timeout_s"] > 60


def test_a_command_line_names_bundles_and_aliases() -> None:
    args = Args.model_validate({"bundles": "a=/b=c,d=e", "aliases": "gpt-image-1=a", "slots": "2"})
    assert args.bundles == {"a": "/b=c", "d": "e"} and args.aliases == {"gpt-image-1": "a"} and args.slots == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"bundles": {}},
        {"bundles": "tiny"},
        {"slots": 0},
        {"aliases": {"gpt-image-1": "nope"}},
        {"min_replicas": 2, "max_replicas": 1},
        {"colour": "red"},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_is_deployed(wrong: dict[str, Any]) -> None:
    given = {"bundles": {"tiny": "tiny"}, **wrong} if wrong else {}
    with pytest.raises(ValueError):  # pydantic's, or RequestError
        app(Args.model_validate(given))


@pytest.mark.parametrize("given", ["demo/shapes", "shapes=", "=demo/shapes", "shapes=demo/shapes,", ""])
def test_a_bundle_without_a_name_is_refused_by_what_was_typed(given: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Args.model_validate({"bundles": given})
    (error,) = refused.value.errors()
    assert error["loc"] == ("bundles",) and f"'{given}'" in error["msg"]


def test_a_replica_that_could_not_load_its_bundles_ends_quietly(tmp_path: Path) -> None:
    deployed = app(Args(bundles={"tiny": str(tmp_path / "nowhere")}))._bound_deployment
    replica_class = cast("Any", deployed.func_or_class).__base__  # without what Ray adds
    asyncio.run(replica_class.__del__(SimpleNamespace()))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return tmp_path


def test_a_replica_is_healthy_when_it_has_loaded_its_bundles(sd1_bundle: Path, home: Path) -> None:
    args = Args(bundles={"tiny": str(sd1_bundle)}, backend="cpu", threads=1)
    handle = serve.run(app(args), _local_testing_mode=True)
    assert handle.check_health.remote().result(timeout_s=WAIT_S) is None


def test_machines_of_one_kind_build_once_and_share_engines_by_their_key(
    sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        shutil.copytree(sd1_bundle, tmp_path / name, ignore=shutil.ignore_patterns("engines"))
        for name in ("first", "second")
    )
    store = str(tmp_path / "store")
    fetch_missing(first, "cpu", store=store)
    monkeypatch.setattr("latentrt.engines.build._build_into", None)  # whoever builds again fails
    for _ in range(2):
        fetch_missing(second, "cpu", store=store)
    with Pipeline.load(second, "cpu", threads=1) as pipe:
        assert pipe("a circle", steps=1, seed=0).backend == "cpu"


class Ill:
    """A model's batcher that has lost its device."""

    name, lost = "tiny", RuntimeError("gone")

    @property
    def batcher(self) -> Ill:
        return self


def test_a_replica_that_cannot_draw_any_more_is_ill() -> None:
    models = cast("Models", SimpleNamespace(all=lambda: [Ill()], options=ServeOptions()))
    with pytest.raises(EngineError):
        check_health(models)


# --- a cluster ---


class Cluster:
    """A cluster of one machine with the service on it, in a process of its own: Ray does not run in a fork."""

    def __init__(self, folder: str) -> None:
        environment = {
            **os.environ,
            "HOME": folder,
            "PYTHONPATH": str(ROOT / "src"),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, ROOT / "tests" / "ray_cluster.py", folder]
        self.folder = Path(folder)
        self._log = (self.folder / "driver.log").open("w")
        self._process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=-1, stdout=-1, stderr=self._log, text=True
        )
        self.address = ""

    def _read(self) -> dict[str, str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self.folder / "driver.log").read_text()
        found: dict[str, str] = json.loads(line)
        return found

    def begin(self) -> None:
        self.address = self._read()["address"]

    def tell(self, **words: Any) -> None:
        """Tell the cluster something. `told` waits until it has obeyed."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(words)}\n")
        self._process.stdin.flush()

    def told(self) -> None:
        assert self._read() == {}

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def ask(self, body: dict[str, Any], *, of: str = "pair", **headers: str) -> httpx.Response:
        address = f"{self.address}/{of}/v1/images/generations"
        return httpx.post(address, json=body, headers=headers, timeout=WAIT_S)

    def drawn_by(self, of: str = "pair") -> dict[str, int]:
        """Return how many pictures each replica has answered with, by what Ray logs of it."""
        files = self.folder.glob(f"session_*/logs/serve/replica_{of}_*.log")
        found = {file.name: file.read_text().count("/v1/images/generations 200") for file in files}
        return {name: count for name, count in found.items() if count}


def arguments(bundle: Path, **further: Any) -> dict[str, Any]:
    bundles = dict.fromkeys(("tiny", *OTHERS), str(bundle))
    drawing = {"backend": "cpu", "threads": 1, "slots": SLOTS, "waiting": WAITING, "cpus": 0.5}
    return {"bundles": bundles, **drawing, **further}


@pytest.fixture(scope="module")
def cluster(sd1_bundle: Path) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(folder)
        try:
            cluster.begin()
            cluster.tell(deploy="pair", arguments=arguments(sd1_bundle, min_replicas=2, max_replicas=2))
            cluster.told()
            yield cluster
        finally:
            cluster.end()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=32) as pool:
        yield pool


class Stream:
    """A client that follows the events of long pictures. began: set with the first event; ended: gives how many came

    leaves: whether it goes away after the first
    """

    def __init__(self, cluster: Cluster, pool: ThreadPoolExecutor, *, leaves: bool = False, n: int = 1) -> None:
        self.began, self._leaves = threading.Event(), leaves
        body = {**LONG, "n": n, "stream": True, "partial_images": PARTIALS}
        self.ended = pool.submit(self._follow, f"{cluster.address}/pair/v1/images/generations", body)

    def _follow(self, address: str, body: dict[str, Any]) -> int:
        events = 0
        with httpx.stream("POST", address, json=body, timeout=WAIT_S) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    events += 1
                    self.began.set()
                    if self._leaves:
                        break
        return events


def psnr(one: Array, other: Array) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def pixels_of(text: str) -> Array:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def answers(asked: Sequence[Future[httpx.Response]]) -> list[httpx.Response]:
    return [future.result(WAIT_S) for future in asked]


@pytest.mark.slow
def test_a_replica_draws_the_library_s_picture(cluster: Cluster, sd1_bundle: Path) -> None:
    answer = cluster.ask(SMALL)
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as pipe:
        alone = pipe.draw(Request(**SMALL)).pixels[0]
    assert answer.status_code == 200, answer.text
    assert psnr(pixels_of(answer.json()["data"][0]["b64_json"]), alone) >= NEAR_DB


@pytest.mark.slow
def test_what_is_asked_wrongly_gets_our_own_answer(cluster: Cluster) -> None:
    refused = cluster.ask({**SMALL, "sampler": "nope"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "sampler"
    assert cluster.ask({**SMALL, "model": "nope"}).json()["error"]["code"] == "model_not_found"


@pytest.mark.slow
def test_both_replicas_draw_and_a_full_queue_is_429_with_the_time_to_wait(
    cluster: Cluster, pool: ThreadPoolExecutor
) -> None:
    """More at once than two replicas draw and let wait: some are told to come again."""
    before, many = cluster.drawn_by(), 2 * (SLOTS + WAITING) + 4
    found = answers([pool.submit(cluster.ask, {**LONG, "steps": 20, "seed": seed}) for seed in range(many)])
    full = [answer for answer in found if answer.status_code == 429]
    assert {answer.status_code for answer in found} == {200, 429}
    assert len(found) - len(full) >= 2 * SLOTS
    for answer in full:
        assert answer.json()["error"]["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    after = cluster.drawn_by()
    assert len(after) == 2 and all(count > before.get(name, 0) for name, count in after.items())


@pytest.mark.slow
def test_a_client_that_goes_away_frees_the_slot_in_its_replica(cluster: Cluster, pool: ThreadPoolExecutor) -> None:
    """A client that asked for far more than another one leaves: then others are served before that one is."""
    staying = Stream(cluster, pool)
    assert staying.began.wait(WAIT_S), "now Ray has the next one drawn by the other replica"
    leaving = Stream(cluster, pool, leaves=True, n=WAITING // 2)
    assert leaving.ended.result(WAIT_S) == 1
    others = [pool.submit(cluster.ask, {**SMALL, "size": LONG["size"]}) for _ in range(3)]
    done, _ = wait([*others, staying.ended], WAIT_S, FIRST_COMPLETED)
    assert done and staying.ended not in done
    assert staying.ended.result(WAIT_S) == PARTIALS + 1
    assert {answer.status_code for answer in answers(others)} == {200}


@pytest.mark.slow
def test_a_stream_of_events_passes_through_as_it_is_written(cluster: Cluster) -> None:
    body = {**LONG, "stream": True, "partial_images": 2}
    with httpx.stream("POST", f"{cluster.address}/pair/v1/images/generations", json=body, timeout=WAIT_S) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    assert all(pixels_of(event["b64_json"]).ndim == 3 for event in events)


@pytest.mark.slow
def test_an_answer_has_the_one_id_that_ray_s_proxy_gave_it_or_its_client(cluster: Cluster) -> None:
    refused = {**SMALL, "sampler": "nope"}
    assert len(cluster.ask(refused).headers.get_list("x-request-id")) == 1
    assert cluster.ask(refused, **{"x-request-id": "mine-7"}).headers.get_list("x-request-id") == ["mine-7"]


@pytest.mark.slow
def test_requests_for_a_bundle_go_to_the_replica_that_has_drawn_with_it(cluster: Cluster) -> None:
    """Of two idle replicas, chance would not choose the same one twenty times.

    Replicas tell Ray what they have drawn with a little later, more so on a busy machine: then both have, and another
    bundle is tried.
    """
    for attempt, name in enumerate(OTHERS, start=1):
        before = cluster.drawn_by()
        for number in range(21):
            asked = cluster.ask({**SMALL, "model": name}, serve_multiplexed_model_id=name)
            assert asked.status_code == 200
            if not number:
                time.sleep(2 * attempt)
        after = cluster.drawn_by()
        if sum(count > before.get(name, 0) for name, count in after.items()) == 1:
            return
    raise AssertionError((before, after))


@pytest.mark.slow
def test_what_was_accepted_is_drawn_when_the_application_is_taken_away(
    cluster: Cluster, pool: ThreadPoolExecutor
) -> None:
    """The last test of the two replicas: they are gone after it."""
    streams = [Stream(cluster, pool) for _ in range(2)]
    for stream in streams:
        assert stream.began.wait(WAIT_S)
    cluster.tell(delete="pair")
    assert [stream.ended.result(WAIT_S) for stream in streams] == [PARTIALS + 1] * 2
    cluster.told()
    assert cluster.ask(SMALL).status_code == 404


@pytest.mark.slow
def test_a_full_queue_brings_another_replica(cluster: Cluster, sd1_bundle: Path, pool: ThreadPoolExecutor) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 1}
    cluster.tell(deploy="scaled", arguments=arguments(sd1_bundle, **scaling))
    cluster.told()
    for _ in range(60):
        found = answers([pool.submit(cluster.ask, {**LONG, "steps": 20}, of="scaled") for _ in range(4)])
        assert {answer.status_code for answer in found} <= {200, 429}
        if len(cluster.drawn_by("scaled")) == 2:
            return
    raise AssertionError(cluster.drawn_by("scaled"))
