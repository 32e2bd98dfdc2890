"""What is done for a picture beside the loop: text and start before its first stage, pixels after its last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

from latentrt.engines.errors import NotFiniteError
from latentrt.engines.spec import Array
from latentrt.engines.workspace.contract import STATE, WorkspaceShape
from latentrt.runtime.batching.ticket import Picture, Ticket
from latentrt.runtime.draw.draw import stream
from latentrt.runtime.draw.finite import LATENTS, finite, one_coloured
from latentrt.runtime.draw.job import latent_shape
from latentrt.runtime.draw.step import Noise
from latentrt.runtime.loaded import Loaded
from latentrt.runtime.result import Result

Work = Callable[[Ticket], None]


class InTurn:
    """Turns that are had one at a time, in the order in which they were asked for: calling it asks for one.

    Whoever asks has to have the turn, and gives it up for the next: `with turns():`.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._next = self._served = 0

    def __call__(self) -> AbstractContextManager[None]:
        """Ask for a turn; it begins when all that were asked for before are over."""
        with self._change:
            number, self._next = self._next, self._next + 1
        return self._turn(number)

    @contextmanager
    def _turn(self, number: int) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: self._served == number)
        try:
            yield
        finally:
            with self._change:
                self._served += 1
                self._change.notify_all()


class Beside:
    """Two threads beside the loop: one encodes, one decodes.

    change: is notified when something is done
    failed: is told of the pictures for which something failed, on the thread where it did
    cores: gives a turn, which is had meanwhile. Where engines fill the machine's cores the loop's stages have turns
        too: two networks at once have their threads wait for one another, which takes longer than one after the other.
        What comes first for its thread asks for its turn at once, and so has it before the next stage
    ended_at: when something was done last, on the clock of time.perf_counter
    """

    def __init__(
        self,
        change: threading.Condition,
        failed: Callable[[Ticket, BaseException], None],
        cores: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._change, self._failed, self._cores = change, failed, cores
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt-encode")
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt-decode")
        self._works = {self._encoder: 0, self._decoder: 0}
        self.ended_at = time.perf_counter()

    @property
    def under_way(self) -> int:
        """Return how much is being done, or to be done."""
        return sum(self._works.values())

    def encode(self, work: Work, ticket: Ticket) -> None:
        """Have something done before a picture's first stage."""
        self._submit(self._encoder, work, ticket)

    def decode(self, work: Work, ticket: Ticket) -> None:
        """Have something done after a picture's last stage."""
        self._submit(self._decoder, work, ticket)

    def _submit(self, pool: ThreadPoolExecutor, work: Work, ticket: Ticket) -> None:
        with self._change:
            turn = None if self._works[pool] else self._cores()
            self._works[pool] += 1

        def run() -> None:
            try:
                with turn or self._cores():
                    if not ticket.ended:
                        work(ticket)
            except BaseException as error:
                self._failed(ticket, error)
            finally:
                with self._change:
                    self._works[pool] -= 1
                    self.ended_at = time.perf_counter()
                    self._change.notify_all()

        pool.submit(run)

    def close(self) -> None:
        """Wait for what is under way, and end the threads."""
        self._encoder.shutdown()
        self._decoder.shutdown()


def prepare(loaded: Loaded, ticket: Ticket) -> None:
    """Encode a picture's text and image, with the weights that are loaded. Raises RequestError and EngineError."""
    start, job = time.perf_counter(), ticket.job
    (width, height), first = job.size, job.ranges[0]
    shape = WorkspaceShape(pictures=1, tokens=ticket.tokens[first.denoiser], width=width, height=height)
    draw = Noise(stream(job.request.noise, job.seeds, latent_shape(job.size, loaded.manifest.latents)))
    with loaded.drawing.explaining(job):
        texts = {part.denoiser: loaded.encode(job, part.denoiser) for part in job.ranges}
        inputs = loaded.drawing.begin(job, draw, loaded.drawing.fitting(shape), state_rows=ticket.group.state_rows)
    taken = time.perf_counter() - start
    ticket.picture = Picture(texts=texts, inputs=inputs, draw=draw, encode_s=taken, done=first.stages.start)


def finish(loaded: Loaded, ticket: Ticket) -> Result:
    """Decode a picture whose stages are done. Raises EngineError."""
    assert ticket.picture is not None
    job, picture, start = ticket.job, ticket.picture, time.perf_counter()
    with loaded.drawing.explaining(job):
        latents: Array = picture.inputs[STATE][:, 0]
        finite(latents, LATENTS, pictures=1, stage=picture.done, stages=job.plan.stages)
        pixels = loaded.drawing.decode(job, job.decoder, latents, tokens=ticket.tokens[ticket.part.denoiser])
    seconds = {
        "wait": ticket.waited() - picture.encode_s,
        "encode": picture.encode_s,
        "denoise": sum(ticket.step_seconds),
        "decode": time.perf_counter() - start,
        "total": ticket.limits.spent,
    }
    return Result(
        pixels=pixels,
        seeds=job.seeds,
        settings=(loaded.settings(job, 0),),
        seconds=seconds,
        step_seconds=tuple(ticket.step_seconds),
        backend=loaded.opened.choice.backend,
        reason=loaded.opened.choice.reason,
        warnings=one_coloured(pixels),
    )


def explained(loaded: Loaded, ticket: Ticket, error: NotFiniteError) -> BaseException:
    """Return an error with its likely causes."""
    try:
        with loaded.drawing.explaining(ticket.job):
            raise error
    except NotFiniteError as found:
        return found
