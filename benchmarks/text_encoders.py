"""Memory of the runtime with a large text encoder: kept, or loaded for new prompts and freed before anything is drawn.

    python benchmarks/text_encoders.py [--shape t5-xxl-2] [--folder DIRECTORY] [--json FILE]

The checkpoint has T5-XXL's configuration with two of its 24 layers, and everything else so small that it does not
matter; its weights are random. It is exported for the CPU in fp32, and for each way a fresh process draws three times:
a prompt, the same prompt again, another prompt. --folder (a temporary one by default) needs 6 GB, the process 5 GB.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.progress import terminal_report
from latentrt.runtime.bench.machine import describe

GB = 1e9
WAYS = {"kept": False, "on demand": True}
PICTURES = ("a red circle on a blue square", "a red circle on a blue square", "an old lighthouse at dusk")
SECONDS = "seconds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="t5-xxl-2", help="Of random_sd3.py.")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/text-encoders.json"))
    parser.add_argument("--draw", nargs=2, metavar=("BUNDLE", "WAY"), help="Draw in this process; print its memory.")
    arguments = parser.parse_args()
    if arguments.draw:
        bundle, way = arguments.draw
        print(json.dumps(draw(bundle, on_demand=WAYS[way])))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(arguments.shape, Path(folder))
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(arguments.json)


def table(result: dict[str, Any]) -> str:
    """Return what was resident in each way, as Markdown."""
    ways = result["ways"]
    rows = [
        [moment, *(gigabytes(part[place]["rss_bytes"]) for part in ways.values())]
        for place, moment in enumerate(one["moment"] for one in ways["kept"])
    ]
    highest = [gigabytes(max(one["peak_rss_bytes"] for one in part)) for part in ways.values()]
    seconds = [f"{part[-1][SECONDS]:.1f} s" for part in ways.values()]
    lines = [["resident", *ways], ["---"] * 3, *rows, ["at most", *highest], ["time of the last picture", *seconds]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gigabytes(size: int) -> str:
    return f"{size / GB:.2f} GB"


def measure(shape: str, folder: Path) -> dict[str, Any]:
    """Export the checkpoint and draw in each way, in processes of their own. Returns the figures with their machine."""
    bundle = prepare(shape, folder)
    components = Bundle.open(bundle).manifest.components
    return {
        "machine": describe(),
        "command": f"python benchmarks/text_encoders.py --shape {shape}",
        "shape": shape,
        "weights_bytes": {name: component.weights_bytes for name, component in components.items()},
        "ways": {way: in_a_process(bundle, way) for way in WAYS},
    }


def prepare(shape: str, folder: Path) -> Path:
    """Export a checkpoint of random weights, with engines for the CPU. Returns the bundle."""
    from random_checkpoint import save_random

    from latentrt.export.export import export_checkpoint

    checkpoint = save_random(shape, folder / "checkpoint", half=True)
    with terminal_report() as report:
        export_checkpoint(str(checkpoint), folder / "bundle", precision="fp32", backends=("cpu",), report=report)
    return folder / "bundle"


def in_a_process(bundle: Path, way: str) -> Any:
    command = [sys.executable, __file__, "--draw", str(bundle), way]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def draw(bundle: str, *, on_demand: bool) -> list[dict[str, Any]]:
    """Load a bundle and draw. Returns what was resident after loading it and after each picture, and at most before."""
    from latentrt.runtime.pipeline import Pipeline

    moments: list[dict[str, Any]] = []

    def note(moment: str, start: float) -> None:
        moments.append({"moment": moment, **resident(), SECONDS: round(time.perf_counter() - start, 3)})

    start = forget_peak()
    pipe = Pipeline.load(bundle, "cpu", free_text_encoders=on_demand)
    note("after loading", start)
    for prompt, moment in zip(
        PICTURES,
        ("after a picture", "after another picture of its prompt", "after a picture of another prompt"),
        strict=True,
    ):
        start = forget_peak()
        pipe(prompt, steps=2, seed=0)
        note(moment, start)
    pipe.close()
    return moments


def forget_peak() -> float:
    """Begin a new peak of this process's memory. Returns the time."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return time.perf_counter()


def resident() -> dict[str, int]:
    """Return the bytes that are resident, of these those that are mapped from files, and the peak."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    names = {"rss_bytes": "VmRSS", "mapped_bytes": "RssFile", "peak_rss_bytes": "VmHWM"}
    found = {name: re.search(rf"{field}:\s+(\d+) kB", text) for name, field in names.items()}
    return {name: 1024 * int(match[1]) for name, match in found.items() if match}


if __name__ == "__main__":
    main()
