"""Plots as SVG text: scales, axes and marks. Pure functions of numbers; colours and fonts are the page's classes.

Coordinates are in units of the drawing's viewBox; a page scales the drawing to its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

import msgspec

WIDTH = 760.0
LOG_TICKS = 7  # at most, on a logarithmic axis
WIDEST_NAMES = 260.0  # of the column of row names
CHARACTER = 7.0  # width of a letter at the labels' size, on average

Scale = Callable[[float], float]


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """The area inside the axes: left, top, right and bottom in the drawing."""

    left: float
    top: float
    right: float
    bottom: float


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Return a scale that takes low to start and high to end."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Return a scale that takes low to start and high to end, evenly in factors."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(value))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between low and high, at most this many: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between low and high for a logarithmic axis: 1, 2 and 5 times powers of ten, or fewer."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) <= LOG_TICKS:
            return found or [low, high]
    return found


def number(value: float) -> str:
    """Write a number for an axis: no needless digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def drawing(height: float, parts: Sequence[str], *, label: str) -> str:
    """Return a whole drawing; the label is what a screen reader says."""
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'


def text(x: float, y: float, content: str, *, kind: str = "label", anchor: str = "start") -> str:
    """Return a line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, *, kind: str) -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def bar(x: float, y: float, width: float, height: float, *, kind: str, tip: str) -> str:
    """Return a filled box with a tooltip."""
    box = f'x="{x:.2f}" y="{y:.1f}" width="{max(width, 0):.2f}" height="{height:.1f}"'
    return f'<rect {box} rx="1.5" class="{kind}"><title>{escape(tip)}</title></rect>'


def dot(x: float, y: float, *, kind: str, tip: str, radius: float = 3.5) -> str:
    """Return a dot with a tooltip."""
    return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius}" class="{kind}"><title>{escape(tip)}</title></circle>'


def path(points: Sequence[tuple[float, float]], *, kind: str) -> str:
    """Return a line through points."""
    steps = " L".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return f'<path d="M{steps}" class="{kind}"/>'


def band(upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], *, kind: str) -> str:
    """Return the area between two lines."""
    steps = " L".join(f"{x:.2f},{y:.2f}" for x, y in [*upper, *reversed(lower)])
    return f'<path d="M{steps} Z" class="{kind}"/>'


def x_axis(frame: Frame, scale: Scale, marks: Sequence[float], title: str, *, unit: str = "") -> Iterator[str]:
    """Draw upright grid lines with their numbers below, and the axis's title at the right end."""
    for mark in marks:
        x = scale(mark)
        yield line(x, frame.top, x, frame.bottom, kind="grid")
        yield text(x, frame.bottom + 15, number(mark) + unit, kind="tick", anchor="middle")
    yield text(frame.right, frame.bottom + 31, title, kind="tick", anchor="end")


def y_axis(frame: Frame, scale: Scale, marks: Sequence[float], title: str, *, unit: str = "") -> Iterator[str]:
    """Draw level grid lines with their numbers to the left, and the axis's title above."""
    for mark in marks:
        y = scale(mark)
        yield line(frame.left, y, frame.right, y, kind="grid")
        yield text(frame.left - 7, y + 4, number(mark) + unit, kind="tick", anchor="end")
    yield text(frame.left, frame.top - 9, title, kind="tick")


def gutter(names: Sequence[str]) -> float:
    """Return how wide the column of row names must be: a single row needs none, the page names it."""
    if len(names) == 1:
        return 8.0
    return min(WIDEST_NAMES, 14 + CHARACTER * max(map(len, names)))


def shorten(name: str, width: float) -> str:
    """Cut a name to what fits a width."""
    fits = max(int((width - 14) / CHARACTER), 0)
    return name if len(name) <= fits else f"{name[: fits - 1]}…" if fits else ""
