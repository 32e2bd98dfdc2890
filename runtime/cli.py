"""The commands that draw, generate and animate; and samplers, which lists the samplers and prints their plans."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.engines.cli_parts import Size
from latentrt.engines.errors import RequestError
from latentrt.engines.progress import Report, terminal_report
from latentrt.runtime.cli_options import (
    DECODING,
    LOADING,
    PROMPTS,
    SAMPLING,
    STARTS,
    Key,
    TextCommand,
    load,
    options_of,
)

if TYPE_CHECKING:  # what draws is imported when something is drawn, so that --help stays instant
    from latentrt.engines.spec import Array
    from latentrt.runtime.draw.step import Step
    from latentrt.runtime.pipeline import Pipeline
    from latentrt.runtime.request import KeyFrame
    from latentrt.runtime.result import Result

OTHER_PICTURES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".tif", ".tiff", ".webp")  # which are no directory's name


@click.command(cls=TextCommand)
@click.argument("bundle")
@click.argument("prompt")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(), help="A directory, or one .png file.")
@click.option("--negative", "negative_prompt", default=None, help="What the picture should not show.")
@options_of(PROMPTS)
@options_of(SAMPLING)
@options_of(STARTS)
@options_of(DECODING)
@click.option(
    "--seed", type=int, default=None, help="Seed of the first picture; the others count up from it. Default: random."
)
@click.option("--size", type=Size(), default=None, help="Size of the picture. Default: the checkpoint's own.")
@click.option("-n", default=1, show_default=True, help="How many pictures.")
@click.option("--deadline", type=float, default=None, help="Seconds after which to give up.")
@options_of(LOADING)
@click.option("--json", "as_json", is_flag=True, help="Print files, seeds, settings and seconds as JSON.")
def generate(
    bundle: str,
    prompt: str,
    output: Path,
    as_json: bool,
    **request: Any,
) -> None:
    """Draw pictures of PROMPT from BUNDLE and write them as PNG."""
    from latentrt.engines.bundle.files import disk_errors

    _check_output(output, pictures=request["n"])
    with load(bundle, request, prompt=prompt) as pipe:
        with _progress(quiet=as_json) as on_step:
            result = pipe(prompt, on_step=on_step, **request)
        with disk_errors(output):
            files = _save(result, output)
        summary = _summary(result, files, load_s=pipe.load_s)
    click.echo(json.dumps(summary, indent=1) if as_json else _lines(summary))


@click.command(cls=TextCommand)
@click.argument("bundle")
@click.argument("keys", metavar="PROMPT@SEED...", nargs=-1, required=True, type=Key())
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A .gif, .webp or .mp4 file.")
@click.option("--frames", default=24, show_default=True, help="How many frames, key frames included.")
@click.option("--fps", default=8.0, show_default=True, help="Frames a second.")
@click.option("--loop", is_flag=True, help="Continue from the last key frame to the first, for an endless loop.")
@click.option("--batch", default=4, show_default=True, help="How many frames are drawn at once.")
@click.option("--negative", "negative_prompt", default=None, help="What the frames should not show.")
@options_of(PROMPTS)
@options_of(SAMPLING)
@options_of(DECODING)
@click.option("--size", type=Size(), default=None, help="Size of the picture. Default: the checkpoint's own.")
@options_of(LOADING)
@click.option("--json", "as_json", is_flag=True, help="Print file, frames and seconds as JSON.")
def animate(
    bundle: str,
    keys: tuple[KeyFrame, ...],
    output: Path,
    frames: int,
    fps: float,
    loop: bool,
    batch: int,
    negative_prompt: str | None,
    as_json: bool,
    **request: Any,
) -> None:
    """Draw an animation from key frame to key frame, each a PROMPT@SEED, and write it as GIF, WebP or MP4."""
    import msgspec

    from latentrt.runtime.images.write_movie import check_movie, save_movie

    check_movie(output, fps=fps)
    keys = tuple(msgspec.structs.replace(key, negative_prompt=negative_prompt) for key in keys)
    seconds: list[float] = []

    def drawn(pipe: Pipeline, report: Report) -> Iterator[Array]:
        done = 0
        report("frames", done, frames)
        for result in pipe.animate(keys, frames, batch=batch, loop=loop, **request):
            done += len(result.pixels)
            seconds.append(result.seconds["total"])
            report("frames", done, frames)
            yield from result.pixels

    with (
        load(bundle, request) as pipe,
        terminal_report(quiet=as_json) as tell,
    ):
        save_movie(drawn(pipe, tell), output, fps=fps)
    summary = {"file": str(output), "frames": frames, "fps": fps, "backend": pipe.backend, "seconds": sum(seconds)}
    line = f"{output}: {frames} frames in {summary['seconds']:.1f} s ({pipe.backend})"
    click.echo(json.dumps(summary, indent=1) if as_json else line)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Any]:
    with terminal_report(quiet=quiet) as report:

        def on_step(step: Step) -> None:
            if step.stage == 1:
                report("denoise", 0, step.stages)
            report("denoise", step.stage, step.stages)

        yield on_step


def _check_output(output: Path, *, pictures: int) -> None:
    """Raise RequestError or BundleError, before anything is drawn, where pictures cannot be written to a path."""
    from latentrt.engines.bundle.files import disk_errors, require_writable

    ending = output.suffix.lower()
    if ending == ".png" and pictures > 1:
        raise RequestError(f"output: found the file '{output}' for {pictures} pictures; name a directory")
    with disk_errors(output):  # of names that no file system holds
        is_file, is_directory = output.is_file(), output.is_dir()
    if ending != ".png" and (is_file or (ending in OTHER_PICTURES and not is_directory)):
        raise RequestError(f"output: '{output}' is neither a .png file nor a directory; pictures are written as PNG")
    require_writable(output if ending == ".png" else output / "picture.png")


def _save(result: Result, output: Path) -> list[Path]:
    from concurrent.futures import ThreadPoolExecutor

    from latentrt.runtime.images.write_png import save_png

    files: list[Path] = []
    for settings, seed in zip(result.settings, result.seeds, strict=True):
        stem = f"{_slug(settings.prompt)}-{seed}"
        files.append(output if output.suffix.lower() == ".png" else _free_name(output, stem, taken=files))
    with ThreadPoolExecutor() as threads:  # Pillow works outside of Python's lock
        list(threads.map(save_png, result.images, files, result.settings, result.seeds))
    return files


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "empty"


def _free_name(directory: Path, stem: str, *, taken: Sequence[Path]) -> Path:
    """Return a path where nothing lies: the result of another call is never overwritten. taken: by this call"""
    path, copy = directory / f"{stem}.png", 2
    while path.exists() or path in taken:
        path, copy = directory / f"{stem}-{copy}.png", copy + 1
    return path


def _summary(result: Result, files: list[Path], *, load_s: float) -> dict[str, Any]:
    settings = result.settings[0]
    return {
        "files": [str(file) for file in files],
        "seeds": list(result.seeds),
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "sampler": settings.sampler,
        "size": list(settings.size),
        **settings.further,
        "backend": result.backend,
        "reason": result.reason,
        "warnings": list(result.warnings),
        "seconds": {"load": load_s, **result.seconds},
        "step_seconds": list(result.step_seconds),
    }


def _lines(summary: dict[str, Any]) -> str:
    shown = {name: value for name, value in summary["seconds"].items() if name != "adapt" or "loras" in summary}
    seconds = ", ".join(f"{name} {value:.3f} s" for name, value in shown.items())
    per_step = sum(summary["step_seconds"]) / len(summary["step_seconds"])
    lines = [*summary["files"], f"backend {summary['backend']} ({summary['reason']})"]
    return "\n".join([*lines, f"{seconds}; {1e3 * per_step:.1f} ms a step"])


@click.command()
@click.option("--plan", "sampler", default=None, metavar="NAME", help="Print the plan of one sampler, not the list.")
@click.option("--steps", default=20, show_default=True, help="Number of steps of the plan.")
@click.option("--forecast", "calls", type=int, default=None, help="How many of them call the denoiser. Default: all.")
@click.option("--bundle", default=None, help="Bundle whose noise schedule is used. Default: that of SD 1.x.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --plan, all that another runtime needs.")
def samplers(sampler: str | None, steps: int, calls: int | None, bundle: str | None, as_json: bool) -> None:
    """List the samplers, or print the plan of one of them."""
    from latentrt.engines.bundle.files import Bundle
    from latentrt.runtime.sampling.forecast import forecast
    from latentrt.runtime.sampling.make import make_plan
    from latentrt.runtime.sampling.plan_text import format_plan, format_samplers, plan_to_json, samplers_table
    from latentrt.runtime.sampling.schedule import STABLE_DIFFUSION

    if sampler is None:
        click.echo(json.dumps(samplers_table(), indent=1) if as_json else format_samplers())
        return
    manifest = None if bundle is None else Bundle.open(bundle).manifest
    if manifest is None:
        plan = make_plan(sampler, STABLE_DIFFUSION, steps=steps)
    else:
        tokens = manifest.latents.tokens(manifest.default_size)
        plan = make_plan(sampler, manifest.schedule, steps=steps, tokens=tokens)
    plan = plan if calls is None else forecast(plan, calls)
    click.echo((plan_to_json(plan) if as_json else format_plan(plan)).rstrip())
