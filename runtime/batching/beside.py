"""What is done for a picture beside the loop: text and start before its first stage, pixels after its last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

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
    """A lock that goes to whoever has waited for it longest, so that nobody takes it again before others had it."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._next = self._served = 0

    def __enter__(self) -> None:
        with self._change:
            number, self._next = self._next, self._next + 1
            self._change.wait_for(lambda: self._served == number)

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._served += 1
            self._change.notify_all()


class Beside:
    """Two threads beside the loop: one encodes, one decodes.

    change: is notified when something is done
    failed: is told of the pictures for which something failed, on the thread where it did
    cores: is held meanwhile. Where engines fill the machine's cores it is a lock that the loop's stages hold too: two
        networks at once have their threads wait for one another, which takes longer than one after the other
    ended_at: when something was done last, on the clock of time.perf_counter
    """

    def __init__(
        self,
        change: threading.Condition,
        failed: Callable[[Ticket, BaseException], None],
        cores: AbstractContextManager[None],
    ) -> None:
        self._change, self._failed, self._cores = change, failed, cores
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt-encode")
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt-decode")
        self.under_way = 0
        self.ended_at = time.perf_counter()

    def encode(self, work: Work, ticket: Ticket) -> None:
        """Have something done before a picture's first stage."""
        self._submit(self._encoder, work, ticket)

    def decode(self, work: Work, ticket: Ticket) -> None:
        """Have something done after a picture's last stage."""
        self._submit(self._decoder, work, ticket)

    def _submit(self, pool: ThreadPoolExecutor, work: Work, ticket: Ticket) -> None:
        with self._change:
            self.under_way += 1

        def run() -> None:
            try:
                if not ticket.ended:
                    with self._cores:
                        work(ticket)
            except BaseException as error:
                self._failed(ticket, error)
            finally:
                with self._change:
                    self.under_way -= 1
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
