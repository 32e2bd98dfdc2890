"""The plots of a result: each a function of the report that returns SVG, or None if there is nothing to plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from latentrt.runtime.bench.report.svg import (
    WIDTH,
    Frame,
    Scale,
    band,
    bar,
    dot,
    drawing,
    gutter,
    line,
    linear,
    log_ticks,
    logarithmic,
    path,
    shorten,
    text,
    ticks,
    x_axis,
    y_axis,
)
from latentrt.runtime.bench.report.text import milliseconds
from latentrt.runtime.bench.result import Report, Settings, Variant

# What adds up to a picture, in order; the number is the colour, the same in every plot.
STAGES = {"tokenize": 3, "encode": 1, "denoise": 0, "decode": 2, "encode_image": 4}
START = {"interpreter": 3, "import": 1, "load": 2, "first": 0}
LEGEND = {
    "tokenize": "tokenize",
    "encode": "encode the text",
    "denoise": "denoise",
    "decode": "decode to pixels",
    "encode_image": "encode as PNG",
    "interpreter": "start Python",
    "import": "import",
    "load": "load the engines",
    "first": "first picture",
}
ROW = 30.0
COLOURS = 6
LINES = 4  # more bands would hide each other


def stage_bars(report: Report) -> str | None:
    """Where the time goes: a bar for each variant, the medians of its stages side by side."""
    rows = {
        variant.name: {stage: variant.seconds[stage].summary.p50 for stage in STAGES if stage in variant.seconds}
        for variant in report.variants
    }
    whole = [variant.seconds["end_to_end"].summary.p50 for variant in report.variants]
    return _stacked(rows, whole, STAGES, label="Median milliseconds of each stage")


def cold_bars(report: Report) -> str | None:
    """What happens before the first picture of a fresh process."""
    rows = {start.name: {part: start.seconds[part].summary.p50 for part in START} for start in report.cold_starts}
    whole = [start.seconds["total"].summary.p50 for start in report.cold_starts]
    return _stacked(rows, whole, START, label="Median milliseconds of a cold start's parts") if rows else None


def _stacked(
    rows: Mapping[str, Mapping[str, float]], whole: Sequence[float], colours: Mapping[str, int], *, label: str
) -> str:
    left = gutter(list(rows))
    frame = Frame(left=left, top=30, right=WIDTH - 76, bottom=34 + ROW * len(rows))
    most = 1e3 * max(sum(parts.values()) for parts in rows.values())
    scale = linear(0, most, frame.left, frame.right)
    drawn = [*_legend(colours), *x_axis(frame, scale, ticks(0, most), "milliseconds, median")]
    for i, (name, parts) in enumerate(rows.items()):
        y, x = frame.top + 4 + ROW * i, 0.0
        drawn.append(text(left - 8, y + 16, shorten(name, left), anchor="end"))
        for part, seconds in parts.items():
            tip = f"{name}: {LEGEND[part]} {milliseconds(seconds)} ms"
            width = scale(x + 1e3 * seconds) - scale(x)
            drawn.append(bar(scale(x), y, width - min(1, width / 2), 22, kind=f"c{colours[part]}", tip=tip))
            x += 1e3 * seconds
        drawn.append(text(scale(x) + 6, y + 16, f"{milliseconds(whole[i])} ms", kind="value"))
    return drawing(frame.bottom + 40, drawn, label=label)


def _legend(colours: Mapping[str, int]) -> list[str]:
    drawn, x = [], 0.0
    for part, colour in colours.items():
        drawn.append(bar(x, 6, 11, 11, kind=f"c{colour}", tip=LEGEND[part]))
        drawn.append(text(x + 16, 16, LEGEND[part], kind="tick"))
        x += 34 + 6.2 * len(LEGEND[part])
    return drawn


def strips(report: Report) -> str:
    """Every measurement of a whole picture, as a distance from its variant's median; none is left out."""
    measured = {variant.name: variant.seconds["end_to_end"] for variant in report.variants}
    far = [100 * (s / m.summary.p50 - 1) for m in measured.values() for s in m.samples]
    left = gutter(list(measured))
    frame = Frame(left=left, top=8, right=WIDTH - 12, bottom=14 + ROW * len(measured))
    low, high = min(min(far), -1.0), max(max(far), 1.0)
    scale = linear(low - 0.04 * (high - low), high + 0.04 * (high - low), frame.left, frame.right)
    drawn = list(x_axis(frame, scale, ticks(low, high, 8), "distance from the median", unit=" %"))
    for i, (name, one) in enumerate(measured.items()):
        y, median = frame.top + 6 + ROW * i, one.summary.p50
        drawn.append(text(left - 8, y + 15, shorten(name, left), anchor="end"))
        if one.summary.median_low is not None and one.summary.median_high is not None:
            ends = [scale(100 * (end / median - 1)) for end in (one.summary.median_low, one.summary.median_high)]
            tip = f"{name}: median {milliseconds(median)} ms, 95 % interval"
            drawn.append(bar(ends[0], y, max(ends[1] - ends[0], 1.5), 20, kind="interval", tip=tip))
        drawn.append(line(scale(0), y, scale(0), y + 20, kind="median"))
        for j, sample in enumerate(one.samples):
            height = y + 3 + 14 * ((j * 0.618) % 1)  # spread out, so that equal ones do not hide each other
            tip = f"round {j + 1}: {milliseconds(sample)} ms"
            drawn.append(dot(scale(100 * (sample / median - 1)), height, kind="c0 faint", tip=tip, radius=2.6))
    return drawing(frame.bottom + 40, drawn, label="Every measurement, as a distance from the median")


def stage_lines(report: Report) -> str | None:
    """Each denoise stage by itself: the median, and the band from the quickest to p95."""
    several = [variant for variant in report.variants if len(variant.denoise_stages) > 1]
    shown = sorted(several, key=lambda variant: -len(variant.denoise_stages))[:LINES]
    if not shown:
        return None
    frame = Frame(left=58, top=36 + 18 * len(shown), right=WIDTH - 12, bottom=250 + 18 * len(shown))
    most = 1e3 * max(stage.p95 for variant in shown for stage in variant.denoise_stages)
    count = max(len(variant.denoise_stages) for variant in shown)
    across, up = linear(1, count, frame.left + 8, frame.right - 8), linear(0, 1.05 * most, frame.bottom, frame.top)
    numbers = [n for n in ticks(1, count, 12) if n == int(n) and n >= 1]
    drawn = [*y_axis(frame, up, ticks(0, most, 5), "milliseconds"), *x_axis(frame, across, numbers, "denoise stage")]
    for i, variant in enumerate(shown):
        points = [(across(k + 1), stage) for k, stage in enumerate(variant.denoise_stages)]
        upper, lower = ([(x, up(1e3 * getattr(s, end))) for x, s in points] for end in ("p95", "lowest"))
        drawn.append(band(upper, lower, kind=f"c{i} band"))
        drawn.append(path([(x, up(1e3 * s.p50)) for x, s in points], kind=f"s{i} line"))
        drawn += [
            dot(x, up(1e3 * s.p50), kind=f"c{i}", tip=f"stage {k + 1}: {milliseconds(s.p50)} ms", radius=2.6)
            for k, (x, s) in enumerate(points)
        ]
        drawn += _key(i, variant.name, 16 + 18 * i, frame.left)
    return drawing(frame.bottom + 40, drawn, label="Milliseconds of each denoise stage")


def _key(colour: int, name: str, y: float, left: float) -> list[str]:
    return [line(left, y - 4, left + 18, y - 4, kind=f"s{colour} line"), text(left + 25, y, name, kind="tick")]


def accuracy_curves(report: Report) -> str | None:
    """How many prompts come out right, against the time of a picture: a line for each sampler and guidance."""
    scored = [variant for variant in report.variants if variant.prompts is not None]
    if len(scored) < 2:
        return None
    curves = _curves(scored)
    frame = Frame(left=58, top=38 + 18 * min(len(curves), COLOURS), right=WIDTH - 16, bottom=0)
    frame = Frame(left=frame.left, top=frame.top, right=frame.right, bottom=frame.top + 260)
    xs = [_picture_ms(variant) for variant in scored]
    low, high = 0.9 * min(xs), 1.12 * max(xs)
    across = logarithmic(low, high, frame.left, frame.right)
    up = linear(0, 100, frame.bottom, frame.top)
    drawn = [
        *y_axis(frame, up, [0, 25, 50, 75, 100], "prompts right", unit=" %"),
        *x_axis(frame, across, log_ticks(low, high), "milliseconds a picture, median"),
    ]
    for i, (name, variants) in enumerate(list(curves.items())[:COLOURS]):
        drawn += _curve(i, variants, across, up)
        drawn += _key(i, name, 16 + 18 * i, frame.left)
    return drawing(frame.bottom + 40, drawn, label="Share of prompts drawn right against milliseconds a picture")


def _curve(colour: int, variants: Sequence[Variant], across: Scale, up: Scale) -> list[str]:
    points = [(across(_picture_ms(v)), v) for v in variants]
    drawn = [path([(x, up(100 * v.prompts.share)) for x, v in points if v.prompts], kind=f"s{colour} line")]
    for x, variant in points:
        score, settings = variant.prompts, variant.settings
        assert score is not None
        drawn.append(line(x, up(100 * score.low), x, up(100 * score.high), kind=f"s{colour} whisker"))
        tip = f"{settings.sampler}, {settings.steps} steps: {score.right} of {score.prompts} right"
        drawn.append(dot(x, up(100 * score.share), kind=f"c{colour}", tip=f"{tip}, {_picture_ms(variant):.0f} ms"))
        drawn.append(
            text(
                x + 5,
                up(100 * score.share) + (14 + 12 * colour if score.share > 0.2 else -7),
                str(settings.steps),
                kind="tick",
            )
        )
    return drawn


def _picture_ms(variant: Variant) -> float:
    return 1e3 * variant.seconds["end_to_end"].summary.p50 / variant.settings.batch


def _curves(variants: Sequence[Variant]) -> dict[str, list[Variant]]:
    guidances = {variant.settings.guidance for variant in variants}
    curves: dict[str, list[Variant]] = {}
    for variant in sorted(variants, key=_picture_ms):
        settings = variant.settings
        more = f", guidance {settings.guidance:g}" if len(guidances) > 1 else ""
        curves.setdefault(settings.sampler + more, []).append(variant)
    return curves


SCALED: Mapping[
    str, Callable[[Settings], float]
] = {  # what may grow along an axis: the numbers of a variant's settings
    "picture area, megapixels": lambda s: s.width * s.height / 1e6,
    "pictures in a batch": lambda s: float(s.batch),
    "steps": lambda s: float(s.steps),
    "CPU threads": lambda s: float(s.threads or 0),
}


def scaling(report: Report) -> str | None:
    """How the time grows with the one number in which the variants differ, if it is one."""
    found = [
        (title, value)
        for title, value in SCALED.items()
        if len({value(variant.settings) for variant in report.variants}) == len(report.variants)
    ]
    if len(report.variants) < 3 or not found or len({_rest(v.settings, found[0][0]) for v in report.variants}) > 1:
        return None
    title, value = found[0]
    frame = Frame(left=58, top=26, right=WIDTH - 16, bottom=270)
    points = sorted((value(v.settings), v) for v in report.variants)
    most = 1e3 * max(v.seconds["end_to_end"].summary.p95 for v in report.variants)
    across = linear(0, 1.04 * points[-1][0], frame.left, frame.right)
    up = linear(0, 1.05 * most, frame.bottom, frame.top)
    drawn = [
        *y_axis(frame, up, ticks(0, most, 6), "milliseconds, end to end: the quickest, the median, p95"),
        *x_axis(frame, across, ticks(0, points[-1][0], 8), title),
    ]
    drawn.append(path([(across(x), up(1e3 * v.seconds["end_to_end"].summary.p50)) for x, v in points], kind="s0 line"))
    for x, variant in points:
        summary = variant.seconds["end_to_end"].summary
        drawn.append(line(across(x), up(1e3 * summary.lowest), across(x), up(1e3 * summary.p95), kind="s0 whisker"))
        tip = f"{variant.name}: {milliseconds(summary.p50)} ms"
        drawn.append(dot(across(x), up(1e3 * summary.p50), kind="c0", tip=tip))
    return drawing(frame.bottom + 40, drawn, label=f"Milliseconds against {title}")


def _rest(settings: Settings, title: str) -> tuple[object, ...]:
    others = tuple(value(settings) for name, value in SCALED.items() if name != title)
    return (*others, settings.sampler, settings.guidance, settings.backend)
