"""A user's program: all of the public API, as one would write it who has only installed latentrt.

`make lint` has mypy (strict) and basedpyright (strict) read it; tests/test_user_program.py runs it, and holds that no
public name is missing here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from PIL import Image

import latentrt
from latentrt import (
    Batcher,
    BatcherOptions,
    Cancellation,
    Control,
    ImagePrompt,
    KeyFrame,
    Lora,
    Pipeline,
    Request,
    Result,
    Step,
    Stream,
    errors,
)


def open_bundle(bundle: Path) -> Pipeline:
    pipe = Pipeline.load(bundle, "cpu", device=0, threads=2, warm_up=False, check="size", build=True)
    print(latentrt.__version__, pipe.backend, pipe.manifest.family, pipe.embeddings, pipe.warm_up())
    return pipe


def save(result: Result, folder: Path) -> list[Path]:
    """Save pictures under the seeds that drew them."""
    files: list[Path] = []
    for image, seed, settings in zip(result.images, result.seeds, result.settings, strict=True):
        file = folder / f"{settings.sampler}-{settings.steps}-{seed}.png"
        image.save(file)
        files.append(file)
    shape: tuple[int, ...] = result.pixels.shape
    print(shape, result.seconds["total"], result.step_seconds, result.backend, result.reason, result.warnings)
    return files


def draw(pipe: Pipeline, folder: Path) -> list[Path]:
    """Draw from text, then from the picture that this gave."""
    first = pipe("a red circle", steps=2, guidance=3.0, seed=7, n=2, sampler="euler", spacing="karras")
    request = Request(
        prompt="a (red:1.2) heart",
        prompt_syntax="weighted",
        negative_prompt="blue",
        image=first.images[0],
        mask=np.full((first.pixels.shape[1], first.pixels.shape[2]), 255, dtype=np.uint8),
        strength=0.5,
        steps=4,
        seed=[1],
        guidance_interval=(0.0, 0.8),
        deadline=600.0,
    )
    return [*save(first, folder), *save(pipe.draw(request, on_step=watch, cancel=Cancellation()), folder)]


def watch(step: Step) -> None:
    kept = step.keep()
    print(kept.stage, kept.stages, kept.latents.shape, kept.predicted.shape, kept.preview.shape)


def look_closely(step: Step) -> Image.Image:
    """Return what a bundle with a tiny decoder shows of a picture that is being drawn."""
    return Image.fromarray(step.draft[0])


def stream(pipe: Pipeline, request: Request) -> Result:
    """Draw while looking on."""
    drawing: Stream = pipe.stream(request, cancel=None)
    with drawing as steps:
        for step in steps:
            watch(step)
    return drawing.result


def give_up(pipe: Pipeline, request: Request) -> bool:
    """End a call early: after its first step, and before it begins."""
    drawing = pipe.stream(request)
    next(drawing)
    drawing.close()
    cancel = Cancellation()
    cancel.cancel()
    try:
        pipe.draw(request, cancel=cancel)
    except errors.CancelledError as error:
        print(error, error.retryable, error.field)
    return cancel.cancelled


def several(pipe: Pipeline, requests: Iterable[Request]) -> list[Result]:
    """Draw many requests together."""
    with Batcher(pipe, BatcherOptions(slots=4, waiting=16, slo=None)) as batcher:
        waiting: list[Future[Result]] = []
        for request in requests:
            print(batcher.estimate(request), batcher.expected_wait_s(), batcher.waiting, batcher.drawing, batcher.busy)
            waiting += batcher.submit(request, on_step=lambda number, step: print(number, step.stage))
        print(batcher.position(waiting[-1]), batcher.lost, batcher.last_stage_at)
        results = [future.result() for future in waiting]
        batcher.drain(60.0)
    return results


def between(pipe: Pipeline) -> list[Image.Image]:
    """Draw the frames between two pictures."""
    keys = [KeyFrame(prompt="a red circle", seed=3), KeyFrame(prompt="a star", seed=8, negative_prompt="grey")]
    parts = pipe.animate(keys, frames=3, batch=2, loop=False, steps=2, guidance=3.0)
    return [image for part in parts for image in part.images]


async def wait_for(pipe: Pipeline, request: Request) -> Result:
    return await pipe.draw_async(request)


def with_additions(picture: Path, lora: Path) -> Request:
    """Ask for what a bundle with ControlNets and IP-Adapters can draw."""
    return Request(
        prompt=["a house", "a tree"],
        controls=[Control(name="edges", image=picture, scale=0.8, start=0.0, stop=0.9)],
        image_prompts=[ImagePrompt(name="style", image=str(picture), scale=0.6)],
        loras=[Lora(file=lora, scale=0.7)],
    )


def word(pipe: Pipeline, file: Path) -> None:
    """Use a learned word, and forget it."""
    name = pipe.add_embedding(file, name="<cat>")
    pipe(f"a photo of {name}", steps=1, seed=0)
    pipe.remove_embedding(name)


def film(pipe: Pipeline, file: Path) -> None:
    """Draw a video, where the bundle has a motion adapter."""
    video = pipe.video({0: "a red circle", 8: "a blue star"}, frames=16, steps=4, seed=1)
    video.save(file)


def act_on(error: errors.LatentrtError) -> str:
    """Say who can do what about an error."""
    match error:
        case errors.NotInstalledError():
            return error.install
        case errors.WrongMachineError():
            return ", ".join(error.differences)
        case errors.DeviceLostError():
            return "start the process again"
        case errors.OutOfMemoryError() | errors.NotFiniteError() | errors.ClosedError() | errors.EngineError():
            return "ask the operator"
        case errors.QueueFullError():
            return f"try again in {error.retry_after_s} s"
        case errors.DrainingError() | errors.DeadlineError() | errors.CancelledError() | errors.NestedCallError():
            return "try again elsewhere"
        case errors.RequestError():
            return f"change {error.field}"
        case errors.BundleError() | errors.CheckpointError():
            return "export again"
        case _:
            return "try again" if error.retryable else "report it"


def main(bundle: Path, folder: Path) -> int:
    """Draw everything that the demo's bundle can; return how many pictures there are."""
    request = Request(prompt="a green star", steps=2, guidance=3.0, seed=5)
    with open_bundle(bundle) as pipe:
        files = draw(pipe, folder)
        results = [stream(pipe, request), *several(pipe, [request, request]), asyncio.run(wait_for(pipe, request))]
        assert give_up(pipe, request)
        return len(files) + len(results) + len(between(pipe))
