"""`python -m benchmarks.torture`: the parts by name, with a seed and a duration; results as JSON with both."""

from __future__ import annotations

import datetime
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import msgspec

from latentrt.runtime.bench.machine import describe

PARTS = {  # name: (module, what it does, seconds of the short form)
    "writes": ("writing.writes", "Every call that writes fails once.", 24.0),
    "kills": ("writing.kills", "kill -9 at random moments, of one and of two at once.", 12.0),
    "reads": ("reading.reads", "Every reader is given what nobody should write.", 20.0),
    "files": ("reading.files", "Every file of a bundle is altered.", 8.0),
    "devices": ("devices", "Each call to the GPU and to TensorRT fails once, on the tests' stand-in.", 10.0),
    "soak": ("soak", "Mixed requests for long: memory, handles, right pictures, fairness.", 12.0),
    "process": ("process", "Forks and ends while something is drawn.", 60.0),
}
LONG_S = 3600.0


def module_of(name: str) -> ModuleType:
    """Return the module of a part. Its NAMES are what it can be told to try alone, where it can."""
    return importlib.import_module(f"benchmarks.torture.{PARTS[name][0]}")


def run_part(
    name: str, work: Path, *, seed: int, seconds: float, short: bool, only: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run one part. Return its result: what it is of, what it did, and under `found` what should not have been."""
    start = time.monotonic()
    chosen = {"only": only} if only else {}
    done = module_of(name).run(work, seed=seed, seconds=seconds, short=short, **chosen)
    head = {
        "part": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": seed,
        "form": "short" if short else "long",
        "seconds": round(time.monotonic() - start, 1),
        "machine": describe(),
    }
    return head | dict(msgspec.to_builtins(done))


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--seed", default=1, show_default=True, help="Of all that is drawn.")
@click.option("--seconds", type=float, help="For each part. Default: its short form, or an hour with --long.")
@click.option("--long", is_flag=True, help="Try everything once, instead of a sample.")
@click.option("--only", multiple=True, help="A scene of writes or kills, a reader of reads, a way of soak; or several.")
@click.option("--work", type=click.Path(path_type=Path), help="A folder to work in. Default: a temporary one.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="A folder for results: torture-PART[-NAMES].json.",
)
def torture(
    parts: tuple[str, ...],
    seed: int,
    seconds: float | None,
    *,
    long: bool,
    only: tuple[str, ...],
    work: Path | None,
    output: Path | None,
) -> None:
    """Put latentrt under fire, in PARTS, or in all of them; exit code 1 if something gave way."""
    if only:
        check_names(parts, only)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="latentrt-torture-") as beside:
        for name in parts or PARTS:
            limit = seconds if seconds is not None else LONG_S if long else PARTS[name][2]
            folder = (work or Path(beside)).resolve()
            result = run_part(name, folder, seed=seed, seconds=limit, short=not long, only=only)
            click.echo(f"{name}: {summary(result)}")
            for one in result["found"][:20]:
                click.echo(f"  {json.dumps(one, ensure_ascii=False)[:800]}")
            failures += len(result["found"])
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
                place = output / f"torture-{'-'.join((name, *only)).replace(' ', '-')}.json"
                place.write_text(text, encoding="utf-8")
    sys.exit(1 if failures else 0)


def check_names(parts: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Raise UsageError unless the one part that is to run has all these names."""
    known = getattr(module_of(parts[0]), "NAMES", ()) if len(parts) == 1 else ()
    if not known:
        raise click.UsageError("--only chooses within one part that has names: writes, kills, reads or soak")
    if unknown := sorted(set(only) - set(known)):
        raise click.UsageError(f"--only: {', '.join(unknown)} not among {', '.join(known)}")


def summary(result: dict[str, Any]) -> str:
    """Return a result in one line."""
    counts = ", ".join(f"{name} {value}" for name, value in result.get("counts", {}).items())
    return f"{len(result['found'])} found in {result['seconds']:.0f} s, seed {result['seed']}: {counts}"


if __name__ == "__main__":
    torture()
