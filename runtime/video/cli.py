"""The command `latentrt video`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.engines.cli_types import Size
from latentrt.engines.errors import RequestError
from latentrt.engines.progress import terminal_report
from latentrt.runtime.cli_options import (
    CONTROLS,
    DECODING,
    LOADING,
    NOISE,
    PROMPTS,
    SAMPLING,
    STRENGTH,
    TextCommand,
    load,
    options_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.runtime.draw.step import Step
    from latentrt.runtime.request import Control

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command(cls=TextCommand)
@click.argument("bundle")
@click.argument("prompts", metavar="PROMPT[@FRAME]...", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A .gif, .webp or .mp4 file.")
@click.option("--frames", default=16, show_default=True, help="How many frames.")
@click.option("--fps", default=8.0, show_default=True, help="Frames a second.")
@click.option("--loop/--once", default=True, help="Of a GIF or WebP: play it again and again, or once.")
@click.option("--window", type=int, default=None, help="Frames that are seen at once. Default: as trained, mostly 16.")
@click.option("--overlap", type=int, default=None, help="Frames that two windows share. Default: a quarter of them.")
@click.option("--negative", "negative_prompt", default=None, help="What the video should not show.")
@options_of(PROMPTS)
@options_of(SAMPLING)
@click.option(
    "--image", "images", type=FILE, multiple=True, help="Start from a GIF or WebP, or an image for each frame."
)
@options_of((CONTROLS, STRENGTH, NOISE))
@options_of(DECODING)
@click.option("--seed", type=int, default=None, help="Default: random.")
@click.option("--size", type=Size(), default=None, help="Size of the frames. Default: the checkpoint's own.")
@click.option("--deadline", type=float, default=None, help="Seconds after which to give up.")
@options_of(LOADING)
@click.option("--json", "as_json", is_flag=True, help="Print file, seed and seconds as JSON.")
def video(
    bundle: str,
    prompts: tuple[str, ...],
    output: Path,
    frames: int,
    fps: float,
    loop: bool,
    images: tuple[Path, ...],
    controls: tuple[Control, ...],
    as_json: bool,
    **request: Any,
) -> None:
    """Draw a video of PROMPT from a BUNDLE with a motion adapter, and write it as GIF, WebP or MP4.

    Of several prompts each says for which frame it is, as in 'a red circle@0' 'a green star@15': between them the text
    is mixed.
    """
    import msgspec

    from latentrt.runtime.images.write_movie import check_movie

    check_movie(output, fps=fps)
    request["controls"] = [msgspec.structs.replace(one, image=_frames((Path(str(one.image)),))) for one in controls]
    if images:
        request["image"] = _frames(images)
    with load(bundle, request) as pipe, terminal_report(quiet=as_json) as report:

        def on_step(step: Step) -> None:
            report("denoise", step.stage, step.stages)

        found = pipe.video(_by_frame(prompts), frames, on_step=on_step, **request)
    found.save(output, fps=fps, loop=loop)
    summary = {
        "file": str(output),
        "frames": frames,
        "fps": fps,
        "seed": found.seeds[0],
        "backend": found.backend,
        "warnings": list(found.warnings),
        "seconds": dict(found.seconds),
    }
    line = f"{output}: {frames} frames in {found.seconds['total']:.1f} s ({found.backend})"
    click.echo(json.dumps(summary, indent=1) if as_json else line)


def _by_frame(prompts: tuple[str, ...]) -> str | dict[int, str]:
    """Return a prompt, or prompts by the number of a frame. Raises RequestError where one of several has none."""
    found = [re.fullmatch(r"(.*)@(\d+)", prompt, flags=re.DOTALL) for prompt in prompts]
    if len(prompts) == 1 and found[0] is None:
        return prompts[0]
    if None in found:
        raise RequestError("prompts: found several, expected a frame's number after each, as in 'a red circle@8'")
    return {int(one[2]): one[1] for one in found if one}


def _frames(files: tuple[Path, ...]) -> list[Image]:
    """Return the images of files, one after another: of a file that moves, every frame."""
    from PIL import Image, ImageSequence

    images = []
    for file in files:
        try:
            with Image.open(file) as opened:
                images += [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
        except OSError as error:
            raise RequestError(f"image: '{file}' cannot be read as an image ({error})") from None
    return images
