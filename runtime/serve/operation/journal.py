"""What became of each picture, in the log and in traces, with the id of the request that it belongs to."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from latentrt.runtime.batching import observer as tell
from latentrt.runtime.serve.models import Source
from latentrt.runtime.serve.operation.notes import CURRENT, Note

if TYPE_CHECKING:
    from latentrt.runtime.serve.operation.tracing import Tracing

logger = logging.getLogger(__name__)


class Journal:
    """Writes down what the batchers tell, on whatever thread. Prompts are no part of it."""

    def __init__(self, tracing: Tracing | None) -> None:
        self._tracing = tracing
        self._lock = threading.Lock()
        self._notes: dict[tuple[Source, int], Note | None] = {}  # of the pictures that are not answered yet

    def told(self, source: Source, event: tell.Event) -> None:
        """Take an event of a batcher down. A picture is admitted in the context of its request."""
        match event:
            case tell.Admitted():
                note = CURRENT.get()
                with self._lock:
                    self._notes[source, event.picture] = note
                    if note is not None:
                        note.pictures += 1
            case tell.Delivered():
                seconds = {part: round(value, 4) for part, value in event.seconds.items()}
                note = self._over(source, event.picture, "drawn", seconds=seconds, promise=event.promise)
                if self._tracing is not None:
                    self._tracing.picture(note, source.model, event.seconds)
            case tell.Cancelled():
                self._over(source, event.picture, "expired" if event.expired else "cancelled", when=event.when)
            case tell.Failed():
                self._over(source, event.picture, "failed", when=event.when, error=str(event.error))

    def _over(self, source: Source, picture: int, outcome: str, **fields: object) -> Note | None:
        with self._lock:
            note = self._notes.pop((source, picture), None)
        about = {"request_id": note and note.request_id, "model": source.model, "picture": picture, **fields}
        level = logging.WARNING if outcome == "failed" else logging.INFO
        logger.log(level, "a picture was %s", outcome, extra={"fields": about})
        return note
