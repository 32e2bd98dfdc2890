"""Jobs: requests that the service remembers, over HTTP as the page asks for them."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import QueueFullError, RequestError
from latentrt.runtime.calls import Cancellation
from latentrt.runtime.draw.job import resolve
from latentrt.runtime.draw.step import Step
from latentrt.runtime.request import Request
from latentrt.runtime.result import Result
from latentrt.runtime.sampling.catalogue import sampler_names
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.jobs import Job, JobLimits, Jobs
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.serve.page.choices import choices
from tests.conftest import Make

MINE, YOURS = {"x-latentrt-session": "mine" * 6}, {"x-latentrt-session": "yours" * 6}
LONG = {"prompt": "a circle", "steps": 150, "n": 4}
WAIT_S = 60


@pytest.fixture(scope="module")
def models(sd1_bundle: Path) -> Iterator[Models]:
    with Models({"tiny": sd1_bundle}, ServeOptions(slots=2), {"backend": "cpu", "threads": 1}) as opened:
        yield opened


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    """Give a client of a session of its own, whose jobs end with the test."""
    with httpx.Client(base_url=address, headers=MINE, timeout=WAIT_S) as client:
        yield client
        client.post("/jobs/cancel", json={})
        wait_until(client, lambda jobs: all(job["state"] not in ("waiting", "drawing") for job in jobs))
        for job in client.get("/jobs").json()["jobs"]:
            client.delete(f"/jobs/{job['id']}")


def events(client: httpx.Client) -> Iterator[tuple[str, Any]]:
    with client.stream("GET", "/jobs/events") as answer:
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event:"):
                kind = line.removeprefix("event:").strip()
            elif line.startswith("data:"):
                yield kind, json.loads(line.removeprefix("data:"))


def wait_until(client: httpx.Client, holds: Any) -> list[dict[str, Any]]:
    """Follow the jobs until something holds of them."""
    jobs: dict[str, dict[str, Any]] = {}
    for kind, data in events(client):
        if kind == "job":
            jobs[data["id"]] = data
        if kind == "gone":
            jobs.pop(data["id"])
        if kind != "preview" and holds(list(jobs.values())):
            return list(jobs.values())
    raise AssertionError("the events ended")


def test_a_job_is_drawn_while_nobody_listens_and_its_picture_fetched_later(client: httpx.Client) -> None:
    answer = client.post("/jobs", json={"prompt": "a red circle", "steps": 3, "seed": 5, "n": 2})
    assert answer.status_code == 202
    (job,) = wait_until(client, lambda jobs: any(job["state"] == "done" for job in jobs))
    assert [one["seed"] for one in job["pictures"]] == [5, 6]
    assert job["pictures"][0]["settings"]["steps"] == 3 and job["pictures"][0]["seconds"]["total"] > 0
    file = client.get(f"/jobs/{job['id']}/pictures/1")
    assert file.headers["content-type"] == "image/png"
    written = client.post("/jobs/settings", content=file.content).json()
    assert (written["prompt"], written["steps"], written["seed"]) == ("a red circle", 3, 6)


def test_previews_come_before_the_picture_and_again_for_who_follows_later(client: httpx.Client) -> None:
    client.post("/jobs", json=LONG)
    for _ in range(2):
        preview = next(data for kind, data in events(client) if kind == "preview")
        assert preview["source"].startswith("data:image/png;base64,")
    (job,) = client.get("/jobs").json()["jobs"]
    assert job["state"] == "drawing" and 0 < job["progress"] < 1 and job["steps"] >= 150


def test_places_in_the_line_and_cancelling_one_all_but_one_and_all(client: httpx.Client) -> None:
    first, second, third, fourth = (client.post("/jobs", json=LONG).json()["id"] for _ in range(4))
    jobs = wait_until(client, lambda jobs: sum(job["position"] is not None for job in jobs) >= 2)
    places = [job["position"] for job in jobs if job["position"] is not None]
    assert places == sorted(places) and len(places) == len(set(places))

    def state(number: str) -> Any:
        return lambda jobs: any(job["id"] == number and job["state"] == "cancelled" for job in jobs)

    assert client.delete(f"/jobs/{second}").status_code == 204
    wait_until(client, state(second))
    assert client.get(f"/jobs/{first}").json()["state"] in ("waiting", "drawing")
    assert client.post("/jobs/cancel", json={"but": third}).json() == {"cancelled": 2}
    wait_until(client, state(first))
    wait_until(client, state(fourth))
    assert client.get(f"/jobs/{third}").json()["state"] in ("waiting", "drawing")
    assert client.post("/jobs/cancel", json={}).json() == {"cancelled": 1}
    wait_until(client, state(third))
    client.delete(f"/jobs/{third}")
    assert client.get(f"/jobs/{third}").status_code == 404


def test_who_follows_is_let_go_when_the_service_ends_and_all_is_drawn(
    client: httpx.Client, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.post("/jobs", json=LONG)
    monkeypatch.setattr(models, "draining", True)
    *_, (_, last) = ((kind, data) for kind, data in events(client) if kind == "job")  # to the end of the stream
    assert last["state"] == "done"


@settings(max_examples=100)
@given(
    body=some.binary(max_size=200)
    | some.text(max_size=100).map(lambda text: json.dumps({"prompt": text, "n": text}).encode())
)
def test_no_body_is_a_fault_of_the_service(address: str, body: bytes) -> None:
    with httpx.Client(base_url=address, headers=MINE, timeout=WAIT_S) as client:
        for path in ("/jobs", "/jobs/cancel", "/jobs/settings"):
            for kind in ("application/json", "multipart/form-data; boundary=x", "image/png"):
                assert client.post(path, content=body, headers={"content-type": kind}).status_code < 500


def test_two_people_do_not_see_one_anothers_jobs(client: httpx.Client, address: str) -> None:
    job = client.post("/jobs", json={"prompt": "a circle", "steps": 2}).json()["id"]
    with httpx.Client(base_url=address, headers=YOURS) as other:
        assert other.get("/jobs").json() == {"jobs": []}
        for method, path in (("GET", f"/jobs/{job}"), ("DELETE", f"/jobs/{job}"), ("GET", f"/jobs/{job}/pictures/0")):
            assert other.request(method, path).status_code == 404
        assert other.post("/jobs/cancel", json={}).json() == {"cancelled": 0}
    wait_until(client, lambda jobs: any(job["state"] == "done" for job in jobs))


@pytest.mark.parametrize("session", ["", "short", "a" * 65, "ä" * 20, "../" * 6])
def test_a_session_is_a_random_name(address: str, session: str) -> None:
    headers = {"x-latentrt-session": session.encode()}
    answer = httpx.get(f"{address}/jobs", headers=headers)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-latentrt-session")


def test_what_cannot_be_drawn_is_no_job(client: httpx.Client) -> None:
    answer = client.post("/jobs", json={"prompt": "a circle", "sampler": "nope"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "sampler")
    assert client.get("/jobs").json() == {"jobs": []}


@pytest.mark.parametrize(
    ("field", "value"), [("stream", True), ("output_format", "webp"), ("output_format", "jpeg"), ("n", "x")]
)
def test_a_job_refuses_what_it_does_not_do(client: httpx.Client, field: str, value: object) -> None:
    answer = client.post("/jobs", json={"prompt": "a circle", field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_a_session_has_so_many_followers(address: str) -> None:
    async def follow() -> None:
        crowd = {"x-latentrt-session": "crowd" * 6}
        async with httpx.AsyncClient(base_url=address, headers=crowd, timeout=WAIT_S) as client:
            asked = client.build_request("GET", "/jobs/events")
            open_ones = [await client.send(asked, stream=True) for _ in range(JobLimits().followers)]
            lines = [one.aiter_lines() for one in open_ones]
            for each in lines:  # each has begun, and goes on while it is held
                await anext(each)
            refused = await asyncio.wait_for(client.get("/jobs/events"), WAIT_S)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_followers")
            assert int(refused.headers["retry-after"]) >= 1
            for one in open_ones:
                await one.aclose()

    asyncio.run(follow())


def test_a_follower_who_takes_nothing_is_let_go(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.runtime.serve.page.routes.SEND_S", 0.05)
    headers = [(b"host", b"localhost"), (b"x-latentrt-session", b"slow" * 6)]
    path: dict[str, Any] = {"path": "/jobs/events", "raw_path": b"/jobs/events", "root_path": "", "query_string": b""}
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "headers": headers, **path}

    async def receive() -> Any:
        await asyncio.sleep(WAIT_S)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(WAIT_S)

    asyncio.run(asyncio.wait_for(build(models)(scope, receive, send), WAIT_S / 2))


@pytest.mark.parametrize("number", ["9" * 5000, "-1", "٣", "0x0", "1"])
def test_a_number_that_no_picture_has(client: httpx.Client, number: str) -> None:
    answer = client.get(f"/jobs/none/pictures/{number}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize("span", ["bytes=x", "bytes=999999999-", "bytes=0-0", "lines=1"])
def test_the_pages_files_come_whole(address: str, span: str) -> None:
    answer = httpx.get(f"{address}/page/main.js", headers={"range": span})
    assert (answer.status_code, answer.content) == (200, httpx.get(f"{address}/page/main.js").content)


def test_settings_of_what_has_none(client: httpx.Client) -> None:
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    assert client.post("/jobs/settings", content=plain.getvalue()).status_code == 404
    assert client.post("/jobs/settings", content=b"nothing").status_code == 400


def test_choices_name_models_samplers_and_limits(client: httpx.Client) -> None:
    found = client.get("/jobs/choices").json()
    (model,) = found["models"]
    assert (model["name"], model["size"], model["image"]) == ("tiny", [32, 32], True)
    assert {"name": "dpmpp_2m_karras", "title": "DPM++ 2M Karras"} in found["samplers"]
    assert found["limits"]["steps"] == 150


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_the_samplers_of_a_model_are_those_that_draw_with_it(family: str, made: Make) -> None:
    manifest = Bundle.open(made(family, "")[1]).manifest

    def draws(name: str) -> bool:
        try:
            resolve(Request(prompt="", steps=4, sampler=name, seed=0), manifest)
        except RequestError:
            return False
        return True

    models: Any = SimpleNamespace(manifests=lambda: {"one": manifest}, options=ServeOptions())
    (model,) = choices(models).models
    assert set(model.samplers) == {name for name in sampler_names() if draws(name)}
    assert 20 < len(model.samplers) < len(sampler_names())


def test_the_page_is_served_with_its_policy_and_by_its_etag(address: str) -> None:
    answer = httpx.get(f"{address}/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    again = httpx.get(f"{address}/", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for nowhere in ("/page/nope.js", "/page/..%2f__init__.py", "/page/../routes.py"):
        assert httpx.get(f"{address}{nowhere}").status_code == 404


def job_of(files: dict[int, bytes], created: float) -> Any:
    return SimpleNamespace(id=f"job {created}", owner="somebody", over=True, created=created, files=files)


def test_jobs_that_are_over_are_forgotten_oldest_first_by_number_bytes_and_age() -> None:
    few = Jobs(JobLimits(over=3, bytes=3000, age_s=1000))
    for number in range(5):
        finish(few, job_of({0: b"x"}, number))
    assert [job.created for job in few.of("somebody")] == [2, 3, 4]
    finish(few, job_of({0: b"x" * 1500, 1: b"x" * 500}, 5))  # as much room as two
    assert [job.created for job in few.of("somebody")] == [4, 5]
    finish(few, job_of({0: b"x" * 10_000}, 6))
    assert [job.created for job in few.of("somebody")] == [6]
    brief = Jobs(JobLimits(age_s=0.0))
    finish(brief, job_of({}, 7))
    assert brief.of("somebody") == []


def finish(jobs: Jobs, job: Any) -> None:
    jobs._active[job.id] = job
    jobs._changed(job)


def test_an_owner_has_so_many_jobs_at_a_time(models: Models) -> None:
    async def ask() -> None:
        jobs = Jobs(JobLimits(active=2))
        (model,) = models.all()
        for _ in range(2):
            await jobs.submit(model, Request(prompt="a circle", steps=100), "one")
        with pytest.raises(QueueFullError):
            await jobs.submit(model, Request(prompt="a circle"), "one")
        await jobs.submit(model, Request(prompt="a circle", steps=100), "another")
        with pytest.raises(RequestError):
            await jobs.submit(model, Request(prompt="a circle", sampler="nope"), "another")
        assert len(jobs.active()) == 3
        for job in jobs.active():
            job.cancel()
        while jobs.active():
            await asyncio.sleep(0.01)

    asyncio.run(ask())


def test_a_job_is_looked_at_while_a_stage_is_taken_in(models: Models) -> None:
    (model,) = models.all()
    job = Job(model, Request(prompt="a circle"), "one", lambda _: None)

    class Looked:
        stages = 4

        @property
        def stage(self) -> int:
            assert job.view().state in ("waiting", "drawing")
            return 2

        def keep(self) -> Looked:
            return self

    job._step(lambda: None, 0, cast(Step, Looked()))
    assert (job.view().state, job.view().step, job.view().steps) == ("drawing", 2, 4)


def test_a_job_that_is_over_keeps_no_stage_that_comes_late(models: Models) -> None:
    async def end() -> Job:
        (model,) = models.all()
        job = Job(model, Request(prompt="a circle"), "one", lambda _: None)
        job._futures = [Future()]
        job._futures[0].set_exception(RequestError("steps: enough"))
        await job._finish()
        return job

    job = asyncio.run(end())
    late: Any = SimpleNamespace(stage=2, stages=4, keep=lambda: "latents")
    job._step(lambda: None, 0, late)
    assert job.view().state == "failed" and not job._looked


def test_a_job_is_cancelled_whose_client_leaves_before_it_is_taken() -> None:
    entered, go_on, cancels = threading.Event(), threading.Event(), list[Cancellation]()

    def submit(_: Request, *, cancel: Cancellation, on_step: object) -> list[Future[Result]]:
        cancels.append(cancel)
        entered.set()
        assert go_on.wait(WAIT_S)
        return [Future()]

    async def ask() -> None:
        jobs = Jobs()
        model: Any = SimpleNamespace(name="tiny", batcher=SimpleNamespace(submit=submit))
        asking = asyncio.create_task(jobs.submit(model, Request(prompt="a circle"), "one"))
        assert await asyncio.to_thread(entered.wait, WAIT_S)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        go_on.set()
        assert cancels[0].cancelled and not jobs.active()

    asyncio.run(ask())


def test_models_that_are_not_loaded_can_be_chosen(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "all", list)
    assert [model.name for model in choices(models).models] == ["tiny"]


def test_a_model_that_decodes_a_jobs_picture_makes_no_room_for_another(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = models.all()
    decoding, go_on = threading.Event(), threading.Event()
    decode = model.pipe.loaded.drawing.decode

    def slow(*given: Any, **further: Any) -> Any:
        decoding.set()
        assert go_on.wait(WAIT_S)
        return decode(*given, **further)

    monkeypatch.setattr(model.pipe.loaded.drawing, "decode", slow)
    (future,) = model.batcher.submit(Request(prompt="a circle", steps=2))
    assert decoding.wait(WAIT_S) and not model.idle
    go_on.set()
    future.result(WAIT_S)
    with model.batcher.hold(WAIT_S):
        assert model.idle
