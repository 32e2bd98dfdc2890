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

    def cancel(self) -> None:
        """End it, from any thread: whoever iterates gets CancelledError."""
        self._cancel.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """Submit it, and give its events until all pictures are done.

        Raises what `Batcher.submit` raises, and the error of the first picture that fails, which ends the others.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()

        def put(event: Event | BaseException) -> None:
            if not loop.is_closed():  # a server that has ended asks for nothing any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        def watch(picture: int, step: Step) -> None:
            assert self._looks is not None
            looked = step.keep() if step.stage in self._looks(step.stages) else None
            put(Stage(picture=picture, stage=step.stage, stages=step.stages, look=looked))

        on_step = None if self._looks is None else watch
        try:
            # Reading images and text takes milliseconds, which the event loop has not.
            submit = partial(self.model.batcher.submit, self.request, on_step=on_step, cancel=self._cancel)
            futures = await asyncio.to_thread(submit)
            for picture, future in enumerate(futures):
                future.add_done_callback(partial(_tell, put, picture))
            left = len(futures)
            while left:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                left -= isinstance(event, Drawn)
                yield event
        finally:
            self._cancel.cancel()

    async def results(self) -> list[Result]:
        """Wait for all pictures, in order. Raises as `events` does."""
        drawn = {event.picture: event.result async for event in self.events() if isinstance(event, Drawn)}
        return [drawn[picture] for picture in sorted(drawn)]


def _tell(put: Callable[[Event | BaseException], None], picture: int, future: Future[Result]) -> None:
    if future.cancelled():
        put(CancelledError("the picture was cancelled before it was drawn"))
    elif (error := future.exception()) is not None:
        put(error)
    else:
        put(Drawn(picture=picture, result=future.result()))
