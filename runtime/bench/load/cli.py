"""The command that measures a load: bench-serve."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from latentrt.engines.bundle.parsing import json_schema
from latentrt.engines.cli_parts import Many, Size, on_gpu
from latentrt.engines.errors import RequestError
from latentrt.engines.progress import terminal_report
from latentrt.runtime.bench.load.arrivals import GUIDANCE, Share, read_trace
from latentrt.runtime.bench.load.result import Report, document_text, read_report, read_times
from latentrt.runtime.bench.load.text import markdown, report_text
from latentrt.runtime.bench.result import write_text

File = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
RATE = click.FloatRange(min=0, min_open=True)
WAYS = ("continuous", "one", "static")
MOST_STEPS = 1000


class Mix(click.ParamType[tuple[Share, ...]]):
    """`4:40,20:40,50:20`: numbers of steps, each with its share of the requests."""

    name = "STEPS:SHARE,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Share, ...]:
        if isinstance(value, tuple):  # a default
            return value
        shares: dict[int, float] = {}
        for part in str(value).split(","):
            steps, _, share = part.strip().partition(":")
            try:
                number, weight = int(steps), float(share or 1)
            except ValueError:
                self.fail(f"found '{part}', expected steps and their share, as in 4:40,20:40,50:20", param, ctx)
            if not (1 <= number <= MOST_STEPS and 0 < weight < float("inf")):
                self.fail(f"found '{part}', expected 1 to {MOST_STEPS} steps and a share above 0", param, ctx)
            if number in shares:
                self.fail(f"{number} steps are named twice; give each number of steps once", param, ctx)
            shares[number] = weight
        return tuple(Share(steps=steps, share=share) for steps, share in shares.items())


@click.command("bench-serve")
@click.argument("bundle", required=False)
@click.option("--url", default=None, help="A server of OpenAI's Images API to measure instead of a bundle.")
@click.option("--key", envvar="LATENTRT_API_KEY", default=None, help="For the server. Default: $LATENTRT_API_KEY.")
@click.option("--mix", type=Mix(), default=(Share(steps=20, share=1.0),), help="Steps and their shares. Default: 20.")
@click.option("--trace", type=File, default=None, help="JSON lines with at_s, steps, size, guidance, slo_ms, …")
@click.option("--burst", "cv", type=click.FloatRange(0, 10), default=1.0, help="CV of the gaps. Default: 1, Poisson.")
@click.option(
    "--requests", type=click.IntRange(1, 1_000_000), default=None, help="In a run. Default: 100; fleet: 20000."
)
@click.option("--seeds", type=click.IntRange(min=1, max=100), default=5, show_default=True)
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--slo", "multiple", type=RATE, default=5.0, show_default=True, help="Times a request's own time alone.")
@click.option("--rate", "rates", type=Many(RATE, "1,2.5"), default=(), help="A second. Default: find the goodput.")
@click.option("--serving", "servings", type=Many(click.Choice(WAYS), "continuous,one"), default=WAYS, help="Ways.")
@click.option("--slots", "most", type=POSITIVE, default=8, show_default=True, help="Pictures drawn together at most.")
@click.option("--waiting", type=POSITIVE, default=64, show_default=True, help="Pictures that may wait.")
@click.option("--size", type=Size(), default=None, help="Default: the checkpoint's.")
@click.option("--guidance", type=click.FloatRange(min=0), default=GUIDANCE, show_default=True)
@click.option("--sampler", default=None, help="Default: the checkpoint's own.")
@click.option("--backend", default="auto", show_default=True)
@on_gpu
@click.option("--threads", type=POSITIVE, default=None, help="CPU threads. Default: the backend's own.")
@click.option("--seconds", type=RATE, default=540.0, show_default=True, help="For all of it.")
@click.option("--simulate", is_flag=True, help="Say what the simulator predicts, too.")
@click.option("--fleet", type=Many(POSITIVE, "8,64"), default=None, help="Simulate so many machines. Needs --times.")
@click.option("--times", type=File, default=None, help="A result of --simulate, or its `times` alone, for --fleet.")
@click.option("--json", "json_file", type=File, default=None, help="Write the result to this file; - prints it.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print a Markdown table instead of text.")
@click.option("--show", type=File, default=None, help="Show a saved result instead of measuring.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of results.")
def bench_serve(
    bundle: str | None,
    url: str | None,
    json_file: Path | None,
    show: Path | None,
    schema: bool,
    as_markdown: bool,
    fleet: tuple[int, ...] | None,
    times: Path | None,
    **asked: Any,
) -> None:
    """Measure what BUNDLE, served in three ways, or a server gives under load: who is in time, goodput, percentiles."""
    if sum((schema, *(one is not None for one in (show, bundle, url, fleet)))) != 1:
        raise RequestError("bench-serve takes one of: a BUNDLE or --url URL to measure, --show FILE, --fleet, --schema")
    if fleet is not None:
        _survey(fleet, times, json_file, asked)
        return
    if schema:
        click.echo(json.dumps(json_schema(Report), indent=1))
        return
    report = read_report(show) if show else _measure(bundle, url, quiet=str(json_file) == "-", **asked)
    if json_file is not None and str(json_file) != "-":
        write_text(document_text(report), json_file)
    text = markdown(report) if as_markdown else report_text(report)
    click.echo(document_text(report) if str(json_file) == "-" else text, nl=False)


def _survey(fleet: tuple[int, ...], file: Path | None, json_file: Path | None, asked: dict[str, Any]) -> None:
    from latentrt.runtime.bench.load.simulator.survey import Assumed, Survey, survey, survey_table

    if file is None:
        raise RequestError("times: a fleet is simulated from the times of a machine's parts; name a file that has them")
    times = read_times(file)
    given = {name: asked[name] for name in ("multiple", "most", "waiting", "requests") if asked[name] is not None}
    assumed = Assumed(**given)
    quiet = str(json_file) == "-"
    with terminal_report(quiet=quiet) as progress:
        rows = tuple(survey(sorted(fleet), asked["mix"], times, assumed, progress))
    found = Survey(
        kind="latentrt fleet",
        command=shlex.join(["latentrt", *sys.argv[1:]]),
        source=file.name,
        mix=asked["mix"],
        times=times,
        assumed=assumed,
        rows=rows,
    )
    if json_file is not None and not quiet:
        write_text(document_text(found), json_file)
    click.echo(document_text(found) if quiet else survey_table(found), nl=False)


def _measure(
    bundle: str | None,
    url: str | None,
    *,
    quiet: bool,
    trace: Path | None,
    key: str | None,
    backend: str,
    device: int,
    threads: int | None,
    **asked: Any,
) -> Report:
    # this loads the whole pipeline, which showing a result does not need
    from latentrt.runtime.bench.load.measure import Asked, bundle_target, run_load, server_target
    from latentrt.runtime.pipeline import Pipeline

    items = () if trace is None else read_trace(trace)
    asked = {name: value for name, value in asked.items() if name != "requests" or value is not None}
    plan = Asked(trace=items, trace_name=None if trace is None else trace.name, **asked)
    command = shlex.join(["latentrt", *sys.argv[1:]])
    with terminal_report(quiet=quiet) as progress, ExitStack() as stack:
        if bundle is None:
            target = stack.enter_context(server_target(str(url), key, plan))
        else:
            pipe = stack.enter_context(Pipeline.load(bundle, backend, device=device, threads=threads))
            target = stack.enter_context(bundle_target(pipe, plan))
        return run_load(plan, target, command=command, progress=progress)
