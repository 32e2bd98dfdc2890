"""The routes of the page and of jobs."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from contextlib import suppress

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request as WebRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from latentrt.runtime.images.read_parameters import parse, read_text
from latentrt.runtime.serve.bodies import media_type, read, read_json
from latentrt.runtime.serve.jobs import Job, Jobs, View
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.openai.asked import request_of
from latentrt.runtime.serve.openai.forms import read_form
from latentrt.runtime.serve.openai.schema import Drawing, Edit, Generation
from latentrt.runtime.serve.page import files
from latentrt.runtime.serve.page.choices import choices
from latentrt.runtime.serve.web_errors import WebError

SESSION = "x-latentrt-session"
SEND_S = 30.0  # for which a client may take nothing
PACE_S, HEARTBEAT_S = 0.1, 10.0  # events at most so often; and so long may nothing be sent
RECOUNT_S = 0.5  # places in the line change without a word, and so does whether the service ends


class AllBut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /jobs/cancel. but: the id of a job that goes on"""

    but: str | None = None


def routes() -> list[Route]:
    """Return the routes; the app's state holds the models and the jobs."""
    return [
        Route("/jobs", submit, methods=["POST"]),
        Route("/jobs", list_jobs, methods=["GET"]),
        Route("/jobs/events", follow, methods=["GET"]),
        Route("/jobs/cancel", cancel, methods=["POST"]),
        Route("/jobs/choices", list_choices, methods=["GET"]),
        Route("/jobs/settings", settings, methods=["POST"]),
        Route("/jobs/{job}", show, methods=["GET"]),
        Route("/jobs/{job}", forget, methods=["DELETE"]),
        Route("/jobs/{job}/pictures/{picture}", picture, methods=["GET"]),
        *files.routes(),
    ]


async def submit(web: WebRequest) -> Response:
    """Begin a job: its body is that of a generation, or with an image the form of an edit."""
    owner, models = _owner(web), _models(web)
    body: Drawing
    if media_type(web) == "multipart/form-data":
        form = await read_form(web)
        body, sent = form.parse(Edit), form.files
    else:
        body, sent = await read_json(web, Generation), {}
    _refuse_others(body)
    model = await models.find(body.model)
    request = await asyncio.to_thread(request_of, body, sent, model, models.options)
    job = await _jobs(web).submit(model, request, owner)
    return _json(job.view(), status=202)


def _refuse_others(body: Drawing) -> None:
    """Refuse what asks for another answer than a job's: PNGs to fetch, and events of all jobs. Raises WebError."""
    others = {"stream": True, "response_format": "url", "output_format": ("jpeg", "webp")}
    for name, other in others.items():
        value = getattr(body, name)
        if value is not None and (value in other if isinstance(other, tuple) else value == other):
            raise WebError(
                f"{name}: found '{value}': a job's pictures are PNGs that are fetched when they are done; omit it",
                code="unsupported_value",
                param=name,
            )


async def list_jobs(web: WebRequest) -> Response:
    """List the session's jobs, the oldest first."""
    return _json({"jobs": [job.view() for job in _jobs(web).of(_owner(web))]})


async def show(web: WebRequest) -> Response:
    """Show one job."""
    return _json(_job(web).view())


async def forget(web: WebRequest) -> Response:
    """Cancel one job; forget it where it is over."""
    job = _job(web)
    if job.over:
        _jobs(web).forget(job)
    else:
        job.cancel()
    return Response(status_code=204)


async def cancel(web: WebRequest) -> Response:
    """Cancel all jobs of the session, or all but one."""
    body = await read_json(web, AllBut)
    return _json({"cancelled": _jobs(web).cancel(_owner(web), but=body.but)})


async def picture(web: WebRequest) -> Response:
    """Give a picture's file."""
    number = web.path_params["picture"]
    file = _job(web).files.get(int(number)) if re.fullmatch(r"\d{1,4}", number, re.ASCII) else None
    if file is None:
        raise WebError("this job has no such picture, or has it not yet", status=404, code="picture_not_found")
    return Response(file, media_type="image/png", headers={"cache-control": "private, max-age=3600, immutable"})


async def list_choices(web: WebRequest) -> Response:
    """List what the page can offer."""
    return _json(await asyncio.to_thread(choices, _models(web)))


async def settings(web: WebRequest) -> Response:
    """Read the settings out of a picture, which is the body. Raises WebError, 404, where it has none."""
    text = await asyncio.to_thread(read_text, await read(web))
    if text is None:
        raise WebError("this picture says nothing of its settings", status=404, code="no_settings", param="image")
    return _json(parse(text))


async def follow(web: WebRequest) -> Response:
    """Follow the session's jobs: first all of them, then each that changes, and previews."""
    if _jobs(web).crowded(_owner(web)):
        raise WebError(
            "as many follow this session's jobs as may; close one of them",
            status=429,
            code="too_many_followers",
            kind="rate_limit_error",
            headers={"retry-after": "5"},
        )
    return Following(_events(_jobs(web), _models(web), _owner(web)), ping=HEARTBEAT_S, send_timeout=SEND_S)


class Following(EventSourceResponse):
    """The events of a session's jobs, until its client goes, or takes nothing of them for so long."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        with suppress(SendTimeoutError):
            await super().__call__(scope, receive, send)


class Told(msgspec.Struct, kw_only=True):
    """What a follower knows of a job. stages: that its previews show, by picture"""

    view: View | None = None
    stages: dict[int, int] = {}


async def _events(jobs: Jobs, models: Models, owner: str) -> AsyncIterator[ServerSentEvent]:
    """Give what has changed since it was last given: who reads slowly is told less often, and nothing piles up.

    `job` has a job's view, `preview` a picture of one, `gone` the id of one that is forgotten; `ready` follows all that
    there was at first. A service that is about to end has no more to tell once nothing is being drawn.
    """
    known: dict[str, Told] = {}
    ready = False
    if jobs.crowded(owner):  # others came between the first look and now
        return
    with jobs.follow(owner) as changed:
        while True:
            changed.clear()
            mine = jobs.of(owner)
            for number in known.keys() - {job.id for job in mine}:
                del known[number]
                yield _event("gone", {"id": number})
            for job in mine:
                async for event in _news(job, known.setdefault(job.id, Told())):
                    yield event
            if not ready:
                yield _event("ready", {})
            ready = True
            if models.draining and all(job.over for job in mine):
                return
            await asyncio.sleep(PACE_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), RECOUNT_S)


async def _news(job: Job, told: Told) -> AsyncIterator[ServerSentEvent]:
    if (view := job.view()) != told.view:
        told.view = view
        yield _event("job", view)
    if job.over:
        return
    for number, (stage, file) in (await job.previews()).items():
        if told.stages.get(number) != stage:
            told.stages[number] = stage
            source = f"data:image/png;base64,{base64.b64encode(file).decode()}"
            yield _event("preview", {"id": job.id, "picture": number, "source": source})


def _event(kind: str, data: object) -> ServerSentEvent:
    return ServerSentEvent(msgspec.json.encode(data).decode(), event=kind)


def _json(data: object, *, status: int = 200) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(msgspec.json.encode(data), status_code=status, media_type="application/json", headers=headers)


def _owner(web: WebRequest) -> str:
    """Return whose jobs are meant: a random name that the page made up, which is no login."""
    found = web.headers.get(SESSION, "")
    if re.fullmatch(r"[A-Za-z0-9_-]{16,64}", found, re.ASCII) is None:
        raise WebError(f"{SESSION}: expected 16 to 64 random letters and digits in this header", param=SESSION)
    return found


def _job(web: WebRequest) -> Job:
    return _jobs(web).find(_owner(web), web.path_params["job"])


def _jobs(web: WebRequest) -> Jobs:
    jobs: Jobs = web.app.state.jobs
    return jobs


def _models(web: WebRequest) -> Models:
    models: Models = web.app.state.models
    return models
