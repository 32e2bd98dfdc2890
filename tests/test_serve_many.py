"""Many requests at the service at once: with all samplers, by clients who go away, of all kinds for a long time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from latentrt import Request
from latentrt.engines.spec import Array
from latentrt.runtime.batching import batcher as batching
from latentrt.runtime.batching.observer import Cancelled, Event, StageDone
from latentrt.runtime.calls import Cancellation
from latentrt.runtime.sampling.catalogue import sampler_names
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import Limits, ServeOptions

LOADING = {"backend": "cpu", "threads": 1}
A_FILE = io.BytesIO()
Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(A_FILE, "PNG")
A_PICTURE = A_FILE.getvalue()
ENDLESS = 900  # steps that nobody waits for


class Spy:
    """Counts a batcher's stages, and notes when pictures were let go for which nobody waited any more."""

    def __init__(self) -> None:
        self.stages = 0
        self.cancelled: list[tuple[str, int]] = []  # when, and the stages that were done by then

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageDone):
            self.stages += 1
        elif isinstance(event, Cancelled):
            self.cancelled.append((event.when, self.stages))


@pytest.fixture(scope="module")
def spy() -> Spy:
    return Spy()


@pytest.fixture(scope="module")
def models(sd1_bundle: Path, spy: Spy) -> Iterator[Models]:
    own = batching.Batcher

    def spied(*args: Any, observer: Callable[[Event], None] | None = None, **options: Any) -> batching.Batcher:
        return own(*args, observer=lambda event: [one(event) for one in (observer, spy) if one], **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "Batcher", spied)
        options = ServeOptions(slots=5, waiting=2000, limits=Limits(steps=1000))
        with Models({"tiny": sd1_bundle}, options, LOADING) as opened:
            yield opened


def pixels_of(answer: httpx.Response) -> Array:
    (one,) = answer.raise_for_status().json()["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))))


def same(one: Array, other: Array) -> bool:
    """Tell whether two pictures are the same, to 60 dB: no value differs by more than one."""
    return int(np.abs(one.astype(int) - other).max()) <= 1


def wait_for(what: Callable[[], bool]) -> None:
    """Wait for what does not come at once. It fails where it has not come within a minute."""
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_every_sampler_draws_over_http_what_it_draws_alone(models: Models, address: str) -> None:
    chance = random.Random(1)
    names = [name for name in sampler_names() if "flow" not in name]
    bodies = [
        {
            "prompt": f"a circle, the {seed}th",
            "seed": seed,
            "sampler": name,
            "steps": chance.choice((3, 5, 8)),
            "guidance": chance.choice((1.0, 4.0)),
        }
        for seed, name in enumerate(names)
    ]
    alone = [models.all()[0].pipe.draw(Request(**body)).pixels[0] for body in bodies]

    async def draw(client: httpx.AsyncClient, body: dict[str, Any]) -> Array:
        await asyncio.sleep(chance.random())  # they join, and leave, at stages of others
        return pixels_of(await client.post("/v1/images/generations", json=body))

    async def draw_all() -> list[Array]:
        async with httpx.AsyncClient(base_url=address, timeout=300) as client:
            return await asyncio.gather(*(draw(client, body) for body in bodies))

    for body, one, other in zip(bodies, alone, asyncio.run(draw_all()), strict=True):
        assert same(one, other), body


# --- clients who go away ---


async def leave(client: httpx.AsyncClient, batcher: batching.Batcher, pause_s: float, number: int) -> None:
    """Ask for a picture in one of the ways there are, and close the connection before it is drawn.

    One in three goes at once; the others when some of those who will go have slots, beside the two neighbours.
    """
    openai = {"prompt": "a circle", "steps": ENDLESS, "seed": number}
    a1111 = {"prompt": "a circle", "steps": ENDLESS, "seed": number, "sampler_name": "Euler", "batch_size": 2}
    ways = (
        ("/v1/images/generations", openai),
        ("/v1/images/generations", openai | {"stream": True, "partial_images": 2}),
        ("/v1/images/generations", openai | {"n": 2}),
        ("/sdapi/v1/txt2img", a1111),
    )
    path, body = ways[number % len(ways)]
    asking = asyncio.create_task(client.post(path, json=body))
    until = time.monotonic() + 60
    while number % 3 and batcher.drawing < 3 and time.monotonic() < until:
        await asyncio.sleep(0.01)
    await asyncio.sleep(pause_s)
    asking.cancel()
    with pytest.raises((asyncio.CancelledError, httpx.HTTPError)):
        await asking


def go_away(models: Models, address: str, spy: Spy, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Have clients go away at random, while neighbours draw: slots are free within a stage, and pictures as alone."""
    told: list[tuple[int, int]] = []  # the stages that were done before and after each time
    own = Cancellation.cancel

    def cancel(self: Cancellation) -> None:
        first, before = not self.cancelled, spy.stages
        own(self)
        if first:
            told.append((before, spy.stages))

    monkeypatch.setattr(Cancellation, "cancel", cancel)
    spy.cancelled.clear()
    chance = random.Random(count)
    neighbour = {"prompt": "a blue star", "seed": 5, "steps": 12, "sampler": "euler_ancestral"}
    alone = models.all()[0].pipe.draw(Request(**neighbour)).pixels[0]
    leaving, batcher = asyncio.Event(), models.all()[0].batcher

    async def go() -> int:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        drawn = 0
        async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:

            async def neighbours() -> None:
                nonlocal drawn
                while not leaving.is_set():
                    assert same(pixels_of(await client.post("/v1/images/generations", json=neighbour)), alone)
                    drawn += 1

            beside = [asyncio.create_task(neighbours()) for _ in range(2)]
            for start in range(0, count, 6):
                numbers = range(start, min(start + 6, count))
                await asyncio.gather(*(leave(client, batcher, chance.uniform(0, 0.2), number) for number in numbers))
            leaving.set()
            await asyncio.gather(*beside)
        return drawn

    assert asyncio.run(go()) > 0
    wait_for(lambda: not batcher.drawing and not batcher.waiting)
    gone = [stages for when, stages in spy.cancelled if when == "drawing"]
    assert len(gone) >= count // 6
    for stages in gone:  # nothing but the stage under way was done since somebody went
        assert any(before <= stages <= after + 1 for before, after in told)


def test_who_goes_away_leaves_a_slot_and_disturbs_nobody(
    models: Models, address: str, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_away(models, address, spy, monkeypatch, 30)


@pytest.mark.slow
def test_five_hundred_go_away(models: Models, address: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    go_away(models, address, spy, monkeypatch, 500)


# --- a long time ---

SIZES = ("24x24", "32x32", "48x32", "32x64", "40x40")
ALLOWED_BYTES = 48 * 2**20  # that a process may grow while all kinds of requests have been seen before
A1111 = {"prompt": "a circle", "steps": 2, "width": 32, "height": 32, "sampler_name": "Euler a"}


class Served:
    """`latentrt serve` as a process of its own."""

    def __init__(self, bundle: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "latentrt",
            "serve",
            f"tiny={bundle}",
            "--port",
            "0",
            "--json",
            "--backend",
            "cpu",
        ]
        command += ["--threads", "1", "--waiting", "512"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 240)
        assert ready, "the service did not begin within four minutes"
        self.address = json.loads(self.process.stdout.readline())["address"]

    @property
    def bytes(self) -> int:
        """Return its memory that is no file's."""
        fields = (line.split() for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return next(int(line[1]) for line in fields if line and line[0] == "RssAnon:") * 1024

    @property
    def handles(self) -> int:
        """Return how many files and sockets it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def threads(self) -> int:
        """Return how many threads it has."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def end(self) -> None:
        """End it, and wait for that."""
        self.process.terminate()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def service(sd1_bundle: Path) -> Iterator[Served]:
    served = Served(sd1_bundle)
    yield served
    served.end()


async def ask(client: httpx.AsyncClient, chance: random.Random, number: int) -> str:
    """Send one request of any kind, and return what became of it. It asserts that it was answered as it should be."""
    kind = chance.choice(
        ("draw", "draw", "several", "stream", "edit", "a1111", "img2img", "bad", "bad a1111", "look", "leave")
    )
    openai: dict[str, Any] = {"prompt": f"picture {number}", "seed": number, "steps": chance.randint(1, 3)}
    openai["size"] = chance.choice(SIZES)
    draws = "/v1/images/generations"
    match kind:
        case "draw":
            answer = await client.post(draws, json=openai | {"output_format": chance.choice(("png", "jpeg", "webp"))})
            assert answer.status_code == 200 and len(answer.json()["data"]) == 1
        case "several":
            answer = await client.post(draws, json=openai | {"n": 3})
            assert answer.status_code == 200 and len(answer.json()["data"]) == 3
        case "stream":
            answer = await client.post(draws, json=openai | {"stream": True, "partial_images": 1, "steps": 3})
            assert answer.status_code == 200 and "image_generation.completed" in answer.text
        case "edit":
            files = {"image": ("a.png", A_PICTURE, "image/png")}
            answer = await client.post("/v1/images/edits", data={"prompt": "a star", "steps": "3"}, files=files)
            assert answer.status_code == 200
        case "a1111":
            answer = await client.post("/sdapi/v1/txt2img", json=A1111 | {"seed": number, "batch_size": 2})
            assert answer.status_code == 200 and len(answer.json()["images"]) == 2
        case "img2img":
            image = base64.b64encode(A_PICTURE).decode()
            answer = await client.post("/sdapi/v1/img2img", json=A1111 | {"steps": 3, "init_images": [image]})
            assert answer.status_code == 200
        case "bad":
            wrong = chance.choice(({"size": "17x17"}, {"n": 99}, {"model": "nope"}, {"sampler": "nope"}, {"colour": 1}))
            answer = await client.post(draws, json=openai | wrong)
            assert answer.status_code in (400, 404) and answer.json()["error"]["code"]
        case "bad a1111":
            wrong = chance.choice(({"enable_hr": True}, {"sampler_name": "nope"}, {"steps": "x"}, {"width": 3}))
            answer = await client.post("/sdapi/v1/txt2img", json=A1111 | wrong)
            assert answer.status_code == 400 and answer.json()["detail"]
        case "look":
            path = chance.choice(("/v1/models", "/sdapi/v1/progress", "/sdapi/v1/options", "/sdapi/v1/samplers"))
            assert (await client.get(path)).status_code == 200
        case "leave":
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                async with asyncio.timeout(chance.uniform(0, 0.05)):
                    await client.post(draws, json=openai | {"steps": 150, "stream": chance.random() < 0.5})
    return kind


async def ask_many(address: str, numbers: range, at_once: int = 12) -> Counter[str]:
    """Send many requests, some at a time; return how many of each kind were answered."""
    limits, found = httpx.Limits(max_connections=at_once), Counter[str]()
    left = iter(numbers)

    async def worker(client: httpx.AsyncClient) -> None:
        for number in left:
            found[await ask(client, random.Random(number), number)] += 1

    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        await asyncio.gather(*(worker(client) for _ in range(at_once)))
    return found


def ask_for_long(service: Served, count: int) -> None:
    """Send requests of all kinds: all are answered, and the process neither grows nor keeps anything open."""
    first = max(count // 4, 60)  # all kinds were seen by then
    answered = asyncio.run(ask_many(service.address, range(first)))
    before, handles, threads = service.bytes, service.handles, service.threads
    answered += asyncio.run(ask_many(service.address, range(first, count)))
    assert answered.total() == count and service.process.poll() is None
    assert service.bytes < before + ALLOWED_BYTES
    assert service.threads <= threads + 8  # the event loop starts as many as it needs, within limits
    wait_for(lambda: service.handles <= handles)  # it notices a little later that connections were closed


def test_mixed_requests_are_all_answered(service: Served) -> None:
    ask_for_long(service, 150)


@pytest.mark.slow
def test_ten_thousand_mixed_requests_are_all_answered(service: Served) -> None:
    ask_for_long(service, 10_000)
