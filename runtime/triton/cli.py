"""`latentrt export-triton`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from latentrt.engines.backends import BACKENDS
from latentrt.runtime.triton.repository import ModelOptions, write_model

KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


@click.command
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", type=click.Path(path_type=Path))
@click.option("--name", help="The model's name. Default: the bundle's own.")
@click.option("--model-version", default=1, show_default=True, type=click.IntRange(min=1), help="Its version.")
@click.option("--link", is_flag=True, help="Point to the bundle where it is, instead of copying it.")
@click.option("--force", is_flag=True, help="Replace a model that is there, with all its versions.")
@click.option("--backend", default="auto", show_default=True, type=click.Choice(["auto", *BACKENDS]), help="What runs.")
@click.option(
    "--instances", default="auto", show_default=True, type=click.Choice(list(KINDS)), help="On the CPU, or on each GPU."
)
@click.option("--slots", default=8, show_default=True, help="Pictures that are drawn together, at the most.")
@click.option("--waiting", default=64, show_default=True, help="Pictures that may wait, at the most.")
@click.option("--slo", type=float, help="Promise this many times a picture's own time alone.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an instance. Default: the backend's own.")
@click.option("--store", metavar="URL", help="Where engines come from that the bundle does not hold for a machine.")
@click.option("--loras", metavar="DIRECTORY", help="A folder of the server with LoRAs that calls may name.")
@click.option("--json", "as_json", is_flag=True, help="Print the model's name, version and directory as JSON.")
def export_triton(
    bundle: Path,
    repository: Path,
    name: str | None,
    model_version: int,
    link: bool,
    force: bool,
    instances: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Put BUNDLE into a model REPOSITORY of Triton Inference Server, for its Python backend.

    Triton's Python needs latentrt: pip install 'latentrt[cpu]' there.
    """
    told = ModelOptions(device_kind=KINDS[instances], **options)
    target = write_model(bundle, repository, told, name=name, version=model_version, link=link, force=force)
    summary = {"name": target.name, "version": model_version, "directory": str(target)}
    click.echo(json.dumps(summary, indent=1) if as_json else f"{target}: version {model_version} of '{target.name}'")
