"""The routes of OpenAI's Images API."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec
from starlette.requests import Request as WebRequest
from starlette.responses import Response
from starlette.routing import Route

from latentrt.runtime.serve.bodies import read_json, until_gone
from latentrt.runtime.serve.call import Call
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.openai.answers import Completed, ModelCard, ModelCards, Partial, Pictures
from latentrt.runtime.serve.openai.asked import Files, request_of
from latentrt.runtime.serve.openai.forms import read_form
from latentrt.runtime.serve.openai.kept import Kept
from latentrt.runtime.serve.openai.schema import Drawing, Edit, Generation
from latentrt.runtime.serve.openai.store import find, put
from latentrt.runtime.serve.openai.streams import Events
from latentrt.runtime.serve.openai.telling import Keep, Prefix, Telling, looks_of
from latentrt.runtime.serve.openapi import Operation
from latentrt.runtime.serve.web_errors import WebError

LONGEST_KEY = 256
OPERATIONS = (
    Operation(
        path="/v1/images/generations",
        method="post",
        summary="Draw pictures of a prompt",
        body=Generation,
        answer=Pictures,
        events=(Partial, Completed),
    ),
    Operation(
        path="/v1/images/edits",
        method="post",
        summary="Draw pictures of a prompt that start from an image",
        body=Edit,
        files=("image", "image[]", "mask", "controls[][image]", "image_prompts[][image]"),
        answer=Pictures,
        events=(Partial, Completed),
    ),
    Operation(path="/v1/models", method="get", summary="List the models by name, aliases too", answer=ModelCards),
    Operation(path="/v1/models/{name}", method="get", summary="Show a model", answer=ModelCard),
    Operation(path="/pictures/{name}", method="get", summary="Fetch a picture that was drawn for its url"),
)


def routes() -> list[Route]:
    """Return the routes of one service, with a memory of their own; the app's state holds the models."""
    images = Images()
    return [
        Route("/v1/images/generations", images.generations, methods=["POST"]),
        Route("/v1/images/edits", images.edits, methods=["POST"]),
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", show_model, methods=["GET"]),
        Route("/pictures/{name}", show_picture, methods=["GET"], name="picture"),
    ]


class Images:
    """What draws for the Images API, and remembers its answers by idempotency key."""

    def __init__(self) -> None:
        self._kept = Kept()
        self._pool = ThreadPoolExecutor(thread_name_prefix="latentrt-answer")

    async def generations(self, web: WebRequest) -> Response:
        """Draw pictures of a prompt."""
        return await self._draw(web, await read_json(web, Generation), {}, "image_generation")

    async def edits(self, web: WebRequest) -> Response:
        """Draw pictures of a prompt that start from an image."""
        form = await read_form(web)
        return await self._draw(web, form.parse(Edit), form.files, "image_edit")

    async def _draw(self, web: WebRequest, body: Drawing, files: Files, prefix: Prefix) -> Response:
        models: Models = web.app.state.models
        model = await models.find(body.model)
        request = await asyncio.to_thread(request_of, body, files, model, models.options)
        call = Call(model, request, looks=looks_of(body, model))
        keep = _keep(web) if body.response_format == "url" else None
        telling = Telling(body, call, prefix=prefix, keep=keep, pool=self._pool)
        key = _key(web)
        # Images are megabytes to read, for which the event loop has no time.
        digest = b"" if key is None else await asyncio.to_thread(_digest, body, files)
        reader = self._kept.join(key, digest, telling.begin)
        streaming = False
        try:
            await until_gone(web, reader.taken())
            if body.stream:
                streaming = True
                return Events(reader, reader_s=models.options.connecting.reader_s)
            return Response(await until_gone(web, reader.whole()), media_type="application/json")
        finally:
            if not streaming:
                reader.leave()


async def list_models(web: WebRequest) -> Response:
    """List the models by name, aliases too."""
    models: Models = web.app.state.models
    return _json(ModelCards(data=await asyncio.to_thread(lambda: [_card(name, models) for name in models.names])))


async def show_model(web: WebRequest) -> Response:
    """Show a model by its name or alias."""
    name, models = web.path_params["name"], web.app.state.models
    if name not in models.names:
        await models.find(name)  # which refuses it, with the names that there are
    return _json(await asyncio.to_thread(_card, name, models))


async def show_picture(web: WebRequest) -> Response:
    """Give a picture that was drawn for its `url`."""
    folder = web.app.state.models.options.pictures
    name = web.path_params["name"]
    file = None if folder is None else await asyncio.to_thread(find, folder, name)
    if file is None:
        raise WebError("there is no such picture, or no longer", status=404, code="picture_not_found")
    kind = f"image/{name.rpartition('.')[2]}"  # not of the system's table, which may say anything
    return Response(file, media_type=kind, headers={"cache-control": "private, max-age=3600"})


def _card(name: str, models: Models) -> ModelCard:
    return ModelCard(id=name, created=models.made_at(name))


def _keep(web: WebRequest) -> Keep:
    folder = web.app.state.models.options.pictures
    return lambda data, kind: str(web.url_for("picture", name=put(folder, data, kind)))


def _key(web: WebRequest) -> str | None:
    """Return the key under which an answer is kept, which nobody else's key is. Raises WebError, 400."""
    key = web.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= LONGEST_KEY:
        raise WebError(f"idempotency-key: found {len(key)} characters, expected 1 to {LONGEST_KEY}")
    return "\n".join((web.headers.get("authorization", ""), web.url.path, key))


def _digest(body: Drawing, files: Mapping[str, list[bytes]]) -> bytes:
    """Return what tells one request from another, however it was written."""
    digest = hashlib.sha256(msgspec.json.encode(body))
    for name in sorted(files):
        for data in files[name]:
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
    return digest.digest()


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
