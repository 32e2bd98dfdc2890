"""One request under way, for an event loop: its stages and pictures as they come, and an end when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from latentrt.engines.errors import CancelledError
from latentrt.runtime.calls import Cancellation
from latentrt.runtime.draw.step import Step
from latentrt.runtime.request import Request
from latentrt.runtime.result import Result
from latentrt.runtime.serve.offered import by_name
from latentrt.runtime.serve.operation.notes import note_look, note_prompt

if TYPE_CHECKING:
    from latentrt.runtime.serve.models import Model


class Stage(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A stage that a picture has passed. look: the kept step, where this stage was asked for; else None"""

    picture: int
    stage: int
    stages: int
    look: Step | None = None


class Drawn(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A picture that is done. result: of this one picture"""

    picture: int
    result: Result


Event = Stage | Drawn
Put = Callable[[Event | BaseException], None]
Looks = Callable[[int], Collection[int]]
"""gives the stages, of so many, after which a picture is looked at"""


class Call:
    """A request that a model draws: iterate over its events, in the order in which they happen.

    looks: the stages to look at; None for no `Stage` events at all
    Ending the iteration early, or `cancel`, frees the slots of all its pictures within a stage.
    """

    def __init__(self, model: Model, request: Request, *, looks: Looks | None = None) -> None:
        self.model, self.request = model, request
        self._looks = looks
        self._cancel = Cancellation()
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._begun, self._left = False, 0

    def cancel(self) -> None:
        """End it, from any thread: whoever iterates gets CancelledError."""
        self._cancel.cancel()

    async def begin(self) -> None:
        """Have the model take the request, before iterating. Raises what `Batcher.submit` raises.

        Being cancelled ends the request.
        """
        note_prompt(self.request.prompt)
        put = partial(self._put, asyncio.get_running_loop())
        watch = None if self._looks is None else partial(self._watch, put, self._looks)
        submit = partial(self.model.batcher.submit, self.request, on_step=watch, cancel=self._cancel)
        try:
            # Reading images and text takes milliseconds, which the event loop has not.
            with by_name(self.request):
                futures = await asyncio.to_thread(submit)
        except BaseException:
            self._cancel.cancel()
            raise
        self._begun, self._left = True, len(futures)
        for picture, future in enumerate(futures):
            future.add_done_callback(partial(_tell, put, picture))

    async def events(self) -> AsyncIterator[Event]:
        """Begin it, unless that was done, and give its events until all pictures are done.

        Raises as `begin` does, and the error of the first picture that fails, which ends the others.
        """
        try:
            if not self._begun:
                await self.begin()
            while self._left:
                event = await self._events.get()
                if isinstance(event, BaseException):
                    raise event
                self._left -= isinstance(event, Drawn)
                if isinstance(event, Stage) and event.look is not None:
                    note_look()
                yield event
        finally:
            self._cancel.cancel()

    async def results(self) -> list[Result]:
        """Wait for all pictures, in order. Raises as `events` does."""
        drawn = {event.picture: event.result async for event in self.events() if isinstance(event, Drawn)}
        return [drawn[picture] for picture in sorted(drawn)]

    def _put(self, loop: asyncio.AbstractEventLoop, event: Event | BaseException) -> None:
        if not loop.is_closed():  # a server that has ended asks for nothing any more
            loop.call_soon_threadsafe(self._events.put_nowait, event)

    @staticmethod
    def _watch(put: Put, looks: Looks, picture: int, step: Step) -> None:
        look = step.keep() if step.stage in looks(step.stages) else None
        put(Stage(picture=picture, stage=step.stage, stages=step.stages, look=look))


def _tell(put: Put, picture: int, future: Future[Result]) -> None:
    if future.cancelled():
        put(CancelledError("the picture was cancelled before it was drawn"))
    elif (error := future.exception()) is not None:
        put(error)
    else:
        put(Drawn(picture=picture, result=future.result()))
