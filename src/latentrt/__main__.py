"""The command line's front door: names the commands and imports each one's module only when it is called.

It sits above the three folders because none of them may import all the others (`export → engines ← runtime`).
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import click

from latentrt import __version__
from latentrt.engines.errors import LatentrtError

COMMANDS = {  # name: (module, attribute, one line for --help)
    "export": ("latentrt.export.cli", "export", "Turn a checkpoint into a bundle."),
    "build": ("latentrt.engines.cli", "build", "Build a bundle's engines for the machine at hand."),
    "generate": ("latentrt.runtime.cli", "generate", "Draw pictures from a prompt."),
    "animate": ("latentrt.runtime.cli", "animate", "Draw an animation between prompts and seeds."),
    "samplers": ("latentrt.runtime.cli", "samplers", "List the samplers, or print one as a table of numbers."),
    "inspect": ("latentrt.export.inspect_cli", "inspect", "Show what a bundle or a checkpoint is."),
    "verify": ("latentrt.engines.cli", "verify", "Check a bundle's files and engines."),
    "bench": ("latentrt.runtime.bench.cli", "bench", "Measure latency by stage, memory and errors; compare results."),
}
PROMPT_SETS = {"demo": ("latentrt.export.demo.scoring", "held_out_prompts")}  # checkpoint: (module, attribute)


def prompt_set(checkpoint: str, count: int) -> Any:
    """Return prompts of known answers and their judge: `bench` measures with what lies in `export`."""
    module, attribute = PROMPT_SETS[checkpoint]
    return getattr(importlib.import_module(module), attribute)(count)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used, so that `--help` stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="latentrt")
def cli() -> None:
    """Export a Stable Diffusion checkpoint once, then draw from it with no torch."""


def main() -> None:
    """Run the command line: what the user can mend is one sentence on stderr and exit code 2."""
    try:
        prompt_sets = {checkpoint: partial(prompt_set, checkpoint) for checkpoint in PROMPT_SETS}
        cli.main(prog_name="latentrt", standalone_mode=True, obj=prompt_sets)
    except LatentrtError as error:
        click.echo(f"latentrt: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
