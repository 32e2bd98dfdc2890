"""What whoever runs the service sees of it: health, metrics, logs, traces; and the limits of a request."""

from __future__ import annotations

import http.client
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import yaml
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from latentrt.engines.errors import DeviceLostError
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.operation.logs import JsonLines, TextLines
from latentrt.runtime.serve.operation.tracing import Tracing
from latentrt.runtime.serve.options import Limits, ServeOptions
from tests.serving import served

ROOT = Path(__file__).parent.parent
SPANS = InMemorySpanExporter()


@pytest.fixture(scope="module")
def models(sd1_bundle: Path) -> Iterator[Models]:
    limits = Limits(pixels=64 * 64, steps=20, pictures=3, body_bytes=10_000)
    options = ServeOptions(slots=2, waiting=3, limits=limits)
    with Models({"tiny": sd1_bundle}, options, {"backend": "cpu", "threads": 1}) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(models: Models) -> Iterator[str]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(SPANS))
    with served(build(models, tracing=Tracing(provider))) as one:
        yield one


def ask(address: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, str]:
    """Return status, text and request id of an answer: of POST with a body, else of GET."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    try:
        text = None if body is None else json.dumps(body)
        connection.request("POST" if text else "GET", path, text, {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers["x-request-id"]
    finally:
        connection.close()


def draw(address: str, **asked: Any) -> tuple[int, str, str]:
    return ask(address, "/v1/images/generations", {"prompt": "a circle", "steps": 2, **asked})


def values(address: str) -> dict[str, float]:
    """Return every sample of the metrics, by its name and labels."""
    status, text, _ = ask(address, "/metrics")
    assert status == 200
    return {
        " ".join([sample.name, *(sample.labels[label] for label in sorted(sample.labels))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def until(what: Callable[[], bool]) -> None:
    """Wait until something holds, a minute at the most. A request is counted once the last of its answer is sent."""
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_model_is_tested_before_it_is_served_and_the_service_is_ready(address: str) -> None:
    assert ask(address, "/readyz")[0] == 200
    assert json.loads(ask(address, "/healthz")[1]) == {"status": "ok", "models": ["tiny"]}


def test_metrics_count_what_was_drawn_and_what_was_not(address: str) -> None:
    before = values(address)
    assert draw(address, n=2)[0] == 200
    assert draw(address, n=2, deadline=0.000001)[0] == 504
    route = "latentrt_request_seconds_count /v1/images/generations"
    until(lambda: values(address).get(f"{route} 504", 0) > before.get(f"{route} 504", 0))
    after = values(address)

    def more(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert more("latentrt_admitted_total tiny") == 4
    assert more("latentrt_delivered_total tiny none") == 2
    assert more("latentrt_cancelled_total tiny deadline waiting") == 2
    assert more("latentrt_picture_stages_total tiny") >= 4
    assert more("latentrt_wait_seconds_count tiny") == 2
    assert more("latentrt_part_seconds_count tiny decode") == 2
    assert more("latentrt_request_seconds_count /v1/images/generations 200") == 1
    assert more("latentrt_request_seconds_count /v1/images/generations 504") == 1
    assert more("latentrt_rows_total used tiny") >= 8
    assert after["latentrt_running tiny"] == after["latentrt_waiting tiny"] == 0
    assert after["latentrt_cache_bytes tiny"] > 0 and after["latentrt_ready"] == 1


def test_labels_hold_nothing_that_a_client_wrote(address: str) -> None:
    ask(address, "/nowhere-of-a-client")
    assert draw(address, prompt="words-of-a-client")[0] == 200
    assert draw(address, model="name-of-a-client")[0] == 404
    assert "of-a-client" not in ask(address, "/metrics")[1]


@pytest.mark.parametrize(("asked", "param"), [({"size": "128x128"}, "size"), ({"steps": 21}, "steps"), ({"n": 4}, "n")])
def test_more_than_the_limits_is_refused_before_any_work(address: str, asked: dict[str, Any], param: str) -> None:
    before = values(address).get("latentrt_admitted_total tiny", 0)
    status, text, _ = draw(address, **asked)
    assert (status, json.loads(text)["error"]["param"]) == (400, param)
    assert draw(address, prompt="x" * 20_000)[0] == 413
    assert values(address).get("latentrt_admitted_total tiny", 0) == before


def test_the_log_says_who_asked_for_what_and_what_became_of_it(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "latentrt"):
        status, _, number = draw(address, prompt="a secret wish", n=2)
        ask(address, "/healthz")
        until(lambda: any(getattr(record, "fields", {}).get("route") for record in caplog.records))
    assert status == 200
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    (answered,) = [line for line in lines if line.get("route")]
    assert answered["request_id"] == number
    assert (answered["status"], answered["models"], answered["pictures"]) == (200, ["tiny"], 2)
    drawn = [line for line in lines if "promise" in line]
    assert [line["request_id"] for line in drawn] == [number] * 2
    assert all(line["seconds"]["total"] > 0 for line in drawn)
    assert "secret" not in "".join(map(str, lines))
    assert number in TextLines("%(message)s").format(caplog.records[-1])


def test_the_log_holds_prompts_only_where_that_is_wanted(
    models: Models, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "options", msgspec.structs.replace(models.options, log_prompts=True))
    with caplog.at_level(logging.INFO, "latentrt"), served(build(models)) as address:
        assert draw(address, prompt="an open wish")[0] == 200
        job = {"prompt": "a job's wish", "steps": 2}
        assert ask(address, "/jobs", job, **{"x-latentrt-session": "mine" * 6})[0] == 202
        assert ask(address, "/sdapi/v1/txt2img", {"prompt": "an old wish", "steps": 2})[0] == 200
        until(lambda: len(wishes(caplog)) == 3)
    assert wishes(caplog) == [["an open wish"], ["a job's wish"], ["an old wish"]]


def wishes(caplog: pytest.LogCaptureFixture) -> list[list[str]]:
    fields = [getattr(record, "fields", {}) for record in caplog.records]
    return [one["prompts"] for one in fields if "prompts" in one]


def test_the_first_look_at_a_picture_is_measured(address: str) -> None:
    before = values(address)["latentrt_first_partial_seconds_count"]
    assert draw(address)[0] == 200
    assert values(address)["latentrt_first_partial_seconds_count"] == before
    assert draw(address, steps=4, stream=True, partial_images=2)[0] == 200
    until(lambda: values(address)["latentrt_first_partial_seconds_count"] == before + 1)


def children(spans: tuple[ReadableSpan, ...], parent: ReadableSpan) -> list[ReadableSpan]:
    assert parent.context is not None
    return [span for span in spans if span.parent is not None and span.parent.span_id == parent.context.span_id]


def test_a_trace_holds_the_parts_of_each_picture(address: str) -> None:
    SPANS.clear()
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"prompt": "a circle", "steps": 2, "n": 2}
    assert ask(address, "/v1/images/generations", body, traceparent=caller)[0] == 200
    until(lambda: len(SPANS.get_finished_spans()) == 11)
    spans = SPANS.get_finished_spans()
    (request,) = [span for span in spans if span.name == "POST /v1/images/generations"]
    assert request.context is not None and f"{request.context.trace_id:032x}" == caller.split("-")[1]
    pictures = children(spans, request)
    assert [span.name for span in pictures] == ["picture"] * 2
    for picture in pictures:
        parts = children(spans, picture)
        assert [part.name for part in parts] == ["queue", "encode", "denoise", "decode"]
        assert all(part.start_time <= part.end_time for part in parts)  # type: ignore[operator]


def documented() -> set[str]:
    text = (ROOT / "docs/operation.md").read_text("utf-8")
    return set(re.findall(r"^\| `(latentrt_\w+)`", text, re.MULTILINE))


def test_every_metric_is_documented_and_the_dashboard_and_the_alerts_name_no_other(address: str) -> None:
    draw(address)
    families = list(text_string_to_metric_families(ask(address, "/metrics")[1]))
    exported = {one.name.removesuffix("_created") for one in families if one.name.startswith("latentrt_")}
    named = {f"{one.name}_total" if one.type == "counter" else one.name for one in families if one.name in exported}
    named = {f"{name}_info" if name == "latentrt_engine" else name for name in named}
    assert documented() == named
    dashboard = json.loads((ROOT / "docs/operation/grafana.json").read_text("utf-8"))
    alerts = yaml.safe_load((ROOT / "docs/operation/alerts.yaml").read_text("utf-8"))
    used = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert documented() == set(re.findall(r"latentrt_\w+?(?=_bucket|_count|_sum|\b)", " ".join(used)))
    for text in (*used, *(rule["expr"] for group in alerts["groups"] for rule in group["rules"])):
        words = set(re.findall(r"latentrt_\w+", text))
        assert words or text.startswith("process_")
        assert {re.sub(r"_(bucket|count|sum)$", "", word) for word in words} <= named


def test_an_error_of_the_service_itself_is_one_answer_and_one_line(
    address: str, models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def breaks(_: str | None) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(models, "find", breaks)
    status, text, number = draw(address)
    assert (status, json.loads(text)["error"]["code"]) == (500, "internal_error") and number
    assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_a_service_that_hangs_or_lost_its_device_is_to_be_started_again(
    address: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = models.all()
    monkeypatch.setattr(type(model.batcher), "last_stage_at", time.perf_counter() - 1000)
    status, text, _ = ask(address, "/healthz")
    assert (status, json.loads(text)["error"]["code"]) == (503, "hangs")
    monkeypatch.undo()
    assert ask(address, "/healthz")[0] == 200
    monkeypatch.setattr(type(model.batcher), "lost", DeviceLostError("gone"))
    assert ask(address, "/healthz")[0] == 503


def test_a_service_that_ends_is_not_ready_and_takes_nothing(
    address: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "draining", True)
    assert ask(address, "/readyz")[0] == 503
    status, text, _ = draw(address)
    assert (status, json.loads(text)["error"]["code"]) == (503, "draining")
    after = values(address)
    assert after["latentrt_ready"] == 0 and after["latentrt_rejected_total tiny draining"] == 1
