"""A result as one self-contained page: plots as inline SVG, light and dark, nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from latentrt.runtime.bench.report.plots import accuracy_curves, cold_bars, scaling, stage_bars, stage_lines, strips
from latentrt.runtime.bench.report.text import HEAD, milliseconds, remarks, rows, warnings
from latentrt.runtime.bench.result import Report, Variant, write_text

LIGHT = ("#2a78d6", "#1baf7a", "#eda100", "#008300", "#4a3aa7", "#e34948")
DARK = ("#3987e5", "#199e70", "#c98500", "#3da83d", "#9085e9", "#e66767")

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1d1d1b; --soft: #66655f; --rule: #e4e3de; --shade: #f3f2ee;
  LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #181817; --ink: #f2f1ec; --soft: #a3a199; --rule: #343431;
  --shade: #222220; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 860px; padding: 32px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px } h2 { font-size: 18px; margin: 40px 0 4px }
p { margin: 4px 0 12px; max-width: 70ch } .soft { color: var(--soft) } code { font-size: 13px; overflow-wrap: anywhere }
.warning { border-left: 3px solid var(--k2); padding: 4px 12px; background: var(--shade) }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 }
.tile { flex: 1 1 150px; background: var(--shade); border-radius: 8px; padding: 12px 14px }
.tile b { display: block; font-size: 24px; font-weight: 600; line-height: 1.25 }
.tile span { color: var(--soft); font-size: 13px }
svg { display: block; width: 100%; height: auto; margin: 8px 0 }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) } svg .tick { fill: var(--soft); font-size: 11.5px }
svg .value { font-weight: 600 }
.grid { stroke: var(--rule); stroke-width: 1 } .line { fill: none; stroke-width: 2 } .whisker { stroke-width: 1.5 }
.median { stroke: var(--ink); stroke-width: 1.5 } .interval { fill: var(--ink); opacity: .14 }
.band { opacity: .16 } circle.faint { opacity: .6 }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin: 8px 0 16px }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap;
  font-variant-numeric: tabular-nums }
.facts td { white-space: normal; text-align: left; vertical-align: top }
.facts td:first-child { white-space: nowrap; color: var(--soft); width: 1% }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
summary { cursor: pointer; padding: 4px 0 } details { margin: 4px 0 }
"""


def write_page(report: Report, path: Path) -> None:
    """Write the page in one step. Raises BundleError if the disk refuses it."""
    write_text(page(report), path)


def page(report: Report) -> str:
    """Return the page."""
    title = f"latentrt bench: {report.bundle.name}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body>\n"
        f"<h1>{escape(report.bundle.name)}</h1>\n" + "\n".join(_sections(report)) + "\n</body></html>\n"
    )


def _style() -> str:
    colours = [" ".join(f"--k{i}: {c};" for i, c in enumerate(some)) for some in (LIGHT, DARK)]
    classes = "\n".join(f".c{i} {{ fill: var(--k{i}) }} .s{i} {{ stroke: var(--k{i}) }}" for i in range(len(LIGHT)))
    return STYLE.replace("LIGHT", colours[0]).replace("DARK", colours[1]) + classes


def _sections(report: Report) -> list[str]:
    machine, bundle = report.machine, report.bundle
    gpu = f"{machine.gpu.name}, " if machine.gpu else ""
    parts = [
        f'<p class="soft">{escape(bundle.family)}, {escape(bundle.precision)} · {escape(gpu + machine.processor)}, '
        f"{machine.cores} cores, {machine.memory_gib} GiB · {escape(report.created)} · "
        f"{report.method.rounds} rounds</p>",
        *(f'<p class="warning">{escape(line)}</p>' for line in warnings(report)),
        _tiles(report),
    ]
    for heading, words, plot in _plots(report):
        if plot is not None:
            parts.append(f'<h2>{heading}</h2><p class="soft">{words}</p>{plot}')
    parts += [_stages(report), _quality(report), _method(report)]
    return parts


def _plots(report: Report) -> list[tuple[str, str, str | None]]:
    return [
        ("Where the time goes", "Medians of the stages, side by side.", stage_bars(report)),
        (
            "Speed and right pictures",
            "Held-out prompts whose shape, colour and background all came out right, with 95 % intervals. "
            "The number at each point is its steps.",
            accuracy_curves(report),
        ),
        ("How it grows", "All else being equal.", scaling(report)),
        (
            "Every measurement",
            "A dot is one batch from prompt to PNG. The shaded box is the 95 % interval of the median; nothing is "
            "left out.",
            strips(report),
        ),
        (
            "Each denoise stage",
            "The line is the median over the rounds, the band reaches from the quickest to p95; of many variants the "
            "four with the most stages.",
            stage_lines(report),
        ),
        ("A fresh process", "Until its first picture is there; files are in the system's cache.", cold_bars(report)),
    ]


def _tiles(report: Report) -> str:
    best = min(report.variants, key=lambda v: v.seconds["end_to_end"].summary.p50 / v.settings.batch)
    tiles = [
        (f"{milliseconds(best.seconds['end_to_end'].summary.p50)} ms", _of("end to end, median", best, report)),
        (f"{best.steps_per_second.summary.p50:.3g}", "denoise stages a second"),
        (f"{best.outside_engines.summary.p50:.1%}", "of the time outside the engines"),
    ]
    if report.cold_starts:
        start = report.cold_starts[0]
        tiles.append((f"{milliseconds(start.seconds['total'].summary.p50)} ms", "fresh process to first picture"))
        tiles.append((f"{start.peak_rss_bytes.summary.p50 / 2**20:.0f} MiB", "resident memory at most"))
    if best.energy_j:
        tiles.append((f"{best.energy_j.summary.p50:.3g} J", "a batch"))
    boxes = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{boxes}</div>'


def _of(what: str, variant: Variant, report: Report) -> str:
    return f"{what}; {variant.name}" if len(report.variants) > 1 else what


def _stages(report: Report) -> str:
    parts = ["<h2>Latency by stage</h2>"]
    for i, variant in enumerate(report.variants):
        table = f'<div class="scroll">{_table(HEAD, rows(variant))}</div><p class="soft">{escape(remarks(variant))}</p>'
        shown = " open" if i < 2 else ""
        parts.append(f"<details{shown}><summary><b>{escape(variant.name)}</b></summary>{table}</details>")
    return "".join(parts)


def _quality(report: Report) -> str:
    if not report.errors:
        return ""
    lines = [[error.component, error.backend, f"{error.error:.1e}", f"{error.limit:.0e}"] for error in report.errors]
    words = "The largest difference from the recorded fp32 outputs, over their largest magnitude."
    table = _table(["component", "backend", "error", "limit"], lines)
    return f'<h2>Error against fp32</h2><p class="soft">{words}</p><div class="scroll">{table}</div>'


def _method(report: Report) -> str:
    machine, conditions, method = report.machine, report.conditions, report.method
    facts = [
        ["command", report.command],
        ["prompt", method.prompt],
        ["rounds", f"{method.rounds} of {method.rounds_asked}, order drawn with seed {method.seed}"],
        ["processor", machine.processor],
        ["system", f"{machine.system}, Python {machine.python}"],
        ["GPU", machine.gpu.name if machine.gpu else "none"],
        *([name, version] for name, version in machine.versions.items()),
        ["load before", f"{conditions.load_before:.2f}"],
        *(["used by others", f"{share:.1%}"] for share in (conditions.others_share,) if share is not None),
        *(["taken by the host", f"{share:.1%}"] for share in (conditions.stolen_share,) if share is not None),
    ]
    lines = "".join(f"<tr><td>{escape(a)}</td><td><code>{escape(b)}</code></td></tr>" for a, b in facts)
    rule = escape(method.warmup_rule)
    return (
        f'<h2>How it was measured</h2><p class="soft">Warm-up: {rule}. Then rounds, in each of which every variant '
        f'draws once, in a new random order.</p><table class="facts">{lines}</table>'
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in lines)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
