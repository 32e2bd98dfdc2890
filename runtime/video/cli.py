"""The command `latentrt video`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from latentrt.engines.cli_parts import Size
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
    from latentrt.runtime.draw.step import Step
    from latentrt.runtime.images.sources import ImageSource
    from latentrt.runtime.request import Control

FPS = 8.0  # that any format plays
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command(cls=TextCommand)
@click.argument("bundle")
@click.argument("prompts", metavar="PROMPT[@FRAME]...", nargs=-1)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A .gif, .webp or .mp4 file.")
@click.option("--frames", type=int, default=None, help="How many frames. Default: as trained, mostly 16, 14 or 25.")
@click.option("--fps", type=float, default=None, help="Frames a second. Default: 8, and 7 of an image.")
@click.option("--loop/--once", default=True, help="Of a GIF or WebP: play it again and again, or once.")
@click.option("--window", type=int, default=None, help="Frames that are seen at once. Default: as trained, mostly 16.")
@click.option("--overlap", type=int, default=None, help="Frames that two windows share. Default: a quarter of them.")
@click.option("--negative", "negative_prompt", default=None, help="What the video should not show.")
@options_of(PROMPTS)
@options_of(SAMPLING)
@click.option("--first-guidance", type=float, default=None, help="Scale for the first frame, up to --guidance.")
@click.option(
    "--image",
    "--init",
    "images",
    type=FILE,
    multiple=True,
    help="The image that moves; or start from a GIF or WebP, or an image for each frame.",
)
@click.option("--motion-bucket", type=float, default=None, help="How much of an image moves, 0 to 255. Default: 127.")
@click.option("--noise-augmentation", type=float, default=None, help="Noise added to an image. Default: 0.02.")
@options_of((CONTROLS, STRENGTH, NOISE))
@options_of(DECODING)
@click.option("--decode-chunk", type=int, default=None, help="Frames that are decoded at once. Default: all.")
@click.option("--seed", type=int, default=None, help="Default: random.")
@click.option("--size", type=Size(), default=None, help="Size of the frames. Default: the checkpoint's own.")
@click.option("--deadline", type=float, default=None, help="Seconds after which to give up.")
@options_of(LOADING)
@click.option("--json", "as_json", is_flag=True, help="Print file, seed and seconds as JSON.")
@click.pass_context
def video(
    context: click.Context,
    /,
    bundle: str,
    prompts: tuple[str, ...],
    output: Path,
    frames: int | None,
    loop: bool,
    images: tuple[Path, ...],
    controls: tuple[Control, ...],
    as_json: bool,
    **request: Any,
) -> None:
    """Draw a video of PROMPT from a BUNDLE with a motion adapter, or of an --image, and write it as GIF, WebP or MP4.

    Of several prompts each says for which frame it is, as in 'a red circle@0' 'a green star@15': between them the text
    is mixed.
    """
    import msgspec

    from latentrt.runtime.images.write_movie import check_movie

    check_movie(output, fps=request["fps"] or FPS)
    request["controls"] = [msgspec.structs.replace(one, image=_frames((Path(str(one.image)),))) for one in controls]
    if images:
        request["image"] = _frames(images)
    with load(bundle, request) as pipe, terminal_report(quiet=as_json) as report:

        def on_step(step: Step) -> None:
            report("denoise", step.stage, step.stages)

        found = pipe.video(_by_frame(prompts), frames, on_step=on_step, **_asked(context, request))
    found.save(output, loop=loop)
    summary = {
        "file": str(output),
        "frames": found.frames.shape[1],
        "fps": found.fps,
        "seed": found.seeds[0],
        "backend": found.backend,
        "warnings": list(found.warnings),
        "seconds": dict(found.seconds),
    }
    line = f"{output}: {found.frames.shape[1]} frames in {found.seconds['total']:.1f} s ({found.backend})"
    click.echo(json.dumps(summary, indent=1) if as_json else line)


def _asked(context: click.Context, request: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given: what is none of these is the bundle's to say."""
    given = (name for name in request if context.get_parameter_source(name) is not ParameterSource.DEFAULT)
    return {name: request[name] for name in given}


def _by_frame(prompts: tuple[str, ...]) -> str | dict[int, str] | None:
    """Return a prompt, or prompts by the number of a frame. Raises RequestError where one of several has none."""
    if not prompts:
        return None
    found = [re.fullmatch(r"(.*)@(\d+)", prompt, flags=re.DOTALL) for prompt in prompts]
    if len(prompts) == 1 and found[0] is None:
        return prompts[0]
    if None in found:
        raise RequestError("prompts: found several, expected a frame's number after each, as in 'a red circle@8'")
    return {int(one[2]): one[1] for one in found if one}


def _frames(files: tuple[Path, ...]) -> list[ImageSource]:
    """Return the images of files, one after another: of a file that moves, every frame."""
    from PIL import Image, ImageSequence

    images: list[ImageSource] = []
    for file in files:
        try:
            with Image.open(file) as opened:
                moves = getattr(opened, "n_frames", 1) > 1
                images += [one.convert("RGB") for one in ImageSequence.Iterator(opened)] if moves else [file]
        except OSError as error:
            raise RequestError(f"image: '{file}' cannot be read as an image ({error})") from None
    return images
