"""The command that measures: bench."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from latentrt.engines.bundle.parsing import json_schema
from latentrt.engines.cli_parts import Many, Size, on_gpu
from latentrt.engines.errors import RequestError
from latentrt.engines.progress import terminal_report
from latentrt.runtime.bench.compare import TOLERANCE, compare, undecided
from latentrt.runtime.bench.report.text import comparison_text, markdown, report_text
from latentrt.runtime.bench.result import PROMPT, Report, read_report, to_json, write_report

File = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)


@click.command()
@click.argument("bundle", required=False)
@click.option("--size", "sizes", type=Many(Size(), "256x256,512x512"), default=(), help="Default: the checkpoint's.")
@click.option("--batch", "batches", type=Many(POSITIVE, "1,4"), default=(1,), help="Pictures drawn at once.")
@click.option("--steps", type=Many(POSITIVE, "4,20"), default=(20,), help="Numbers of steps. Default: 20.")
@click.option(
    "--sampler",
    "samplers",
    type=Many(click.STRING, "euler,dpmpp_2m_karras"),
    default=(None,),
    help="Default: the checkpoint's own.",
)
@click.option("--guidance", "guidances", type=Many(click.FLOAT, "1,7.5"), default=(7.5), help="Scales. Default: 7.5.")
@click.option("--backend", "backends", type=Many(click.STRING, "cpu,cuda"), default=("auto"), help="Default: auto.")
@click.option("--threads", type=Many(POSITIVE, "1,2"), default=(None,), help="CPU threads. Default: the backend's own.")
@on_gpu
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Most rounds to measure.")
@click.option("--seconds", type=click.FloatRange(min=0), default=120.0, show_default=True, help="At most, for rounds.")
@click.option("--cold", type=click.IntRange(min=0), default=3, show_default=True, help="Cold starts to measure.")
@click.option("--accuracy", type=click.IntRange(min=0), default=0, help="Held-out prompts to score (demo only).")
@click.option("--golden/--no-golden", default=True, help="Check recorded outputs first. Default: yes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order of the variants.")
@click.option("--json", "json_file", type=File, default=None, help="Write the result to this file; - prints it.")
@click.option("--html", "html_file", type=File, default=None, help="Write a page with plots to this file.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print a Markdown table instead of text.")
@click.option("--show", type=File, default=None, help="Show a saved result instead of measuring.")
@click.option("--compare", "pair", type=File, nargs=2, default=None, help="Compare two saved results.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=TOLERANCE, show_default=True, help="For --compare.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of results.")
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    bundle: str | None,
    json_file: Path | None,
    html_file: Path | None,
    as_markdown: bool,
    show: Path | None,
    pair: tuple[Path, Path] | None,
    tolerance: float,
    schema: bool,
    **asked: Any,
) -> None:
    """Measure BUNDLE's latency by stage, its memory and its errors; every combination of the options takes turns.

    --compare A B exits with 1 if B is slower than A by more than the noise of both, and with 2 if they cannot be
    compared.
    """
    if sum((schema, show is not None, pair is not None, bundle is not None)) != 1:
        raise RequestError("bench takes one of: a BUNDLE to measure, --show FILE, --compare A B, --schema")
    if schema:
        click.echo(json.dumps(json_schema(Report), indent=1))
    elif pair is not None:
        _compare(ctx, *pair, tolerance=tolerance)
    else:
        report = (
            read_report(show)
            if show
            else _measure(str(bundle), json_file, (ctx.obj or {}).get("prompt_sets", {}), asked)
        )
        _deliver(report, json_file, html_file, as_markdown=as_markdown)


def _measure(bundle: str, json_file: Path | None, prompt_sets: Any, asked: dict[str, Any]) -> Report:
    # this loads the whole pipeline, which showing a result does not need
    from latentrt.runtime.bench.measure import Asked, run_bench

    command = shlex.join(["latentrt", *sys.argv[1:]])
    with terminal_report(quiet=str(json_file) == "-") as progress:
        return run_bench(bundle, Asked(**asked), command=command, prompt_sets=prompt_sets, progress=progress)


def _deliver(report: Report, json_file: Path | None, html_file: Path | None, *, as_markdown: bool) -> None:
    if json_file is not None and str(json_file) != "-":
        write_report(report, json_file)
    if html_file is not None:
        from latentrt.runtime.bench.report.html import write_page

        write_page(report, html_file)
    if str(json_file) == "-":
        click.echo(to_json(report), nl=False)
    else:
        click.echo(markdown(report) if as_markdown else report_text(report), nl=False)


def _compare(ctx: click.Context, before: Path, after: Path, *, tolerance: float) -> None:
    found = compare(read_report(before), read_report(after), tolerance=tolerance)
    if undecided(found.changes):
        raise RequestError("the results have too few rounds to compare; measure both with --rounds 10 or more")
    click.echo(comparison_text(found), nl=False)
    if found.regressed:
        ctx.exit(1)
