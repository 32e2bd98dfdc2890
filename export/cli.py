"""The command that turns a checkpoint into a bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import click
from rich.console import Console
from rich.table import Table

from latentrt.engines.backends import BACKENDS
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.manifest import MANIFEST
from latentrt.engines.bundle.training import Prediction
from latentrt.engines.cli import show_bundle, show_for_polygraphy, show_rooflines
from latentrt.engines.cli_parts import Many, Size, printed, table
from latentrt.engines.errors import CheckpointError
from latentrt.engines.find import choose_to_build
from latentrt.engines.graphs.roofline import CEILINGS
from latentrt.engines.progress import terminal_report
from latentrt.engines.spec import BackendName, Precision
from latentrt.export.export import Exported, export_checkpoint
from latentrt.export.inspection import Inspection, inspect_checkpoint
from latentrt.export.options import CheckpointOptions, ControlNetOption, LoraOption

MIB = 1 << 20


class Blocks(click.ParamType[tuple[int, ...]]):
    """Blocks of a network by number: `7,8,9`, or `none`."""

    name = "7,8,9"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        return () if value == "none" else Many(click.INT, self.name).convert(value, param, ctx)


@click.command()
@click.argument("checkpoint")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    help="Default: fp32 for the CPU, fp16 for a GPU. fp8 and int8: what stands it of the denoisers, the rest in fp16.",
)
@click.option("--backend", "backends", multiple=True, help=f"auto, {', '.join(BACKENDS)}; repeatable.")
@click.option("--no-build", is_flag=True, help="Write the ONNX graphs only, without engines.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.option("--revision", default=None, help="Branch, tag or commit of a hub id or its cache.")
@click.option("--vae", default=None, metavar="PATH", help="Use the VAE of another directory or file.")
@click.option("--tiny-vae", default=None, metavar="DIR", help="Add a tiny decoder: an AutoencoderTiny's directory.")
@click.option("--unet", default=None, metavar="PATH", help="Use the UNet of another directory or file.")
@click.option("--motion-adapter", default=None, metavar="PATH", help="Draw videos: put AnimateDiff's modules in.")
@click.option("--refiner", default=None, metavar="CHECKPOINT", help="Add the SDXL refiner.")
@click.option(
    "--text-encoder", "text_encoders", multiple=True, metavar="PATH", help="One that a file of SD 3 lacks; repeatable."
)
@click.option(
    "--skip-layers",
    type=Blocks(),
    default=None,
    help="Blocks that pictures can be guided away from (SD 3), or none. Default: the published ones.",
)
@click.option("--t5/--no-t5", default=True, help="Export T5 too, where a checkpoint holds it (SD 3).")
@click.option("--tokenizer", default=None, metavar="DIR", help="The CLIP tokenizer, which a single file lacks.")
@click.option("--config", default=None, metavar="DIR", help="Configs of a single file with unusual sizes.")
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:SCALE]", help="Merge a LoRA into the weights; repeatable."
)
@click.option("--controlnet", "controlnets", multiple=True, metavar="NAME=PATH", help="Add a ControlNet; repeatable.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=PATH", help="Add a T2I-Adapter; repeatable.")
@click.option("--ip-adapter", "ip_adapters", multiple=True, metavar="NAME=PATH", help="Add an IP-Adapter; repeatable.")
@click.option("--image-encoder", default=None, metavar="DIR", help="The IP-Adapters' CLIP vision model.")
@click.option("--allow-pickle", is_flag=True, help="Allow weights in pickle files; only tensors are read from them.")
@click.option("--prediction-type", type=click.Choice(get_args(Prediction)), help="What the UNet predicts.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress.")
@click.pass_obj
def export(
    given: Mapping[str, Any] | None,
    /,
    checkpoint: str,
    bundle: Path,
    precision: str | None,
    backends: tuple[str, ...],
    no_build: bool,
    overwrite: bool,
    as_json: bool,
    loras: tuple[str, ...],
    controlnets: tuple[str, ...],
    adapters: tuple[str, ...],
    ip_adapters: tuple[str, ...],
    **options: Any,
) -> None:
    """Turn CHECKPOINT into BUNDLE: graphs, recorded outputs, and engines for this machine.

    CHECKPOINT is a directory in diffusers' layout, a single safetensors file, a hub id, a directory exported by
    optimum, or `demo`. Run the same command again to resume an export that was interrupted.
    """
    if no_build and backends:
        raise CheckpointError("--no-build and --backend exclude each other; give only one")
    chosen: list[BackendName] = (
        [] if no_build else [choose_to_build(name, BuildOptions()).backend for name in backends or ("auto",)]
    )
    with terminal_report(quiet=as_json) as report:
        exported = export_checkpoint(
            checkpoint,
            bundle,
            precision=cast(Precision | None, precision),
            backends=chosen,
            overwrite=overwrite,
            options=CheckpointOptions(
                loras=tuple(map(LoraOption.parse, loras)),
                controlnets=tuple(map(ControlNetOption.parse, controlnets)),
                adapters=tuple(ControlNetOption.parse(text, option="--adapter") for text in adapters),
                ip_adapters=tuple(ControlNetOption.parse(text, option="--ip-adapter") for text in ip_adapters),
                **options,
            ),
            draw=(given or {}).get("draw"),
            report=report,
        )
    summary = summarise(exported, bundle)
    click.echo(json.dumps(summary, indent=1) if as_json else _table(summary))


def summarise(exported: Exported, bundle: Path) -> dict[str, Any]:
    """Return what an export did as plain data."""
    largest = max((each.weights_bytes for each in exported.components.values()), default=0)
    peak = max((each.peak_rss_bytes for each in exported.components.values()), default=0)
    return {
        "bundle": str(bundle),
        "already_there": exported.already_there,
        "family": exported.manifest.family,
        "precision": exported.manifest.precision,
        "bytes": sum(record.bytes for record in exported.manifest.files.values()),
        "seconds": round(exported.seconds, 2),
        "engines": dict(exported.engines),
        "preview_r_squared": exported.preview_r_squared,
        "notes": [note for note in (exported.manifest.schedule.clip_note,) if note],
        "peak_rss_bytes": peak,
        "peak_rss_over_largest": round(peak / largest, 2) if largest else None,
        "components": {
            name: {
                "weights_bytes": finished.weights_bytes,
                "seconds": finished.seconds,
                "peak_rss_bytes": finished.peak_rss_bytes,
                "peak_rss_over_weights": round(finished.peak_rss_bytes / max(finished.weights_bytes, 1), 2),
                "error": finished.error,
                "graph": finished.graph,
                "float32_layers": finished.float32_layers,
                "notes": exported.manifest.components[name].notes(),
                "largest_activation": finished.largest_activation,
                "resumed": name in exported.resumed,
            }
            for name, finished in exported.components.items()
        },
    }


def _table(summary: dict[str, Any]) -> str:
    width = max(13, 1 + max(map(len, summary["components"]), default=0))
    head = f"{'component':<{width}}{'weights':>12}{'seconds':>9}{'peak memory':>14}{'of weights':>12}{'max error':>14}"
    head += f"{'graph':>9}"
    rows = [
        f"{name:<{width}}{row['weights_bytes'] / MIB:>8.1f} MiB{row['seconds']:>9.1f}"
        f"{row['peak_rss_bytes'] / MIB:>10.0f} MiB{row['peak_rss_over_weights']:>12.2f}{_error(row['error']):>14}"
        f"{row['graph'] or 'adopted':>9}" + ("  (from an earlier run)" if row["resumed"] else "")
        for name, row in summary["components"].items()
    ]
    state = "was there already" if summary["already_there"] else "is ready"
    last = (
        f"'{summary['bundle']}' {state}: {summary['family']}, {summary['precision']}, "
        f"{summary['bytes'] / MIB:.1f} MiB, {summary['seconds']:.1f} s, "
        f"engines: {', '.join(summary['engines']) or 'none'}"
    )
    memory = (
        f"peak memory {summary['peak_rss_bytes'] / MIB:.0f} MiB, libraries included: "
        f"{summary['peak_rss_over_largest']} times the largest component's weights"
    )
    notes = [f"{name}: {note}" for name, row in summary["components"].items() for note in row["notes"]]
    return "\n".join([head, *rows, memory, *notes, *summary["notes"], last] if rows else [*summary["notes"], last])


def _error(error: float | None) -> str:
    return "not compared" if error is None else f"{error:.1e}"


MB = 1e6


@click.command()
@click.argument("path")
@click.option("--revision", default=None, help="Branch, tag or commit of a hub id that was fetched before.")
@click.option(
    "--polygraphy",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a bundle's recorded inputs and outputs there for Polygraphy, and print its commands.",
)
@click.option("--roofline", metavar="GPU", help=f"Of a bundle: the least time of a pass on {' or '.join(CEILINGS)}.")
@click.option("--size", type=Size(), help="Of the picture, for --roofline; the bundle's own by default.")
@click.option("--eight-bit", is_flag=True, help="For --roofline: layers with weights compute in fp8 or int8.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(
    path: str,
    revision: str | None,
    polygraphy: Path | None,
    roofline: str | None,
    size: tuple[int, int] | None,
    eight_bit: bool,
    as_json: bool,
) -> None:
    """Show what PATH is: a bundle with its engines, or a checkpoint and whether it can be exported.

    Of a checkpoint, a directory or a safetensors file, only the JSON and the files' headers are read.
    """
    if polygraphy is not None:
        show_for_polygraphy(Path(path), polygraphy, as_json=as_json)
    elif roofline is not None:
        show_rooflines(Path(path), gpu=roofline, size=size, eight_bit=eight_bit, as_json=as_json)
    elif (Path(path) / MANIFEST).is_file():
        show_bundle(Path(path), as_json=as_json)
    else:
        _show_checkpoint(inspect_checkpoint(path, revision=revision), as_json=as_json)


def _show_checkpoint(inspection: Inspection, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(inspection), indent=1))
    else:
        _print(inspection, printed())


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
    listed = table("network", "class", "parameters", "stored in", "size")
    for network in inspection.networks:
        dtypes = ", ".join(f"{dtype} {share:.0%}" for dtype, share in network.dtypes.items())
        listed.add_row(
            network.name,
            network.kind,
            "" if network.parameters is None else f"{network.parameters / MB:.2f} M",
            dtypes if len(network.dtypes) > 1 else dtypes.split(" ")[0],
            f"{network.bytes / MB:.1f} MB",
        )
    return listed
