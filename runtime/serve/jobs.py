"""Jobs: requests that the service remembers, so that whoever asked may go away and come back for the pictures."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Literal

import msgspec
from cachetools import TTLCache

from latentrt.engines.errors import BundleError, CancelledError, QueueFullError
from latentrt.runtime.calls import Cancellation
from latentrt.runtime.draw.step import Step
from latentrt.runtime.request import Request
from latentrt.runtime.result import Result, Settings
from latentrt.runtime.serve.models import Model
from latentrt.runtime.serve.offered import by_name
from latentrt.runtime.serve.operation.notes import note_prompt
from latentrt.runtime.serve.pictures import encode, encode_pixels
from latentrt.runtime.serve.web_errors import WebError, web_error

if TYPE_CHECKING:
    from latentrt.runtime.batching.batcher import Batcher

State = Literal["waiting", "drawing", "done", "failed", "cancelled"]
LOOK_S = 0.15  # a preview at most so often: reading the latents waits for the device


class JobLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered at the most.

    active: jobs of one owner that are not over; followers: connections that follow them
    over: jobs that are over, of all owners, of which the oldest are forgotten
    bytes: of their pictures; age_s: seconds after which a job that is over is forgotten
    """

    active: int = 64
    followers: int = 16
    over: int = 500
    bytes: int = 512 * 2**20
    age_s: float = 2 * 3600


class DrawnPicture(msgspec.Struct, frozen=True, kw_only=True):
    """A picture of a job. picture: its number in the job; seconds: by stage, as in a `Result`"""

    picture: int
    seed: int
    settings: Settings
    seconds: Mapping[str, float]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is now, for a client.

    created: seconds since 1970; asked: what there is to show before anything is drawn
    position: in the line, from 1 up, None where it does not wait; step, steps: of the picture that is behind most
    progress: 0 to 1, of all its pictures; eta_s: seconds that are left, None where that is not known
    error: as OpenAI's error object has it
    """

    id: str
    model: str
    state: State
    created: float
    asked: Mapping[str, object]
    position: int | None
    step: int
    steps: int
    progress: float
    eta_s: float | None
    pictures: tuple[DrawnPicture, ...]
    error: Mapping[str, str | None] | None


class Job:
    """A request that is being drawn, or was. Its pictures' files, PNGs, are in `files`, by their numbers."""

    def __init__(self, model: Model, request: Request, owner: str, changed: Callable[[Job], None]) -> None:
        self.id, self.owner = secrets.token_urlsafe(16), owner
        self.files: dict[int, bytes] = {}
        self.error: WebError | None = None
        self.created = time.time()
        self._asked, self._model = _asked(request), model.name
        self._batcher: Batcher | None = model.batcher  # None when it is over: a model that was replaced is not kept
        self._changed = changed
        self._cancel = Cancellation()
        self._futures: list[Future[Result]] = []
        self._count = 1
        self._stages: dict[int, tuple[int, int]] = {}  # picture: those that are done, and all
        self._began: dict[int, tuple[float, int]] = {}  # picture: when its first stage was done, and which that was
        self._looked: dict[int, tuple[float, Step]] = {}  # picture: when, and the stage
        self._previews: dict[int, tuple[int, bytes]] = {}  # picture: the stage, and the file
        self._drawn: dict[int, DrawnPicture] = {}
        self._end: State | None = None  # once nothing more will come of it
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """Return how far it has come. Stages are drawn on another thread than the one that it ends on."""
        return self._end or ("drawing" if self._began else "waiting")

    @property
    def over(self) -> bool:
        """Tell whether nothing more will come of it."""
        return self._end is not None

    def cancel(self) -> None:
        """End it within a stage; pictures that are done stay."""
        self._cancel.cancel()

    async def begin(self, request: Request) -> None:
        """Submit it. Raises what `Batcher.submit` raises."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            if not loop.is_closed():  # a service that has ended follows nothing any more
                loop.call_soon_threadsafe(self._changed, self)

        note_prompt(request.prompt)
        assert self._batcher is not None
        submit = partial(self._batcher.submit, request, cancel=self._cancel)
        with by_name(request):
            self._futures = await asyncio.to_thread(submit, on_step=partial(self._step, tell))
        self._count = len(self._futures)
        self._task = asyncio.create_task(self._finish())

    async def wait(self) -> None:
        """Wait until it is over."""
        assert self._task is not None
        await asyncio.shield(self._task)

    def _step(self, tell: Callable[[], None], picture: int, step: Step) -> None:
        """Take a stage in, on the batcher's thread."""
        now = time.perf_counter()
        self._began.setdefault(picture, (now, step.stage))  # first: whoever reads the stages looks for it
        self._stages[picture] = step.stage, step.stages
        if picture not in self._looked or now - self._looked[picture][0] >= LOOK_S:
            self._looked[picture] = now, step.keep()
        if self.over:  # another of its pictures has failed meanwhile
            self._looked.clear()
        tell()

    async def _finish(self) -> None:
        """Take the pictures in as they come."""
        try:
            await asyncio.gather(*(self._take(number, one) for number, one in enumerate(self._futures)))
            self._end = "done"
        except CancelledError:
            self._end = "cancelled"
        except Exception as error:
            self._end, self.error = "failed", web_error(error)
        self._cancel.cancel()  # where one has failed, the others
        self._batcher, self._futures = None, []  # nor are the pixels, beside the files
        self._looked.clear()
        self._previews.clear()
        self._changed(self)

    async def _take(self, picture: int, future: Future[Result]) -> None:
        result = await asyncio.wrap_future(future)
        self.files[picture] = await asyncio.to_thread(encode, result, "png")
        self._drawn[picture] = DrawnPicture(
            picture=picture, seed=result.seeds[0], settings=result.settings[0], seconds=result.seconds
        )
        self._changed(self)

    async def previews(self) -> dict[int, tuple[int, bytes]]:
        """Return the newest preview of each picture that is not done: the stage that it shows, and a PNG.

        It is small, one pixel for each latent. Without a preview in the bundle there are none.
        """
        for picture, (_, step) in list(self._looked.items()):
            if self._previews.get(picture, (0, b""))[0] != step.stage:
                with suppress(BundleError):
                    self._previews[picture] = step.stage, await asyncio.to_thread(_preview, step)
        if self.over:  # since a moment ago
            self._previews.clear()
        return {picture: one for picture, one in self._previews.items() if picture not in self.files}

    def view(self) -> View:
        """Return what a client is told of it."""
        left = [pair for picture, pair in list(self._stages.items()) if picture not in self.files]
        step, steps = min(left, default=max(self._stages.values(), default=(0, 0)))
        return View(
            id=self.id,
            model=self._model,
            state=self.state,
            created=self.created,
            asked=self._asked,
            position=self._position() if self.state == "waiting" else None,
            step=step,
            steps=steps,
            progress=round(self._progress, 4),
            eta_s=None if self.over else self._eta(),
            pictures=tuple(self._drawn[picture] for picture in sorted(self._drawn)),
            error=self.error.body["error"] if self.error else None,
        )

    @property
    def _progress(self) -> float:
        if self.state == "done":
            return 1.0
        done = sum(stage / stages for stage, stages in list(self._stages.values()))
        return done / self._count

    def _position(self) -> int | None:
        places = (self._batcher.position(future) for future in self._futures) if self._batcher else ()
        return min((place for place in places if place is not None), default=None)

    def _eta(self) -> float | None:
        """Return the seconds that are left, if each stage takes as long as those since a picture's first did."""
        now, left, whole = time.perf_counter(), [], []
        for picture, (done, stages) in list(self._stages.items()):
            began, first = self._began[picture]
            if picture not in self.files and done > first:
                each = (now - began) / (done - first)
                left.append(each * (stages - done))
                whole.append(each * stages)
        if not left:
            return None
        turns = (self._count - len(self._stages)) / len(left)  # for those that wait, if as many share stages
        return round(max(left) + turns * max(whole), 1)


def _preview(step: Step) -> bytes:
    return encode_pixels(step.preview[0], "png")


def _asked(request: Request) -> dict[str, object]:
    names = ("prompt", "negative_prompt", "n", "seed", "size", "steps", "guidance", "sampler", "strength")
    further = {"loras": [str(lora) for lora in request.loras], "image": request.image is not None}
    return {name: getattr(request, name) for name in names} | further | {"mask": request.mask is not None}


class Jobs:
    """All jobs of a service, each of an owner who alone sees it. Used on the event loop's thread alone.

    Those that are over are kept within the limits; the rest until they are over.
    """

    def __init__(self, limits: JobLimits | None = None) -> None:
        self._limits = limits or JobLimits()
        self._active: dict[str, Job] = {}
        self._over: TTLCache[str, Job] = TTLCache(self._limits.bytes, self._limits.age_s, getsizeof=self._cost)
        self._followers: dict[str, set[asyncio.Event]] = {}

    def _cost(self, job: Job) -> float:
        """Return a job's share of the bytes: at least so much that no more than `over` of them have room."""
        least = self._limits.bytes / self._limits.over
        return min(max(least, sum(map(len, job.files.values()))), self._limits.bytes)

    async def submit(self, model: Model, request: Request, owner: str) -> Job:
        """Have a request drawn as a job. Raises what `Batcher.submit` raises, and QueueFullError."""
        active = sum(not job.over for job in self.of(owner))
        if active >= self._limits.active:
            raise QueueFullError(
                f"{active} of your jobs wait or are being drawn and {self._limits.active} may; cancel some",
                retry_after_s=model.batcher.expected_wait_s(),
            )
        job = Job(model, request, owner, self._changed)
        self._active[job.id] = job
        try:
            await job.begin(request)
        except BaseException:
            job.cancel()  # it may have been taken though nobody waits for it any more
            del self._active[job.id]
            raise
        self._changed(job)
        return job

    def _changed(self, job: Job) -> None:
        if job.over and self._active.pop(job.id, None) is not None:
            self._over[job.id] = job
        self._wake(job.owner)

    def _wake(self, owner: str) -> None:
        for event in self._followers.get(owner, ()):
            event.set()

    def active(self) -> list[Job]:
        """Return everybody's jobs that are not over, the oldest first."""
        return list(self._active.values())

    def of(self, owner: str) -> list[Job]:
        """Return an owner's jobs, the oldest first."""
        self._over.expire()
        every = [*self._over.values(), *self._active.values()]
        return sorted((job for job in every if job.owner == owner), key=lambda job: job.created)

    def find(self, owner: str, number: str) -> Job:
        """Return an owner's job by its id. Raises WebError, 404; others' are as if they were not there."""
        job = self._active.get(number) or self._over.get(number)
        if job is None or job.owner != owner:
            raise WebError("this service has no such job, or has none any more", status=404, code="job_not_found")
        return job

    def cancel(self, owner: str, *, but: str | None = None) -> int:
        """Cancel an owner's jobs, all or all but one; return how many were not over."""
        ending = [job for job in self.active() if job.owner == owner and job.id != but]
        for job in ending:
            job.cancel()
        return len(ending)

    def forget(self, job: Job) -> None:
        """Cancel a job, or forget it and its pictures where it is over."""
        job.cancel()
        self._over.pop(job.id, None)
        self._wake(job.owner)

    def crowded(self, owner: str) -> bool:
        """Tell whether as many follow an owner's jobs as may."""
        return len(self._followers.get(owner, ())) >= self._limits.followers

    @contextmanager
    def follow(self, owner: str) -> Iterator[asyncio.Event]:
        """Give an event that is set whenever one of an owner's jobs changes, while the block runs."""
        event = asyncio.Event()
        events = self._followers.setdefault(owner, set())
        events.add(event)
        try:
            yield event
        finally:
            events.discard(event)
            if not events:
                self._followers.pop(owner, None)
