"""What several commands take, a size in pixels, comma-separated lists, which GPU, and what they print: tables."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

if TYPE_CHECKING:  # of the commands that are only asked for help, none loads rich
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")
WIDE = 200  # characters of a line where no terminal says how many there are

on_gpu = click.option("--device", type=click.IntRange(min=0), default=0, help="Which of the visible GPUs, from 0.")


class Size(click.ParamType[tuple[int, int]]):
    """`512x768` or `512`: width and height in pixels."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
        if found is None:
            self.fail(f"'{value}' is not a size; write it as 512x768", param, ctx)
        return int(found[1]), int(found[2] or found[1])


class Many(click.ParamType[tuple[T, ...]], Generic[T]):
    """Comma-separated values of one type: `1,2,4`."""

    def __init__(self, kind: click.ParamType[T], example: str) -> None:
        self.name = self._example = example
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[T, ...]:
        if isinstance(value, tuple):  # a default
            return value
        try:
            return tuple(self._kind.convert(part.strip(), param, ctx) for part in str(value).split(","))
        except click.BadParameter:
            self.fail(f"found '{value}', expected comma-separated values, as in {self._example}", param, ctx)


def printed() -> Console:
    """Return a console on stdout, as wide as its terminal or as $COLUMNS says, or wide in a file or a pipe."""
    from rich.console import Console

    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console()
    return Console(width=WIDE, height=25)  # with a height: rich takes 80 without one where TERM is dumb


def table(*columns: str, title: str | None = None) -> Table:
    """Return a table whose cells wrap and are never cut: a name is of no use without its end."""
    from rich.table import Column, Table

    headed = (Column(column, overflow="fold") for column in columns)
    return Table(*headed, title=title, title_justify="left")
