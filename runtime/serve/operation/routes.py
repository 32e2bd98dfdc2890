"""What whoever runs the service asks it: is it alive, is it ready, what does it measure."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from latentrt.runtime.serve.models import Model, Models, Outcome
from latentrt.runtime.serve.openapi import Operation
from latentrt.runtime.serve.web_errors import WebError


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """The service is to be kept. models: those that are loaded"""

    status: Literal["ok"] = "ok"
    models: list[str]


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Requests are taken. models: those that are loaded"""

    status: Literal["ready"] = "ready"
    models: list[str]


class Reloaded(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the bundles that are loaded."""

    models: dict[str, Outcome]


OPERATIONS = (
    Operation(path="/healthz", method="get", summary="Is the process to be kept?", answer=Alive),
    Operation(path="/readyz", method="get", summary="Are requests taken?", answer=Ready),
    Operation(path="/admin/reload", method="post", summary="Load replaced bundles again", answer=Reloaded),
)


def routes() -> list[Route]:
    """Return the routes; the app's state holds the models and the metrics."""
    return [
        Route("/healthz", alive, methods=["GET"]),
        Route("/readyz", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/admin/reload", reload, methods=["POST"]),
    ]


async def alive(web: Request) -> Response:
    """Tell whether the process is to be kept. Raises WebError, 503, once a batcher hangs or a device is lost."""
    models: Models = web.app.state.models
    loaded = models.all()
    for model in loaded:
        if (state := state_of(model, models.options.hang_s)) != "ok":
            raise WebError(
                f"model: '{model.name}' {state}; start the service again",
                status=503,
                code=state.replace(" ", "_"),
                kind="server_error",
            )
    return _json(Alive(models=[model.name for model in loaded]))


def state_of(model: Model, hang_s: float) -> str:
    """Return `ok`, or what keeps a model from drawing. hang_s: seconds that a stage may take"""
    if model.batcher.lost is not None:
        return "lost its device"
    return "hangs" if time.perf_counter() - model.batcher.last_stage_at > hang_s else "ok"


async def ready(web: Request) -> Response:
    """Tell whether requests are taken: what is served was tested when it was loaded. Raises WebError, 503."""
    models: Models = web.app.state.models
    if models.draining or models.opening:
        raise WebError(
            "this service is about to end" if models.draining else "this service still loads its models",
            status=503,
            code="draining" if models.draining else "loading",
            kind="server_error",
            headers={"retry-after": "5"},
        )
    return _json(Ready(models=[model.name for model in models.all()]))


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


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
    return _json(Reloaded(models=outcomes))
