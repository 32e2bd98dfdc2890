"""The routes of A1111's API."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as WebRequest
from starlette.responses import Response
from starlette.routing import Route

from latentrt.engines.errors import RequestError
from latentrt.runtime.images.read_parameters import parse as parse_text
from latentrt.runtime.images.read_parameters import read_text
from latentrt.runtime.serve.a1111 import listings
from latentrt.runtime.serve.a1111.answers import answer
from latentrt.runtime.serve.a1111.asked import parse, request_of
from latentrt.runtime.serve.a1111.errors import Refused, renamed
from latentrt.runtime.serve.a1111.images import file_of
from latentrt.runtime.serve.a1111.running import Desk, caller_of
from latentrt.runtime.serve.a1111.schema import Drawing, Drawn, Img2Img, PngInfo, Txt2Img, Written
from latentrt.runtime.serve.a1111.settings import Settings
from latentrt.runtime.serve.bodies import read_json, until_gone
from latentrt.runtime.serve.models import Model, Models
from latentrt.runtime.serve.offered import lora_files
from latentrt.runtime.serve.openapi import Operation

T = TypeVar("T", bound=Drawing)
Options = dict[str, Any]
BELOW = "/sdapi/v1/"
_posted: tuple[tuple[str, str, Any, Any], ...] = (
    ("txt2img", "Draw pictures of a prompt", Txt2Img, Drawn),
    ("img2img", "Draw pictures of a prompt and an image", Img2Img, Drawn),
    ("png-info", "Read a picture's settings", PngInfo, Written),
    ("options", "Set options", Options, None),
    ("interrupt", "End the caller's pictures", None, None),
)
_got = {
    "options": "Show the options",
    "samplers": "List the samplers",
    "schedulers": "List how samplers may space their steps",
    "sd-models": "List the models",
    "sd-vae": "List VAEs",
    "upscalers": "List upscalers",
    "latent-upscale-modes": "List upscalers of latents",
    "loras": "List the LoRAs",
    "embeddings": "List the learned words",
    "progress": "Tell how far the caller's pictures are",
}
OPERATIONS = (
    *(
        Operation(path=BELOW + name, method="post", summary=summary, body=body, answer=answer, error=Refused)
        for name, summary, body, answer in _posted
    ),
    *(Operation(path=BELOW + name, method="get", summary=text, error=Refused) for name, text in _got.items()),
)


def routes(models: Models) -> list[Route]:
    """Return the routes of a service, with settings of its own."""
    return A1111(models).routes()


class A1111:
    """A service's A1111 API. Its settings hold for all who call it, until the process ends, as in A1111's."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._desk = Desk()
        self._settings = Settings(sd_model_checkpoint=next(iter(models.names), ""))

    def routes(self) -> list[Route]:
        """Return the routes."""
        gets = {
            "options": self.options,
            "samplers": self.samplers,
            "schedulers": self.schedulers,
            "sd-models": self.sd_models,
            "sd-vae": self.nothing,
            "upscalers": self.upscalers,
            "latent-upscale-modes": self.nothing,
            "loras": self.loras,
            "embeddings": self.embeddings,
            "progress": self.progress,
        }
        posts = {
            "options": self.set_options,
            "txt2img": self.txt2img,
            "img2img": self.img2img,
            "png-info": self.png_info,
            "interrupt": self.interrupt,
        }
        return [
            *(Route(BELOW + name, handler, methods=["GET"]) for name, handler in gets.items()),
            *(Route(BELOW + name, handler, methods=["POST"]) for name, handler in posts.items()),
        ]

    async def txt2img(self, web: WebRequest) -> Response:
        """Draw pictures of a prompt."""
        return await self._draw(web, Txt2Img)

    async def img2img(self, web: WebRequest) -> Response:
        """Draw pictures of a prompt and an image."""
        return await self._draw(web, Img2Img)

    async def _draw(self, web: WebRequest, kind: type[T]) -> Response:
        body = parse(await read_json(web, Options), kind)
        settings = self._settings.changed(_overrides(body))
        model = await self._models.find(settings.sd_model_checkpoint)
        try:
            request = await asyncio.to_thread(request_of, body, settings, model, self._models.options)
            with self._desk.job(caller_of(web), model, request) as job:
                await job.begin(request)
                await until_gone(web, job.wait())
        except RequestError as error:
            raise renamed(error) from error
        if body.override_settings_restore_afterwards is False:
            self._settings = settings
        if job.error:
            raise renamed(job.error)
        return _json(await asyncio.to_thread(answer, body, request, job))

    async def progress(self, web: WebRequest) -> Response:
        """Tell how far the caller's pictures are."""
        look = web.query_params.get("skip_current_image", "false").lower() not in ("true", "1")
        return _json(await self._desk.progress(caller_of(web), look=look))

    async def interrupt(self, web: WebRequest) -> Response:
        """End the caller's pictures."""
        self._desk.interrupt(caller_of(web))
        return _json({})

    async def options(self, _: WebRequest) -> Response:
        """Give all options."""
        return _json(self._settings.options)

    async def set_options(self, web: WebRequest) -> Response:
        """Set some options, or all that were given back."""
        settings = self._settings.changed(await read_json(web, Options))
        await self._models.find(settings.sd_model_checkpoint)
        self._settings = settings
        return _json(None)

    async def png_info(self, web: WebRequest) -> Response:
        """Give the settings that a picture's file holds."""
        body = parse(await read_json(web, Options), PngInfo)
        file = await asyncio.to_thread(file_of, body.image.strip(), "image")
        text = str(await asyncio.to_thread(read_text, file) or "")
        found = parse_text(text)
        named = {"Prompt": found.prompt, "Negative prompt": found.negative_prompt or ""} if text else {}
        items = {"parameters": text} if text else {}
        return _json(Written(info=text, items=items, parameters=named | found.pairs))

    async def samplers(self, _: WebRequest) -> Response:
        """List the samplers of the model that is set."""
        return _json(listings.samplers(await self._model()))

    async def schedulers(self, _: WebRequest) -> Response:
        """List how samplers may space their steps."""
        return _json(listings.schedulers())

    async def sd_models(self, _: WebRequest) -> Response:
        """List the models."""
        return _json(listings.models(self._models.names))

    async def upscalers(self, _: WebRequest) -> Response:
        """List the upscalers: there are none, which is A1111's first one."""
        none = {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return _json([none])

    async def nothing(self, _: WebRequest) -> Response:
        """List what there is none of."""
        return _json([])

    async def loras(self, _: WebRequest) -> Response:
        """List the LoRAs that prompts may name."""
        return _json(listings.loras(await asyncio.to_thread(lora_files, self._models.options)))

    async def embeddings(self, _: WebRequest) -> Response:
        """List the learned words of the model that is set."""
        return _json(listings.embeddings(await self._model()))

    async def _model(self) -> Model:
        return await self._models.find(self._settings.sd_model_checkpoint)


def _overrides(body: Drawing) -> Options:
    """Return the options of a body, for its own pictures; SD.Next has a field for one of them."""
    own = {} if body.clip_skip is None else {"CLIP_stop_at_last_layers": body.clip_skip}
    return own | (body.override_settings or {})


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
