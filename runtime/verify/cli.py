"""The command that proves a bundle: its files, its engines' recorded outputs, the stages of a drawing, its layers."""

from __future__ import annotations

import json
import sys

import click
import msgspec
from rich.markup import escape
from rich.table import Table

from latentrt.engines.backends import BACKENDS
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.cli_parts import on_gpu, printed, table
from latentrt.engines.find import choose
from latentrt.engines.progress import terminal_report
from latentrt.engines.verify.layers import verify_layers
from latentrt.engines.verify.verify import Row
from latentrt.engines.verify.verify import verify as verify_bundle
from latentrt.runtime.verify.stages import verify_stages


@click.command()
@click.argument("bundle")
@click.option("--backend", default=None, help=f"Check only one backend: {', '.join(BACKENDS)}")
@on_gpu
@click.option(
    "--stages/--no-stages",
    default=True,
    help="Draw a picture and compare each stage with the float32 graphs' on the CPU.",
)
@click.option("--layers", is_flag=True, help="Name the first layers that leave the float32 graph (needs Polygraphy).")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def verify(bundle: str, backend: str | None, device: int, stages: bool, layers: bool, as_json: bool) -> None:
    """Check BUNDLE's hashes, recorded outputs and the stages of a drawing on each backend that can run here.

    Exits with 2 on any fault.
    """
    opened = Bundle.open(bundle)
    only = choose(backend, opened, device=device).backend if backend else None
    with terminal_report(quiet=as_json) as report:
        by_layer = verify_layers(opened, backend=only, device=device, report=report) if layers else ()
        by_stage = verify_stages(opened, backend=only, device=device, report=report) if stages else ()
        rows = [*verify_bundle(opened, backend=only, device=device, report=report), *by_stage, *by_layer]
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(rows), indent=1))
    else:
        printed().print(_table(rows))
    faults = [row for row in rows if not row.ok]
    for row in faults:
        click.echo(f"latentrt: {row.what}{f', {row.profile}' if row.profile else ''}: {row.message}", err=True)
        for layer in row.layers[1:]:
            click.echo(f"  then {layer}", err=True)
    if faults:
        sys.exit(2)


def _table(rows: list[Row]) -> Table:
    listed = table("what", "at", "backend", "ok", "error", "limit", "")
    for row in rows:
        error, limit = (f"{value:.1e}" if value is not None else "" for value in (row.error, row.limit))
        listed.add_row(row.what, row.profile, row.backend, "yes" if row.ok else "NO", error, limit, escape(row.message))
    return listed
