"""The command that builds engines, and the bundle's half of inspect."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from rich.console import Console
from rich.table import Table

from latentrt.engines.backends import BACKENDS
from latentrt.engines.build import build_engines, engines_at
from latentrt.engines.build_options import BuildOptions, Recipe
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import Provenance
from latentrt.engines.cli_parts import Many, Size, on_gpu, printed, table
from latentrt.engines.errors import RequestError
from latentrt.engines.find import choose_to_build, shapes_of
from latentrt.engines.graphs.roofline import CEILINGS, Roofline, rooflines
from latentrt.engines.progress import terminal_report
from latentrt.engines.tensor_names import STATE_ROWS

MB = 1e6
GIGA = 1e9


_SHAPE_OPTIONS = (
    click.option("--size", "sizes", type=Many(Size(), "512x512,768x512"), default=(), help="Picture sizes, in pixels."),
    click.option("--batch", "batches", type=Many(click.INT, "1,2,4"), default=(1,), help="Pictures drawn at once."),
    click.option("--tokens", type=Many(click.INT, "77,154"), default=(), help="Prompt lengths to build for."),
    click.option("--compute-capability", metavar="8.9", help="GPU type to build for on a machine without a GPU."),
    click.option("--optimization-level", type=int, help="How long the compiler searches, 0 to 5."),
    click.option("--workspace-mb", type=int, help="Most workspace memory for one layer, in MB."),
    click.option("--aux-streams", type=click.IntRange(min=0), help="Streams for layers that can run side by side."),
    click.option("--separate-skips", is_flag=True, help="Copy the UNet's skip connections before they are joined."),
    click.option("--lean", "version_compatible", is_flag=True, help="For the lean runtime of the same version."),
    click.option(
        "--timing-cache",
        type=click.Path(dir_okay=False, path_type=Path),
        help="A file that keeps the compiler's measurements for the next build.",
    ),
    click.option("--refittable", "--refit", "refit", is_flag=True, help="Build engines that LoRAs can be applied to."),
    click.option("--references/--no-references", default=True, help="Record references for `latentrt verify`."),
    click.option("--state-rows", type=int, default=STATE_ROWS, help="Rows of sampler state that the engine holds."),
    click.option("--recipe", type=click.Choice(get_args(Recipe)), help="How graphs are optimized (cuda)."),
    click.option("--tf32/--no-tf32", default=None, help="Let matrix products use TF32, which rounds them (cuda)."),
)


def _shape_options(command: Callable[..., None]) -> Callable[..., None]:
    return functools.reduce(lambda inner, option: option(inner), reversed(_SHAPE_OPTIONS), command)


@click.command()
@click.argument("bundle")
@click.option("--backend", default="auto", show_default=True, help=f"auto, {', '.join(BACKENDS)}")
@on_gpu
@_shape_options
@click.option("--force", is_flag=True, help="Build again even if the engines exist.")
@click.option("--store", metavar="URL", help="Fetch the engines from this store, or build and publish them to it.")
@click.option("--fetch-only", is_flag=True, help="Only fetch from the store, never build.")
@click.option("--json", "as_json", is_flag=True, help="Print the engine record as JSON.")
def build(
    bundle: str,
    backend: str,
    device: int,
    force: bool,
    store: str | None,
    fetch_only: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build BUNDLE's engines for this machine. Engines for other machines are kept.

    TensorRT engines are compiled for fixed shapes: every size with every batch. The options for shapes and for the
    compiler apply to the backends tensorrt and tensorrt-rtx. A store holds engines by their key, which names the GPU,
    the versions and the options: each kind of machine builds once, and the others fetch. Engines of a
    read-only bundle go into $LATENTRT_CACHE, or latentrt in the user's cache folder.
    """
    wanted = BuildOptions(**options)
    chosen = choose_to_build(backend, wanted, device=device).backend
    opened = Bundle.open(bundle)
    with terminal_report(quiet=as_json) as report:
        record = build_engines(
            opened,
            chosen,
            options=wanted,
            device=device,
            force=force,
            store=store,
            fetch_only=fetch_only,
            report=report,
        )
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(record), indent=1))
    else:
        size = sum(file.bytes for file in record.files.values()) / MB
        click.echo(f"{engines_at(opened, record.key)}: {size:.1f} MB, built in {record.build_s:.1f} s")


def show_for_polygraphy(bundle: Path, directory: Path, *, as_json: bool) -> None:
    """Write what a bundle's components must compute for Polygraphy, and print the commands that read it."""
    from latentrt.engines.verify.polygraphy import write_golden  # which few who inspect need

    written = write_golden(Bundle.open(bundle), directory)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(written, enc_hook=str), indent=1))
        return
    for one in written:
        click.echo(f"# {one.component}: {one.inputs.name}, {one.outputs.name}")
        for line in one.commands.values():
            click.echo(line)


def show_bundle(bundle: Path, *, as_json: bool) -> None:
    """Print what a bundle holds: family, components, sizes, engines. export/cli.py has the command."""
    opened = Bundle.open(bundle)
    engines = {path.name: msgspec.to_builtins(record) for path, record in opened.engine_directories().items()}
    if as_json:
        document = {"manifest": msgspec.to_builtins(opened.manifest), "engines": engines}
        click.echo(json.dumps(document, indent=1))
        return
    console = printed()
    _print_heading(opened, console)
    console.print(_component_table(opened))
    for name, component in opened.manifest.components.items():
        for note in component.notes():
            console.print(f"{name}: {note}", highlight=False, soft_wrap=True)
    console.print(_engine_table(opened))


def show_rooflines(bundle: Path, *, gpu: str, size: tuple[int, int] | None, eight_bit: bool, as_json: bool) -> None:
    """Print the least time of a pass of each component on a GPU. export/cli.py has the command."""
    if gpu not in CEILINGS:
        raise RequestError(f"--roofline: found {gpu}, expected one of {', '.join(CEILINGS)}")
    found = rooflines(Bundle.open(bundle), CEILINGS[gpu], size=size, eight_bit=eight_bit)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found), indent=1))
        return
    console = printed()
    for name, pass_ in found.items():
        console.print(_roofline_table(name, gpu, pass_))


def _roofline_table(name: str, gpu: str, found: Roofline) -> Table:
    listed = table("operator", "nodes", "GFLOP", "MB", "ms", title=f"{name} on {gpu}")
    for cost in found.costs:
        work, moved = cost.operations / GIGA, cost.bytes / MB
        listed.add_row(cost.operator, str(cost.nodes), f"{work:.1f}", f"{moved:.1f}", f"{1000 * cost.seconds:.3g}")
    work, moved = (sum(getattr(cost, what) for cost in found.costs) for what in ("operations", "bytes"))
    listed.add_section()
    listed.add_row("in turn", "", f"{work / GIGA:.1f}", f"{moved / MB:.1f}", f"{1000 * found.seconds:.3g}")
    listed.add_row("fused", "", "", "", f"{1000 * found.fused_s:.3g}")
    return listed


def _print_heading(bundle: Bundle, console: Console) -> None:
    manifest = bundle.manifest
    size = sum(file.bytes for file in manifest.files.values()) / MB
    width, height = manifest.default_size
    lines = {
        "bundle": f"{bundle.root} ({len(manifest.files)} files, {size:.1f} MB without engines)",
        "family": f"{manifest.family}, {manifest.schedule.prediction_type}, {manifest.precision}",
        "checkpoint": ", ".join([manifest.provenance.checkpoint, *_options(manifest.provenance)]),
        "picture": f"{width}x{height}, latents 1/{manifest.latents.factor} with {manifest.latents.channels} channels",
        "made by": f"{manifest.producer}, read as schema {manifest.schema_version}",
    }
    for name, value in lines.items():
        console.print(f"{name:<11}{value}", highlight=False, soft_wrap=True)


def _options(provenance: Provenance) -> list[str]:
    """Return the options of the export: LoRAs with their strengths, a prediction type."""
    return [f"{name} {value}" for name, value in provenance.options.items()]


def _component_table(bundle: Bundle) -> Table:
    listed = table("component", "inputs", "outputs", "weights", "error", title="components")
    for name, component in bundle.manifest.components.items():
        inputs, outputs = ("\n".join(map(str, tensors)) for tensors in (component.inputs, component.outputs))
        error = "not compared" if component.error is None else f"{component.error:.1e}"
        listed.add_row(name, _plain(inputs), _plain(outputs), f"{component.weights_bytes / MB:.1f} MB", error)
    return listed


def _engine_table(bundle: Bundle) -> Table:
    listed = table("engines", "backend", "target", "computes in", "shapes", "size", title="engines")
    for path, record in bundle.engine_directories().items():
        key = record.key
        size = sum(file.bytes for file in record.files.values()) / MB
        library, shapes = f"{key.backend} {key.backend_version}", "\n".join(shapes_of(record)) or "any"
        listed.add_row(path.name, library, key.device, key.precision, shapes, f"{size:.1f} MB")
    return listed


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
