"""What a service counts and measures, as Prometheus reads it. docs/operation.md says what each is good for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from latentrt import __version__
from latentrt.runtime.batching import observer as tell
from latentrt.runtime.serve.models import Models, Source

if TYPE_CHECKING:
    from latentrt.runtime.serve.operation.connections import Connections

LONG_S = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STAGE_S = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


class Metrics:
    """The metrics of one service, in a registry of its own. Labels never hold what a user wrote."""

    def __init__(self, models: Models, connections: Connections | None = None) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(Now(models, connections))

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"latentrt_{name}", words, labels, registry=self.registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"latentrt_{name}", words, labels, buckets=buckets, registry=self.registry)

        self._requests = histogram(
            "request_seconds", "From a request's head to the end of its answer.", LONG_S, "route", "status"
        )
        self._partial = histogram(
            "first_partial_seconds", "From a request's head to the first look at its picture.", LONG_S
        )
        self._wait = histogram("wait_seconds", "From a picture's submission to its first stage.", LONG_S, "model")
        self._part = histogram("part_seconds", "Parts of drawing a picture.", LONG_S, "model", "part")
        self._stage = histogram("stage_seconds", "One stage of all that are drawn together.", STAGE_S, "model")
        self._adapt = histogram("adapt_seconds", "Changing the engines' weights for LoRAs.", LONG_S, "model")
        self._stages = counter("picture_stages", "Stages, counted for each picture in them.", "model")
        self._rows = counter("rows", "Rows of the denoiser: used, padded, and the capacity.", "model", "kind")
        self._admitted = counter("admitted", "Pictures that were taken on.", "model")
        self._delivered = counter("delivered", "Pictures that were answered, by their promise.", "model", "promise")
        self._rejected = counter("rejected", "Pictures that were not taken on.", "model", "reason")
        self._cancelled = counter("cancelled", "Pictures that nobody waits for any more.", "model", "when", "reason")
        self._failed = counter("failed", "Pictures that were answered with an error.", "model", "when", "error")
        models.watch(self.told)

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer. route: its template, never a path that a client wrote"""
        self._requests.labels(route, str(status)).observe(seconds)

    def looked(self, seconds: float) -> None:
        """Count a first look at a picture."""
        self._partial.observe(seconds)

    def told(self, source: Source, event: tell.Event) -> None:
        """Count an event of a batcher, on whatever thread."""
        model = source.model
        match event:
            case tell.Admitted():
                self._admitted.labels(model).inc()
            case tell.Refused():
                self._rejected.labels(model, event.reason).inc(event.pictures)
            case tell.Started():
                self._wait.labels(model).observe(event.wait_s)
            case tell.StageDone():
                self._stage_done(model, event)
            case tell.Delivered():
                self._delivered.labels(model, event.promise).inc()
                for part in ("encode", "denoise", "decode"):
                    self._part.labels(model, part).observe(event.seconds[part])
            case tell.Cancelled():
                self._cancelled.labels(model, event.when, "deadline" if event.expired else "client").inc()
            case tell.Failed():
                self._failed.labels(model, event.when, type(event.error).__name__).inc()
            case tell.WeightsChanged():
                self._adapt.labels(model).observe(event.seconds)

    def _stage_done(self, model: str, event: tell.StageDone) -> None:
        self._stage.labels(model).observe(event.seconds)
        self._stages.labels(model).inc(event.pictures)
        for kind, rows in (("used", event.used), ("padded", event.padded), ("capacity", event.capacity)):
            self._rows.labels(model, kind).inc(rows)


class Now(Collector):
    """What is read at the moment that somebody asks."""

    def __init__(self, models: Models, connections: Connections | None) -> None:
        self._models, self._connections = models, connections

    def collect(self) -> Iterator[Metric]:
        """Give the metrics as they are now."""
        models = self._models.all()
        of_models: Mapping[str, tuple[str, Callable[[Any], float]]] = {
            "running": ("Pictures that are being drawn.", lambda model: model.batcher.drawing),
            "waiting": ("Pictures that wait.", lambda model: model.batcher.waiting),
            "cache_bytes": ("What a loaded bundle takes of the memory for bundles.", lambda model: model.bytes),
        }
        for name, (words, read) in of_models.items():
            gauge = GaugeMetricFamily(f"latentrt_{name}", words, labels=("model",))
            for model in models:
                gauge.add_metric((model.name,), read(model))
            yield gauge
        ready = not (self._models.draining or self._models.opening)
        yield GaugeMetricFamily("latentrt_ready", "1 if requests are taken.", value=ready)
        info = InfoMetricFamily("latentrt_engine", "What draws.", labels=("model",))
        for model in models:
            info.add_metric((model.name,), {"backend": model.pipe.backend, "version": __version__})
        yield info
        loads = CounterMetricFamily("latentrt_loads", "Bundles that were loaded.", labels=("model", "outcome"))
        for (name, outcome), times in list(self._models.loads.items()):
            loads.add_metric((name, outcome), times)
        yield loads
        yield from self._of_connections()

    def _of_connections(self) -> Iterator[Metric]:
        """Give those of the sockets; there are none where another server has them."""
        count = 0 if self._connections is None else self._connections.count
        yield GaugeMetricFamily("latentrt_connections", "Open connections.", value=count)
        cut = CounterMetricFamily("latentrt_connections_cut", "Connections that were cut.", labels=("reason",))
        for reason, times in ({} if self._connections is None else dict(self._connections.cut)).items():
            cut.add_metric((reason,), times)
        yield cut
