"""What whoever runs the service asks it: is it alive, is it ready, what does it measure."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from latentrt.runtime.serve.models import Model, Models
from latentrt.runtime.serve.web_errors import WebError


def routes() -> list[Route]:
    """Return the routes; the app's state holds the models and the metrics."""
    return [
        Route("/healthz", alive, methods=["GET"]),
        Route("/readyz", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/admin/reload", reload, methods=["POST"]),
    ]


async def alive(web: Request) -> Response:
    """Tell whether the process is to be kept: 503 once a batcher hangs or a device is lost."""
    models: Models = web.app.state.models
    states = {model.name: state_of(model, models.options.hang_s) for model in models.all()}
    well = set(states.values()) <= {"ok"}
    return JSONResponse({"status": "ok" if well else "failed", "models": states}, status_code=200 if well else 503)


def state_of(model: Model, hang_s: float) -> str:
    """Return `ok`, or what keeps a model from drawing. hang_s: seconds that a stage may take"""
    if model.batcher.lost is not None:
        return "device lost"
    silent = time.perf_counter() - model.batcher.last_stage_at
    return "hangs" if silent > hang_s else "ok"


async def ready(web: Request) -> Response:
    """Tell whether requests are taken: 503 while the service ends. What it serves was tested when it was loaded."""
    models: Models = web.app.state.models
    if models.draining:
        return JSONResponse({"status": "draining"}, status_code=503, headers={"retry-after": "5"})
    return JSONResponse({"status": "ready", "loaded": [model.name for model in models.all()]})


async def metrics(web: Request) -> Response:
    """Give all metrics in Prometheus' text format."""
    return Response(web.app.state.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


async def reload(web: Request) -> Response:
    """Load the bundles again that were replaced on disk, and tell what became of each. Raises WebError: 403, 500."""
    models: Models = web.app.state.models
    if not models.options.access.keys:
        raise WebError(
            "this service has no API key, so that anybody could ask for this; start it with --api-key-file, or send "
            "its process SIGHUP",
            status=403,
            code="no_key",
        )
    outcomes = await asyncio.to_thread(models.reload)
    if failed := [name for name, outcome in outcomes.items() if outcome == "failed"]:
        raise WebError(
            f"model: {', '.join(failed)} could not be loaded again and is served as it was; the log says why",
            status=500,
            code="reload_failed",
            kind="server_error",
            headers={"x-should-retry": "false"},
        )
    return JSONResponse({"models": outcomes})
