"""Spans of OpenTelemetry: a request, and in it the parts of each of its pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider

from latentrt.runtime.serve.operation.notes import Note

PARTS = {"wait": "queue", "encode": "encode", "denoise": "denoise", "decode": "decode"}  # of a result: its span's name


class Tracing:
    """Writes spans with a tracer."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer: Tracer = provider.get_tracer("latentrt")

    def begin(self, method: str, headers: Mapping[str, str], request_id: str) -> Span:
        """Begin the span of a request, in the trace that its headers name."""
        context = propagate.extract(headers)
        span = self._tracer.start_span(f"{method}", context, kind=SpanKind.SERVER)
        span.set_attribute("latentrt.request_id", request_id)
        return span

    @staticmethod
    def end(span: Span, method: str, route: str, status: int) -> None:
        """End the span of a request."""
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def picture(self, note: Note | None, model: str, seconds: Mapping[str, float]) -> None:
        """Write the span of a picture that was drawn just now, and of its parts, one after the other."""
        context = trace.set_span_in_context(note.span) if note is not None and note.span is not None else None
        now = time.time_ns()
        at = now - _ns(sum(seconds[part] for part in PARTS))
        whole = self._tracer.start_span("picture", context, start_time=at, attributes={"latentrt.model": model})
        inside = trace.set_span_in_context(whole)
        for part, name in PARTS.items():
            end = at + _ns(seconds[part])
            self._tracer.start_span(name, inside, start_time=at).end(end)
            at = end
        whole.end(now)


def from_environment() -> Tracing:
    """Return what exports spans over HTTP, as the OTEL_* variables say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as Provider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named: dict[str, Any] = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "latentrt")}
    provider = Provider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
