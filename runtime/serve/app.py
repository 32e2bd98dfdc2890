"""The web application: `build` it, and mount it or serve it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentrt.engines.errors import LatentrtError
from latentrt.runtime.serve import openapi
from latentrt.runtime.serve.a1111 import routes as a1111
from latentrt.runtime.serve.jobs import Jobs
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.openai import routes as openai
from latentrt.runtime.serve.operation import routes as operation
from latentrt.runtime.serve.operation.guards import Guards, refusal
from latentrt.runtime.serve.operation.journal import Journal
from latentrt.runtime.serve.operation.metrics import Metrics
from latentrt.runtime.serve.operation.requests import Requests
from latentrt.runtime.serve.options import Access
from latentrt.runtime.serve.page import routes as page
from latentrt.runtime.serve.web_errors import WebError

if TYPE_CHECKING:
    from latentrt.runtime.serve.operation.connections import Connections
    from latentrt.runtime.serve.operation.tracing import Tracing

CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def build(models: Models, connections: Connections | None = None, tracing: Tracing | None = None) -> Starlette:
    """Return the application that serves models. Whoever opened them closes them, after the application has ended.

    connections: of the server below, for the metrics; None where another server has them
    tracing: what writes spans of requests; None for no spans
    """
    # Pillow warns of damage in what clients send, in sentences without end, and Python remembers each of them.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    options, metrics = models.options, Metrics(models, connections)
    models.watch(Journal(tracing).told)
    routes = [*openai.routes(), *a1111.routes(models), *page.routes(), *operation.routes(), openapi.route()]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Requests, routes=routes, metrics=metrics, tracing=tracing, prompts=options.log_prompts),
            *cross_origin(options.access),
            Middleware(Guards, access=options.access, body_bytes=options.limits.body_bytes),
            Middleware(Faults),
        ],
        exception_handlers={
            WebError: refuse,
            LatentrtError: refuse,
            HTTPException: refuse,
            ClientDisconnect: nobody,
        },
    )
    app.state.models, app.state.jobs, app.state.metrics = models, Jobs(), metrics
    app.state.operations = (*openai.OPERATIONS, *a1111.OPERATIONS, *operation.OPERATIONS)
    return app


def cross_origin(access: Access) -> list[Middleware]:
    """Return what lets browsers show answers to pages of the sites that may use the service, where there are any."""
    if not access.origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after", "x-should-retry"),
        )
    ]


class Faults:
    """Answers where the service itself is at fault: Starlette does so outside of all, and its server then hangs up."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        started = False

        async def noticed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            await refusal(error, scope)(scope, receive, send)


async def refuse(web: Request, error: Exception) -> Response:
    """Answer with an error, in the form that clients of the path read."""
    if isinstance(error, HTTPException):
        code = CODES.get(error.status_code, "invalid_request")
        error = WebError(
            f"{web.method} {web.url.path}: {error.detail}",
            status=error.status_code,
            code=code,
            headers=dict(error.headers or {}),
        )
    return refusal(error, web.scope)


async def nobody(*_: object) -> Response:
    """Answer where nobody listens any more."""
    return Response(status_code=499)
