"""The command that draws: generate."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import RequestError
from latentrt.engines.progress import terminal_report
from latentrt.runtime.guidance import ALWAYS
from latentrt.runtime.images import save_png
from latentrt.runtime.pipeline import Pipeline, Result, Step
from latentrt.runtime.plan_json import plan_to_json
from latentrt.runtime.plan_text import format_plan, format_samplers, samplers_table
from latentrt.runtime.request import NOISES
from latentrt.runtime.samplers import make_plan
from latentrt.runtime.samplers.make import TIMESTEP_SPACINGS
from latentrt.runtime.schedules import STABLE_DIFFUSION
from latentrt.runtime.spacings import SPACINGS


class Size(click.ParamType[tuple[int, int]]):
    """`512x768` or `512`: width and height in pixels."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
        if found is None:
            self.fail(f"'{value}' is not a size; write it as 512x768", param, ctx)
        return int(found[1]), int(found[2] or found[1])


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers between commas: `999,500,10`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"found '{value}', expected numbers between commas, as in 999,500,10", param, ctx)


class Interval(click.ParamType[tuple[float, float]]):
    """Two fractions of the steps: `0.2-0.8`."""

    name = "FROM-TO"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([\d.]+)-([\d.]+)", str(value))
        if found is None:
            self.fail(f"found '{value}', expected two fractions of the steps, as in 0.2-0.8", param, ctx)
        return float(found[1]), float(found[2])


FILE = click.Path(path_type=Path)
_SAMPLING = (
    click.option("--steps", type=int, default=None, help="Default: 20."),
    click.option("--sampler", default=None, help="Default: the checkpoint's own; `latentrt samplers` lists them."),
    click.option("--spacing", default=None, help=f"Of the steps: {', '.join((*TIMESTEP_SPACINGS, *SPACINGS))}."),
    click.option("--eta", type=float, default=None, help="Share of fresh noise, 0 to 1, for ddim and tcd."),
    click.option("--stop", type=float, default=1.0, help="Stop after this share of the steps, leaving noise."),
    click.option("--timesteps", type=Numbers(), default=None, help="What to tell the model, e.g. 999,700,300."),
    click.option("--sigmas", type=Numbers(), default=None, help="Noise over picture, ending with 0."),
    click.option("--guidance", default=7.5, show_default=True, help="Scale of classifier-free guidance."),
    click.option("--guidance-interval", type=Interval(), default=ALWAYS, help="Guide only there, e.g. 0.2-0.8."),
    click.option("--guidance-rescale", default=0.0, help="Restore the prompt's own contrast, 0 to 1."),
)
_PROMPTS = (
    click.option("--weighted", "prompt_syntax", flag_value="weighted", default="plain", help="Read (words:1.2)."),
    click.option("--truncate", "overflow", flag_value="truncate", default="chunks", help="Cut long prompts."),
    click.option("--clip-skip", default=0, help="Leave out this many of the text encoder's last layers."),
)
_STARTS = (
    click.option("--image", type=FILE, default=None, help="Start from this picture."),
    click.option("--mask", type=FILE, default=None, help="Of that picture: white is drawn again, black is kept."),
    click.option("--strength", type=float, default=None, help="How much of it to change, 0 to 1."),
    click.option("--variation-seed", type=int, default=None, help="Turn the noise towards this seed's."),
    click.option("--variation-strength", type=float, default=0.0, help="How far, 0 to 1."),
    click.option("--noise", type=click.Choice(sorted(NOISES)), default="cpu", help="Whose generator a seed is for."),
)


def _options(options: tuple[Callable[..., Any], ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


@click.command()
@click.argument("bundle")
@click.argument("prompt")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(), help="A directory, or one .png file.")
@click.option("--negative", "negative_prompt", default="", help="What the picture should not show.")
@_options(_PROMPTS)
@_options(_SAMPLING)
@_options(_STARTS)
@click.option("--seed", type=int, default=None, help="Of the first picture; the others count up. Default: random.")
@click.option("--size", type=Size(), default=None, help="Default: the checkpoint's own.")
@click.option("-n", default=1, show_default=True, help="How many pictures.")
@click.option("--deadline", type=float, default=None, help="Seconds after which to give up.")
@click.option("--embedding", "embeddings", type=FILE, multiple=True, help="A learned word's safetensors file.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print files, seeds, settings and seconds as JSON.")
def generate(
    bundle: str,
    prompt: str,
    output: Path,
    backend: str,
    threads: int | None,
    embeddings: tuple[Path, ...],
    as_json: bool,
    **request: Any,
) -> None:
    """Draw pictures of PROMPT from BUNDLE and write them as PNG."""
    logging.basicConfig(format="latentrt: %(message)s")
    if output.suffix.lower() == ".png" and request["n"] > 1:
        raise RequestError(f"--output: found the file '{output}' for {request['n']} pictures; name a directory")
    with Pipeline.load(bundle, backend, threads=threads) as pipe:
        for embedding in embeddings:
            pipe.add_embedding(embedding)
        with _progress(quiet=as_json) as on_step:
            result = pipe(prompt, on_step=on_step, **request)
        files = _save(result, output)
        summary = _summary(result, files, load_s=pipe.load_s)
    click.echo(json.dumps(summary, indent=1) if as_json else _lines(summary))


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Any]:
    with terminal_report(quiet=quiet) as report:

        def on_step(step: Step) -> None:
            if step.stage == 1:
                report("denoise", 0, step.stages)
            report("denoise", step.stage, step.stages)

        yield on_step


def _save(result: Result, output: Path) -> list[Path]:
    files = []
    for image, seed, settings in zip(result.images, result.seeds, result.settings, strict=True):
        file = output if output.suffix.lower() == ".png" else _free_name(output, f"{_slug(settings.prompt)}-{seed}")
        save_png(image, file, settings, seed)
        files.append(file)
    return files


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "empty"


def _free_name(directory: Path, stem: str) -> Path:
    """Return a path that no picture has yet: another call's result is never overwritten."""
    path, copy = directory / f"{stem}.png", 2
    while path.exists():
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
        "seconds": {"load": load_s, **result.seconds},
        "step_seconds": list(result.step_seconds),
    }


def _lines(summary: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.3f} s" for name, value in summary["seconds"].items())
    per_step = sum(summary["step_seconds"]) / len(summary["step_seconds"])
    lines = [*summary["files"], f"backend {summary['backend']} ({summary['reason']})"]
    return "\n".join([*lines, f"{seconds}; {1e3 * per_step:.1f} ms a step"])


@click.command()
@click.option("--plan", default=None, metavar="NAME", help="Print one sampler's table instead of the list.")
@click.option("--steps", default=20, show_default=True, help="Of the printed plan.")
@click.option("--bundle", default=None, help="Whose noise schedule the plan is for. Default: Stable Diffusion's own.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON: with --plan, all that another runtime needs.")
def samplers(plan: str | None, steps: int, bundle: str | None, as_json: bool) -> None:
    """List the samplers, or print the table of numbers that one of them is."""
    if plan is None:
        click.echo(json.dumps(samplers_table(), indent=1) if as_json else format_samplers())
        return
    schedule = STABLE_DIFFUSION if bundle is None else Bundle.open(bundle).manifest.schedule
    table = make_plan(plan, schedule, steps=steps)
    click.echo((plan_to_json(table) if as_json else format_plan(table)).rstrip())
