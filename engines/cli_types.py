"""What several commands take: a size in pixels, comma-separated lists, and which GPU."""

from __future__ import annotations

import re
from typing import Any, Generic, TypeVar

import click

T = TypeVar("T")

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
