"""How pictures are told: the answer that holds them all, or the events of a stream."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Literal

import msgspec

from latentrt.engines.spec import Array
from latentrt.runtime.draw.step import Step
from latentrt.runtime.request import Request
from latentrt.runtime.result import Result
from latentrt.runtime.serve.call import Call, Drawn
from latentrt.runtime.serve.openai.answers import (
    Completed,
    InputTokens,
    OutputTokens,
    Partial,
    Picture,
    Pictures,
    Usage,
)
from latentrt.runtime.serve.openai.asked import quality_of
from latentrt.runtime.serve.openai.schema import Drawing, Format
from latentrt.runtime.serve.openai.streams import frame
from latentrt.runtime.serve.pictures import encode, encode_pixels, grown, shown
from latentrt.runtime.text.tokenizer import Prompt

if TYPE_CHECKING:
    from latentrt.runtime.serve.models import Model

Keep = Callable[[bytes, Format], str]
"""keeps a file, of a format, and returns its address"""
Prefix = Literal["image_generation", "image_edit"]


class Telling:
    """Tells what is drawn for one body.

    prefix: of its events; keep: where pictures are kept, None where they are sent in the answer itself
    pool: threads that write files, of their own: what is to be taken or refused does not wait for them
    """

    def __init__(self, body: Drawing, call: Call, *, prefix: Prefix, keep: Keep | None, pool: Executor) -> None:
        self._body, self._call, self._prefix, self._keep, self._pool = body, call, prefix, keep, pool
        self._kind = body.output_format or "png"
        self._compression = 100 if body.output_compression is None else body.output_compression
        self._quality = quality_of(body)
        self._person = body.safety_identifier or body.user or None

    async def begin(self) -> AsyncIterator[bytes]:
        """Have the request taken; return the parts of its answer."""
        await self._call.begin()
        return self._events() if self._body.stream else self._whole()

    async def _whole(self) -> AsyncIterator[bytes]:
        results = await self._call.results()
        yield await self._beside(self._pictures, results)

    async def _events(self) -> AsyncIterator[bytes]:
        """Give the events of a stream: partial images, and each picture when it is done. Raises what drawing raises."""
        told: dict[int, int] = {}
        async for event in self._call.events():
            if isinstance(event, Drawn):
                yield await self._beside(self._completed, event)
            elif event.look is not None:
                index = told[event.picture] = told.get(event.picture, -1) + 1
                yield await self._beside(self._partial, event.picture, event.look, index)

    def _beside(self, write: Callable[..., bytes], *given: object) -> asyncio.Future[bytes]:
        return asyncio.get_running_loop().run_in_executor(self._pool, write, *given)

    def _pictures(self, results: list[Result]) -> bytes:
        width, height = results[0].settings[0].size
        answer = Pictures(
            created=int(time.time()),
            data=[self._picture(result) for result in results],
            background="opaque",
            output_format=self._kind,
            quality=self._quality,
            size=f"{width}x{height}",
            usage=self._usage(results),
            safety_identifier=self._person,
        )
        return msgspec.json.encode(answer)

    def _picture(self, result: Result) -> Picture:
        file = encode(result, self._kind, quality=self._compression)
        return Picture(
            b64_json=_text(file) if self._keep is None else None,
            url=None if self._keep is None else self._keep(file, self._kind),
            revised_prompt=None,
            seed=result.seeds[0],
            settings=result.settings[0],
            seconds=result.seconds,
        )

    def _completed(self, drawn: Drawn) -> bytes:
        result = drawn.result
        width, height = result.settings[0].size
        event = Completed(
            type=f"{self._prefix}.completed",
            b64_json=_text(encode(result, self._kind, quality=self._compression)),
            background="opaque",
            created_at=int(time.time()),
            output_format=self._kind,
            quality=self._quality,
            size=f"{width}x{height}",
            usage=self._usage([result]),
            image_index=drawn.picture,
            seed=result.seeds[0],
            settings=result.settings[0],
            seconds=result.seconds,
            safety_identifier=self._person,
        )
        return frame(event.type, msgspec.json.encode(event))

    def _partial(self, picture: int, step: Step, index: int) -> bytes:
        pixels = self._sketch(step)
        event = Partial(
            type=f"{self._prefix}.partial_image",
            b64_json=_text(encode_pixels(pixels, self._kind, quality=self._compression)),
            background="opaque",
            created_at=int(time.time()),
            output_format=self._kind,
            partial_image_index=index,
            quality=self._quality,
            size=f"{pixels.shape[1]}x{pixels.shape[0]}",
            image_index=picture,
            stage=step.stage,
            stages=step.stages,
        )
        return frame(event.type, msgspec.json.encode(event))

    def _sketch(self, step: Step) -> Array:
        """Return the picture that a stage predicts, (height, width, 3): the tiny decoder's, or the preview enlarged."""
        manifest = self._call.model.pipe.manifest
        if manifest.find("tiny_decoder") is not None:
            sketched: Array = step.draft_beside()[0]
            return sketched
        small, factor = step.preview[0], manifest.latents.factor
        return grown(small, (small.shape[1] * factor, small.shape[0] * factor))

    def _usage(self, results: list[Result]) -> Usage:
        """Return what was read and drawn: tokens of the texts, and a token for each cell of a picture's latents."""
        request, loaded = self._call.request, self._call.model.pipe.loaded
        texts = (text for text in (request.prompt, request.negative_prompt) if isinstance(text, str))
        read = sum(
            loaded.encoders.length(Prompt(text=text, syntax=request.prompt_syntax, overflow=request.overflow))
            for text in texts
        )
        factor = loaded.manifest.latents.factor
        cells = [(width // factor) * (height // factor) for width, height in (one.settings[0].size for one in results)]
        given = InputTokens(text_tokens=read, image_tokens=cells[0] * _images(request))
        drawn = OutputTokens(image_tokens=sum(cells))
        into = given.text_tokens + given.image_tokens
        return Usage(
            input_tokens=into,
            output_tokens=drawn.image_tokens,
            total_tokens=into + drawn.image_tokens,
            input_tokens_details=given,
            output_tokens_details=drawn,
        )


def looks_of(body: Drawing, model: Model) -> Callable[[int], Collection[int]] | None:
    """Return which stages a body wants to see, None if it wants no partial images or the bundle has no way to them."""
    manifest = model.pipe.manifest
    possible = manifest.latents.preview is not None or manifest.find("tiny_decoder") is not None
    count = body.partial_images if body.stream and possible else None
    return (lambda stages: shown(count, stages)) if count else None


def _images(request: Request) -> int:
    return 0 if request.image is None else len(request.image) if isinstance(request.image, list) else 1


def _text(file: bytes) -> str:
    return base64.b64encode(file).decode()
