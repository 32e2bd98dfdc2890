"""One call of Triton under way: its pictures go back in order, and its slots are free when nobody waits for them."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from latentrt.engines.errors import (
    CancelledError,
    ClosedError,
    DeadlineError,
    DrainingError,
    LatentrtError,
    QueueFullError,
    RequestError,
)
from latentrt.runtime.calls import Cancellation
from latentrt.runtime.draw.step import Step
from latentrt.runtime.result import Result
from latentrt.runtime.serve.pictures import encode, encode_pixels, shown
from latentrt.runtime.triton.tensors import Asked

if TYPE_CHECKING:
    from latentrt.runtime.batching.batcher import Batcher

_log = logging.getLogger(__name__)

# The first that an error is an instance of; Triton's names for its codes.
CODES: Mapping[type[Exception], str] = {
    QueueFullError: "UNAVAILABLE",
    DrainingError: "UNAVAILABLE",
    ClosedError: "UNAVAILABLE",
    CancelledError: "CANCELLED",
    DeadlineError: "CANCELLED",
    RequestError: "INVALID_ARG",
    LatentrtError: "INTERNAL",
}


class Sender(Protocol):
    """Where answers go: Triton's response sender, behind what makes its responses."""

    def send(self, outputs: Mapping[str, bytes]) -> None: ...

    def fail(self, sentence: str, code: str) -> None:
        """Send an error, and end the answer."""
        ...

    def end(self) -> None: ...

    def is_cancelled(self) -> bool: ...


class Answer:
    """What goes back for one call. Encoding and sending are another thread's, in order; drawing does not wait for them.

    beside: runs one thing after another, off the threads that draw
    """

    def __init__(self, sender: Sender, beside: Executor, *, done: Callable[[Answer], None]) -> None:
        self._sender, self._beside, self._done = sender, beside, done
        self._cancel = Cancellation()
        self._lock = threading.Lock()  # Triton's sender must not be asked anything once its answer has ended
        self._open, self._left = True, 0

    def begin(self, asked: Asked, batcher: Batcher) -> None:
        """Have the call's pictures drawn: each is sent when it is done, and the end after all. Raises RequestError."""
        self._asked = asked
        futures = batcher.submit(asked.request, on_step=self._on_step, cancel=self._cancel)
        self._left = len(futures)
        for picture, future in enumerate(futures):
            future.add_done_callback(partial(self._finished, picture))

    def look_after(self) -> None:
        """Free the slots if the client is gone."""
        with self._lock:
            gone = self._open and self._sender.is_cancelled()
        if gone:
            self._cancel.cancel()

    def _on_step(self, picture: int, step: Step) -> None:
        self.look_after()
        stages = sorted(shown(self._asked.partials, step.stages))
        if step.stage in stages and not self._cancel.cancelled:
            pixels, stage = step.preview[0], {"stage": step.stage, "stages": step.stages}
            info = {"type": "partial", "picture": picture, "partial": stages.index(step.stage), **stage}
            self._beside.submit(self._send, lambda: encode_pixels(pixels, self._asked.format), info)

    def _finished(self, picture: int, future: Future[Result]) -> None:
        self._beside.submit(self._drawn, picture, future)

    def _drawn(self, picture: int, future: Future[Result]) -> None:
        if (error := future.exception()) is not None:
            self.fail(error)
            return
        result = future.result()
        info = {
            "type": "picture",
            "picture": picture,
            "seed": result.seeds[0],
            "settings": msgspec.to_builtins(result.settings[0]),
            "seconds": dict(result.seconds),
            "step_seconds": list(result.step_seconds),
            "backend": result.backend,
            "warnings": list(result.warnings),
        }
        self._send(partial(encode, result, self._asked.format, quality=self._asked.quality), info)
        self._left -= 1
        if not self._left:
            self._end(self._sender.end)

    def _send(self, picture: Callable[[], bytes], info: Mapping[str, Any]) -> None:
        try:
            file = picture()
            image = base64.b64encode(file) if self._asked.base64 else file
            with self._lock:
                if self._open:
                    self._sender.send({"image": image, "info": json.dumps(info).encode()})
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the answer with an error, and what is not drawn yet."""
        self._cancel.cancel()
        code = next((code for kind, code in CODES.items() if isinstance(error, kind)), None)
        if code is None:
            _log.error("a call met an error of the model itself", exc_info=error)
        sentence = str(error) if code else "the model has met an error of its own, which its log describes"
        self._end(partial(self._sender.fail, sentence, code or "INTERNAL"))

    def _end(self, ending: Callable[[], None]) -> None:
        with self._lock:
            if not self._open:
                return
            self._open = False
            try:
                ending()
            finally:
                self._done(self)
