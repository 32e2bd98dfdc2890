"""The routes of OpenAI's Images API."""

from __future__ import annotations

import asyncio
import base64
import time
from functools import partial
from typing import Any

from starlette.requests import Request as WebRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from latentrt.runtime.result import Result
from latentrt.runtime.serve.bodies import read_json, until_gone
from latentrt.runtime.serve.call import Call
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.openai.asked import request_of
from latentrt.runtime.serve.openai.schema import Drawing, Generation
from latentrt.runtime.serve.pictures import encode


def routes() -> list[Route]:
    """Return the routes; the app's state holds the models."""
    return [
        Route("/v1/images/generations", generations, methods=["POST"]),
        Route("/v1/models", list_models, methods=["GET"]),
    ]


async def generations(web: WebRequest) -> Response:
    """Draw pictures of a prompt."""
    body = await read_json(web, Generation)
    models: Models = web.app.state.models
    call = Call(await models.find(body.model), request_of(body, models.options.limits))
    results = await until_gone(web, call.results())
    return JSONResponse(await asyncio.to_thread(answer, body, results))


async def list_models(web: WebRequest) -> Response:
    """List the models by name, aliases too."""
    models: Models = web.app.state.models
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "latentrt"} for name in models.names]
    return JSONResponse({"object": "list", "data": data})


def answer(body: Drawing, results: list[Result]) -> dict[str, Any]:
    """Return the answer that has all pictures of a request."""
    kind = body.output_format or "png"
    quality = 100 if body.output_compression is None else body.output_compression
    files = map(partial(encode, kind=kind, quality=quality), results)
    data = [
        {"b64_json": base64.b64encode(file).decode(), "seed": result.seeds[0], "seconds": dict(result.seconds)}
        for file, result in zip(files, results, strict=True)
    ]
    width, height = results[0].settings[0].size
    return {"created": int(time.time()), "data": data, "output_format": kind, "size": f"{width}x{height}"}
