"""The entry point of the command line: it names the commands and imports the module of one when it is called.

It sits above the three folders because none of them may import all the others (`export → engines ← runtime`).
"""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import click

from latentrt import __version__
from latentrt.engines.errors import FIELD, BundleError, CheckpointError, LatentrtError

COMMANDS = {  # name: (module, attribute, one line for --help)
    "export": ("latentrt.export.cli", "export", "Turn a checkpoint into a bundle."),
    "build": ("latentrt.engines.cli", "build", "Build a bundle's engines for this machine."),
    "generate": ("latentrt.runtime.cli", "generate", "Draw pictures from a prompt."),
    "animate": ("latentrt.runtime.cli", "animate", "Draw an animation between prompts and seeds."),
    "video": ("latentrt.runtime.video.cli", "video", "Draw a video of a text, or of an image."),
    "serve": ("latentrt.runtime.serve.cli", "serve", "Serve bundles over HTTP, as OpenAI's Images API and more."),
    "export-triton": (
        "latentrt.runtime.triton.cli",
        "export_triton",
        "Put a bundle into a model repository of Triton Inference Server.",
    ),
    "samplers": ("latentrt.runtime.cli", "samplers", "List the samplers, or print the plan of one."),
    "inspect": ("latentrt.export.cli", "inspect", "Show what a bundle or a checkpoint is."),
    "verify": ("latentrt.runtime.verify.cli", "verify", "Check a bundle's files and engines."),
    "bench": ("latentrt.runtime.bench.cli", "bench", "Measure latency by stage, memory and errors; compare results."),
    "bench-serve": ("latentrt.runtime.bench.load.cli", "bench_serve", "Measure what a service gives under load."),
}
PROMPT_SETS = {"demo": ("latentrt.export.demo.scoring", "held_out_prompts")}  # checkpoint: (module, attribute)
ARGUMENTS = "latentrt.arguments"
# What the system refuses, whoever asks: no sentence of ours foresaw the file, and it is no bug either.
SYSTEM = (
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
)
JSON = "--json"
# In a sentence: what is quoted and stays, `name`, name='value', some_name.
NAMES = re.compile(
    r"(?<!\w)'[^']*'|`(?P<marked>[a-z0-9_]+)`|\b(?P<set>[a-z_]+)=(?P<value>'\w+')"
    r"|(?<![\w/.-])(?P<plain>[a-z]+_[a-z_]+)(?![\w/-]|\.\w)"  # not in a path
)


DRAW = ("latentrt.runtime.verify.recorded", "draw_recorded")


def given() -> dict[str, Any]:
    """Return what commands are given of the folders that their own may not import, imported when it is called.

    prompt_sets: by checkpoint, prompts with known answers and the function that scores pictures of them, for
        `bench --accuracy`; draw: draws prompts and tells what the denoisers met, for `export --precision fp8`
    """
    return {
        "prompt_sets": {checkpoint: _called(*place) for checkpoint, place in PROMPT_SETS.items()},
        "draw": _called(*DRAW),
    }


def _called(module: str, attribute: str) -> Callable[..., Any]:
    return lambda *positional, **named: getattr(importlib.import_module(module), attribute)(*positional, **named)


class Refusal(click.ClickException):
    """What the user can fix: one sentence on stderr, or with --json one object on stdout; exit code 2.

    field: of the request, or the name of the parameter that is at fault, None if it is neither
    retryable: as in `LatentrtError`
    """

    exit_code = 2

    def __init__(self, kind: str, message: str, field: str | None, *, retryable: bool, as_json: bool) -> None:
        super().__init__(message)
        self.kind, self.field, self.retryable, self.as_json = kind, field, retryable, as_json

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        if self.as_json:
            error = {
                "type": self.kind,
                "message": self.message,
                "field": self.field,
                "retryable": self.retryable,
            }
            click.echo(json.dumps({"error": error}, indent=1), file=file)
        else:
            click.echo(f"latentrt: {self.message}", file=file, err=True)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used, so that `--help` stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return find_command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        arguments = tuple(args)
        with refused(arguments):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta[ARGUMENTS] = arguments
        return context

    def invoke(self, ctx: click.Context) -> Any:
        with refused(ctx.meta[ARGUMENTS]):
            return super().invoke(ctx)


def find_command(name: str) -> click.Command | None:
    """Import a command, None if there is none of this name."""
    if name not in COMMANDS:
        return None
    module, attribute, _ = COMMANDS[name]
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    return command


@contextmanager
def refused(arguments: Sequence[str]) -> Iterator[None]:
    """Turn bad input into a `Refusal`; click's own messages about usage stay, unless JSON is asked for."""
    try:
        yield
    except click.UsageError as error:
        if not prints_json(arguments):
            raise
        field = None if error.ctx is None else getattr(getattr(error, "param", None), "name", None)
        raise Refusal("UsageError", error.format_message(), field, retryable=False, as_json=True) from error
    except LatentrtError as error:
        told = isinstance(error, (CheckpointError, BundleError))  # these name files and components, and no fields
        message, field = (str(error), None) if told else in_options(str(error), called(arguments))
        kind, as_json = type(error).__name__, prints_json(arguments)
        raise Refusal(kind, message, field, retryable=error.retryable, as_json=as_json) from error
    except OSError as error:
        if error.errno not in SYSTEM:
            raise
        what = f"{error.filename or 'a file'} could not be read or written: {error.strerror}"
        said = f"{what}; see to it and run the command again"
        raise Refusal("OSError", said, None, retryable=False, as_json=prints_json(arguments)) from error


def called(arguments: Sequence[str]) -> click.Command | None:
    """Return the command that the arguments call: all options before it are flags."""
    return find_command(next((argument for argument in arguments if not argument.startswith("-")), ""))


def prints_json(arguments: Sequence[str]) -> bool:
    """Tell whether a command prints JSON: its --json is a flag, or is given - for a file."""
    own = list(itertools.takewhile(lambda argument: argument != "--", arguments))
    command = called(own)
    option = next((param for param in command.params if JSON in param.opts), None) if command else None
    if isinstance(option, click.Option) and not option.is_flag:
        return f"{JSON}=-" in own or (JSON, "-") in itertools.pairwise(own)
    return JSON in own


def in_options(message: str, command: click.Command | None) -> tuple[str, str | None]:
    """Return a sentence about fields of a request with the names of a command's options, and the field at fault.

    `guidance_rescale: found 2` is `--guidance-rescale: found 2` there. Fields are known where they begin a sentence,
    by their underscores, in `backquotes`, and as name='value'; what is in quotes came from the user and stays, and so
    do paths.
    """
    params = command.params if command else []
    known = {name: param for param in params for name in _names(param)}
    head = re.match(FIELD, message)
    field = head[0] if head and head[0] in known else None
    start = len(field) if field else 0

    def spoken(found: re.Match[str]) -> str:
        name = found["marked"] or found["set"] or found["plain"]
        if name not in known:
            return found[0]
        return _option(known[name], found["value"])

    rest = NAMES.sub(spoken, message[start:])
    return (_option(known[field]) if field else "") + rest, field


def _names(param: click.Parameter) -> set[str]:
    """Return what a request may call a parameter: by its own name, or as its option is written."""
    written = (name.removeprefix("--").replace("-", "_") for name in param.opts if name.startswith("--"))
    return {str(param.name), *written}


def _option(param: click.Parameter, value: str | None = None) -> str:
    if isinstance(param, click.Argument):
        return param.human_readable_name
    flag = isinstance(param, click.Option) and param.is_flag
    name = next((name for name in param.opts if name.startswith("--")), param.opts[0])
    return name if value is None or flag else f"{name} {value}"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="latentrt")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Export a Stable Diffusion checkpoint once, then draw pictures without PyTorch."""
    ctx.obj = given()


def main() -> None:
    """Run the command line: bad input gives one sentence on stderr and exit code 2; warnings are logged to stderr."""
    logging.basicConfig(format="latentrt: %(message)s")
    cli.main(prog_name="latentrt")


if __name__ == "__main__":
    main()
