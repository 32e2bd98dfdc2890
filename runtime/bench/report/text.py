"""A result as text: a table for the terminal, Markdown for a README, and the lines of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from latentrt.runtime.bench.compare import BUSY, COLD, RULE, Change, Comparison
from latentrt.runtime.bench.result import ColdStart, Report, Variant
from latentrt.runtime.bench.samples import Summary

TITLES = {
    "tokenize": "tokenize",
    "encode": "encode the text",
    "denoise": "denoise",
    "step": "one denoise stage",
    "decode": "decode to pixels",
    "encode_image": "encode as PNG",
    "total": "prompt to pixels",
    "end_to_end": "end to end",
}


def milliseconds(seconds: float) -> str:
    """Write a duration in milliseconds with three significant digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def interval(summary: Summary) -> str:
    """Write the interval of the median, in milliseconds."""
    if summary.median_low is None or summary.median_high is None:
        return "too few rounds"
    return f"{milliseconds(summary.median_low)} to {milliseconds(summary.median_high)}"


def rows(variant: Variant) -> list[list[str]]:
    """Return the table of a variant's stages: name, p50, its interval, p90, p95, p99, spread, outliers."""
    return [
        [
            TITLES.get(stage, stage),
            milliseconds(measured.summary.p50),
            interval(measured.summary),
            *(milliseconds(getattr(measured.summary, name)) for name in ("p90", "p95", "p99")),
            f"{measured.summary.spread:.1%}",
            str(measured.summary.outliers),
        ]
        for stage, measured in variant.seconds.items()
    ]


HEAD = ["stage", "p50 ms", "95 % interval", "p90", "p95", "p99", "spread", "outliers"]


def report_text(report: Report) -> str:
    """Write a report for a terminal."""
    parts = [heading(report)]
    for variant in report.variants:
        parts.append(f"{variant.name}\n{aligned([HEAD, *rows(variant)])}\n{remarks(variant)}")
    parts += [cold_text(start) for start in report.cold_starts]
    if report.errors:
        parts.append(errors_text(report))
    return "\n\n".join(parts) + "\n"


def heading(report: Report) -> str:
    """Return what was measured, on what, and how quiet it was there."""
    machine, bundle = report.machine, report.bundle
    gpu = f"{machine.gpu.name}, " if machine.gpu else ""
    lines = [
        f"{bundle.name} ({bundle.family}, {bundle.precision}), {report.method.rounds} rounds, {report.created}",
        f"{gpu}{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB, Python {machine.python}",
        ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
    ]
    lines += [f"{name}: {one.note()}" for name, one in bundle.quantised.items()]
    return "\n".join([*lines, *warnings(report)])


def warnings(report: Report) -> list[str]:
    """Say what makes these figures worth less."""
    found = []
    others, stolen = report.conditions.others_share, report.conditions.stolen_share
    if others is not None and others > BUSY:
        found.append(f"other processes used {others:.0%} of the cores during the run: read ratios, not milliseconds")
    if stolen is not None and stolen > BUSY:
        found.append(f"the host took {stolen:.0%} of the cores' time away: read ratios, not milliseconds")
    restless = [variant.name for variant in report.variants if not variant.warmup.steady]
    if restless:
        named = "; ".join(restless) if len(restless) <= 4 else f"{len(restless)} of {len(report.variants)} variants"
        found.append(f"not steady when the rounds began: {named}")
    return found


def remarks(variant: Variant) -> str:
    """Return the figures of a variant that are not times."""
    parts = [
        f"backend {variant.backend} ({variant.reason})",
        f"{variant.steps_per_second.summary.p50:.3g} denoise stages a second",
        f"{variant.outside_engines.summary.p50:.2%} of the time outside the engines",
    ]
    if variant.energy_j:
        parts.append(f"{variant.energy_j.summary.p50:.3g} J a batch")
    if variant.device_bytes is not None:
        parts.append(f"{variant.device_bytes / 2**20:.0f} MiB of GPU memory")
    if variant.prompts:
        score = variant.prompts
        parts.append(f"{score.right} of {score.prompts} prompts right ({score.low:.1%} to {score.high:.1%})")
    return "; ".join(parts)


def cold_text(start: ColdStart) -> str:
    """Return one line on a cold start."""
    parts = ", ".join(f"{name} {milliseconds(m.summary.p50)} ms" for name, m in start.seconds.items())
    memory = f"{start.peak_rss_bytes.summary.p50 / 2**20:.0f} MiB resident at most"
    return f"{COLD}{start.name}, {start.peak_rss_bytes.summary.count} fresh processes: {parts}; {memory}"


def errors_text(report: Report) -> str:
    """Return one line on the errors against fp32."""
    parts = (f"{error.component} {error.error:.1e} ({error.backend})" for error in report.errors)
    return "largest error against fp32, over the range: " + ", ".join(parts)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Set a table in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    )


def markdown(report: Report) -> str:
    """Write a table for a README: a row for each variant, and the machine below."""
    head = [
        "drawn",
        "end to end, p50 (95 % interval)",
        "p95",
        "a denoise stage",
        "outside the engines",
        "prompts right",
    ]
    if not any(variant.prompts for variant in report.variants):
        head.pop()
    lines = [_row(head), _row(["---"] * len(head))]
    for variant in report.variants:
        whole, step = variant.seconds["end_to_end"].summary, variant.seconds["step"].summary
        cells = [
            variant.name,
            f"{milliseconds(whole.p50)} ms ({interval(whole)})",
            f"{milliseconds(whole.p95)} ms",
            f"{milliseconds(step.p50)} ms",
            f"{variant.outside_engines.summary.p50:.2%}",
        ]
        if len(head) > len(cells):
            cells.append(f"{variant.prompts.right} of {variant.prompts.prompts}" if variant.prompts else "")
        lines.append(_row(cells))
    note = heading(report).replace("\n", ". ")
    return "\n".join([*lines, "", f"{note}. `{report.command}`"]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def comparison_text(found: Comparison) -> str:
    """Write a comparison: what differs in the circumstances, every figure in both, and the rule."""
    parts = []
    if found.differences:
        parts.append("differs (before, after):\n" + "\n".join(f"  {line}" for line in found.differences))
    for names, where in ((found.only_before, "first"), (found.only_after, "second")):
        if names:
            parts.append(f"only in the {where}: " + "; ".join(names))
    table = [["variant", "figure", "before", "after", "ratio", "99 % interval", "noise", "verdict"]]
    parts.append(aligned(table + [_change(change) for change in found.changes]))
    bad = found.regressed
    verdict = (
        f"{len(bad)} regressed: " + "; ".join(f"{c.variant}: {_title(c)}" for c in bad) if bad else "none regressed"
    )
    return "\n\n".join([*parts, f"{verdict}\nrule: {RULE}"]) + "\n"


def _change(change: Change) -> list[str]:
    ratio = change.ratio
    between = "" if ratio.low is None or ratio.high is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
    before, after = (quantity(value, change.unit) for value in (change.before, change.after))
    return [
        change.variant,
        _title(change),
        before,
        after,
        f"{ratio.estimate:.3f}",
        between,
        f"{change.noise:.1%}",
        change.verdict,
    ]


def _title(change: Change) -> str:
    return change.figure if change.variant.startswith(COLD) else TITLES.get(change.figure, change.figure)


def quantity(value: float, unit: str) -> str:
    """Write a figure with its unit."""
    if unit == "s":
        return f"{milliseconds(value)} ms"
    if unit == "B":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.3g}"
