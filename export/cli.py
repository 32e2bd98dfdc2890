"""The command that turns a checkpoint into a bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import cast, get_args

import click

from latentrt.engines.backends import BACKENDS, choose
from latentrt.engines.errors import CheckpointError
from latentrt.engines.progress import terminal_report
from latentrt.engines.spec import BackendName, Precision

GIB = 2**30


@click.command()
@click.argument("checkpoint")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--precision", type=click.Choice(get_args(Precision)), default="fp32", show_default=True)
@click.option(
    "--backend", "backends", multiple=True, help=f"Build engines for auto, {', '.join(BACKENDS)}; repeatable."
)
@click.option("--no-build", is_flag=True, help="Write the canonical graphs only.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle of something else.")
@click.option("--revision", default=None, help="Branch, tag or commit of a hub id.")
@click.option("--json", "as_json", is_flag=True, help="Print how it went as JSON.")
def export(
    checkpoint: str,
    bundle: Path,
    precision: str,
    backends: tuple[str, ...],
    no_build: bool,
    overwrite: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT into BUNDLE: graphs, recorded outputs, and engines for this machine.

    CHECKPOINT is a directory in diffusers' layout, a hub id, a directory exported by optimum, or `demo`. A run that was
    killed is resumed by the same command.
    """
    if no_build and backends:
        raise CheckpointError("--no-build and --backend exclude each other; give one of them")
    chosen: list[BackendName] = [] if no_build else [choose(name).backend for name in backends or ("auto",)]
    try:
        from latentrt.export.exporting import export_checkpoint
    except ImportError as error:
        raise CheckpointError(
            f"exporting needs {error.name}, which is not installed; install it with: pip install 'latentrt[export]'"
        ) from None
    with terminal_report(quiet=as_json) as report:
        summary = export_checkpoint(
            checkpoint,
            bundle,
            precision=cast(Precision, precision),
            backends=chosen,
            overwrite=overwrite,
            revision=revision,
            report=report,
        )
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(summary), "rss_ratio": summary.rss_ratio}, indent=1))
    elif summary.already_there:
        click.echo(f"{bundle} is there already: the same checkpoint, precision and version")
    else:
        for name, part in summary.components.items():
            how = "resumed" if part.resumed else f"{part.seconds:.1f} s"
            size = part.spec.weights_bytes / 1e6
            click.echo(f"{name:<14}{size:>9.1f} MB  {how:>9}  largest error {part.error:.1e} of the range")
        peak = summary.peak_rss_bytes / GIB
        ratio = f"{summary.rss_ratio:.1f} times the largest network's weights"
        click.echo(f"{bundle}: {summary.seconds:.1f} s, peak memory {peak:.2f} GiB, {ratio}")
