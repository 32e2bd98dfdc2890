"""The command that says what lies at a path: a bundle, or what could become one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from latentrt.engines.cli import show_bundle
from latentrt.engines.manifest import MANIFEST
from latentrt.export.inspection import Inspection, inspect_checkpoint

MB = 1e6


@click.command()
@click.argument("path")
@click.option("--revision", default=None, help="Branch, tag or commit of a hub id that was fetched before.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(path: str, revision: str | None, as_json: bool) -> None:
    """Show what PATH is: a bundle with its engines, or a checkpoint and whether it can be exported.

    Of a checkpoint, a directory or a safetensors file, only the JSON and the files' headers are read.
    """
    if (Path(path) / MANIFEST).is_file():
        show_bundle(Path(path), as_json=as_json)
        return
    inspection = inspect_checkpoint(path, revision=revision)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(inspection), indent=1))
    else:
        _print(inspection, Console())


def _print(inspection: Inspection, console: Console) -> None:
    lines = {
        "path": f"{inspection.path} ({inspection.layout})",
        "model": inspection.model or "not recognised",
        "predicts": inspection.prediction,
        "picture": "{}x{}".format(*inspection.picture) if inspection.picture else None,
    }
    for name, value in lines.items():
        if value:
            console.print(f"{name:<10}{value}", highlight=False, markup=False, soft_wrap=True)
    if inspection.networks:
        console.print(_networks(inspection))
    for note in inspection.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    verdict = f"cannot be exported as it is: {inspection.problem}" if inspection.problem else "can be exported"
    console.print(verdict, highlight=False, markup=False, soft_wrap=True)


def _networks(inspection: Inspection) -> Table:
    table = Table("network", "class", "parameters", "stored in", "size")
    for network in inspection.networks:
        dtypes = ", ".join(f"{dtype} {share:.0%}" for dtype, share in network.dtypes.items())
        table.add_row(
            network.name,
            network.kind,
            "" if network.parameters is None else f"{network.parameters / MB:.2f} M",
            dtypes if len(network.dtypes) > 1 else dtypes.split(" ")[0],
            f"{network.bytes / MB:.1f} MB",
        )
    return table
