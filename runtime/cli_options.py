"""The options of the commands that draw, and how they are read from the command line."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.engines.cli_parts import Many, on_gpu

if TYPE_CHECKING:  # what draws is imported when something is drawn, so that --help stays instant
    from latentrt.runtime.pipeline import Pipeline
    from latentrt.runtime.request import Control, ImagePrompt, KeyFrame, Lora

# What may be chosen by name, as it is where it is chosen (tests/test_cli.py holds the two together).
SPACINGS = "leading, trailing, linspace, karras, exponential, lu, beta, simple, sgm_uniform, ays, ays_sdxl"
NOISES = ("cpu", "cuda")
DECODERS = ("full", "tiny")


class TextCommand(click.Command):
    """A command whose arguments may be text that begins with -: text with spaces, `-a red circle`, is not an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, options_first(args, self.get_params(ctx)))
        except click.NoSuchOption as error:
            raise click.UsageError(
                f"{error.format_message()} A prompt that begins with - and has no space goes after --, as in: "
                f"{ctx.command_path} BUNDLE -- -prompt",
                ctx=ctx,
            ) from None


def options_first(arguments: Sequence[str], params: Sequence[click.Parameter]) -> list[str]:
    """Return a command's arguments with the options before -- and all text after it, each in their order."""
    takes = {
        name: option.nargs
        for option in params
        if isinstance(option, click.Option) and not (option.is_flag or option.count)
        for name in option.opts
    }
    options, texts, rest = list[str](), list[str](), iter(arguments)
    for argument in rest:
        if argument == "--":
            texts += rest
        elif not argument.startswith("-") or argument == "-" or _spaced(argument):
            texts.append(argument)
        else:
            values = list(itertools.islice(rest, takes.get(argument, 0)))
            if len(values) < takes.get(argument, 0):  # the last option has no value, and must not take --
                return list(arguments)
            options += [argument, *values]
    return [*options, "--", *texts]


def _spaced(argument: str) -> bool:
    """Tell whether there is a space where an option's name would be."""
    return any(sign.isspace() for sign in argument.partition("=")[0])


class Key(click.ParamType["KeyFrame"]):
    """A key frame: a prompt and its seed, `a red circle@7`."""

    name = "PROMPT@SEED"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> KeyFrame:
        from latentrt.runtime.request import KeyFrame

        found = re.fullmatch(r"(.*)@(-?\d+)", str(value), flags=re.DOTALL)
        if found is None:
            self.fail(f"found '{value}', expected a prompt, @ and a seed, as in 'a red circle@7'", param, ctx)
        return KeyFrame(prompt=found[1], seed=int(found[2]))


class Followed(click.ParamType["Control"]):
    """A control: `edges=edges.png`, `edges=edges.png:0.8`, `edges=edges.png:0.8:0.2:0.9`."""

    name = "NAME=IMAGE[:SCALE[:START:STOP]]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Control:
        from latentrt.runtime.request import Control

        number = r"-?[\d.]+"
        found = re.fullmatch(rf"([^=]+)=(.+?)(?::({number})(?::({number}):({number}))?)?", str(value))
        if found is None or (":" in found[2] and not Path(found[2]).exists()):
            self.fail(
                f"found '{value}', expected a ControlNet's name, = and an image, then a scale, then where to start "
                "and stop, as in edges=edges.png:0.8:0.2:0.9",
                param,
                ctx,
            )
        name, image, *numbers = found.groups()
        try:
            values = [float(text) for text in numbers if text is not None]
        except ValueError:
            self.fail(f"found '{value}', expected numbers after the image, as in 0.8:0.2:0.9", param, ctx)
        return Control(name=name, image=image, **dict(zip(("scale", "start", "stop"), values, strict=False)))


class Shown(click.ParamType["ImagePrompt"]):
    """An image prompt: `style=photo.png`, `style=photo.png:0.6`."""

    name = "NAME=IMAGE[:SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ImagePrompt:
        from latentrt.runtime.request import ImagePrompt

        found = re.fullmatch(r"([^=]+)=(.+?)(?::(-?\d+(?:\.\d*)?|-?\.\d+))?", str(value))
        if found is None or (":" in found[2] and not Path(found[2]).exists()):
            self.fail(
                f"found '{value}', expected an IP-Adapter's name, = and an image, then a scale, as in "
                "style=photo.png:0.6",
                param,
                ctx,
            )
        return ImagePrompt(name=found[1], image=found[2], scale=float(found[3] or 1))


class LoraFile(click.ParamType["Lora"]):
    """A LoRA file and its scale: `style.safetensors:0.8`, or the file alone."""

    name = "FILE[:SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lora:
        from latentrt.engines.lora.file import split_strength
        from latentrt.runtime.request import Lora

        file, scale = split_strength(str(value))
        return Lora(file=file, scale=scale)


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
SAMPLING = (
    click.option("--steps", type=int, default=None, help="Default: 20."),
    click.option("--sampler", default=None, help="Default: the checkpoint's own; `latentrt samplers` lists them."),
    click.option("--spacing", default=None, help=f"How the steps are spaced: {SPACINGS}."),
    click.option("--eta", type=float, default=None, help="Share of fresh noise, 0 to 1; for ddim and tcd."),
    click.option("--shift", type=float, default=None, help="How far a flow's steps move towards the noise, from 0 up."),
    click.option("--stop", type=float, default=1.0, help="Stop after this share of the steps, with noise left."),
    click.option("--timesteps", type=Many(click.FLOAT, "999,700,300"), default=None, help="Timesteps to run."),
    click.option("--sigmas", type=Many(click.FLOAT, "14.6,1.2,0"), default=None, help="Noise levels, ending in 0."),
    click.option("--forecast", type=int, default=None, help="Call the denoiser in so many of the steps, 7 and more."),
    click.option("--guidance", type=float, default=None, help="Scale of guidance. Default: the bundle's own."),
    click.option("--guidance-interval", type=Interval(), default="0-1", help="Guide only here, e.g. 0.2-0.8."),
    click.option("--guidance-rescale", default=0.0, help="How much contrast to restore after guidance, 0 to 1."),
    click.option("--skip-layer-guidance", default=0.0, help="Scale of guidance away from skipped layers, e.g. 2.8."),
    click.option("--skip-layer-interval", type=Interval(), default="0.01-0.2", help="Skip layers only here."),
    click.option("--refine-from", type=float, default=None, help="When the refiner takes over, e.g. 0.8."),
    click.option("--aesthetic-score", default=6.0, help="The aesthetic score that the refiner aims for."),
    click.option("--negative-aesthetic-score", default=2.5, help="The aesthetic score that the refiner avoids."),
)
PROMPTS = (
    click.option("--weighted", "prompt_syntax", flag_value="weighted", default="plain", help="Read (words:1.2)."),
    click.option("--truncate", "overflow", flag_value="truncate", default="chunks", help="Cut prompts at 77 tokens."),
    click.option("--clip-skip", default=0, help="Skip this many of the text encoder's last layers."),
    click.option("--t5/--no-t5", default=True, help="Let T5 read the prompt too, where a bundle holds it (SD 3)."),
    click.option("--t5-tokens", type=int, default=None, help="How many tokens T5 reads, 1 to 512. Default: 256."),
    click.option("--lora", "loras", type=LoraFile(), multiple=True, help="Apply a LoRA; repeatable."),
)
CONTROLS = click.option(
    "--control",
    "controls",
    type=Followed(),
    multiple=True,
    help="Guide the picture with a ControlNet or T2I-Adapter and an image; repeatable.",
)
STRENGTH = click.option("--strength", type=float, default=None, help="How much of --image to change, 0 to 1.")
NOISE = click.option("--noise", type=click.Choice(NOISES), default="cpu", help="PyTorch generator of the seeds.")
STARTS = (
    click.option("--image", type=FILE, default=None, help="Start from this image."),
    click.option("--mask", type=FILE, default=None, help="A mask for --image: white is repainted, black is kept."),
    CONTROLS,
    click.option(
        "--image-prompt",
        "image_prompts",
        type=Shown(),
        multiple=True,
        help="Say what to draw with an image and one of the bundle's IP-Adapters; repeatable.",
    ),
    STRENGTH,
    click.option("--variation-seed", type=int, default=None, help="Blend the noise with the noise of this seed."),
    click.option("--variation-strength", type=float, default=0.0, help="How much of that noise to use, 0 to 1."),
    NOISE,
)
DECODING = (
    click.option("--decoder", type=click.Choice(DECODERS), default="full", help="tiny: fast, less detail."),
    click.option("--tile", type=int, default=None, help="Decode in tiles of this many pixels, to save memory."),
)


def options_of(options: tuple[Callable[..., Any], ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


LOADING = (
    click.option("--embedding", "embeddings", type=FILE, multiple=True, help="A textual inversion file; repeatable."),
    click.option("--backend", default="auto", show_default=True, help="auto, cpu, cuda, tensorrt or tensorrt-rtx."),
    on_gpu,
    click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads to use."),
    click.option("--build", is_flag=True, help="Build the engines first if there are none for this machine."),
    click.option("--free-text-encoders", is_flag=True, help="Load them for new prompts alone: less memory, more time."),
)
LOADED = ("backend", "device", "threads", "build", "free_text_encoders")


def load(bundle: str, given: dict[str, Any], *, prompt: str | None = None) -> Pipeline:
    """Load a bundle as the options of `LOADING` say, and take them out of what a command was given.

    prompt: what is drawn first, with all that is left of `given`; None where that is something else
    """
    from latentrt.runtime.pipeline import Pipeline
    from latentrt.runtime.request import Request

    embeddings, options = given.pop("embeddings"), {name: given.pop(name) for name in LOADED}
    if prompt is not None and not embeddings:  # whose words only the pipeline will know
        options["first"] = Request(prompt=prompt, **given)
    pipe = Pipeline.load(bundle, **options)
    try:
        for embedding in embeddings:
            pipe.add_embedding(embedding)
    except Exception:
        pipe.close()
        raise
    return pipe
