"""What importing the runtime's pipeline costs, against importing NumPy and ONNX Runtime alone, in fresh interpreters.

python benchmarks/import_time.py

The wheel of this checkout is built and installed with its bytecode, as whoever uses it has it. What counts is the time
of processors, so that other programs on the machine change little, and the candidates take turns, so that what they do
change hits all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from latentrt.runtime.bench.machine import describe

ROOT = Path(__file__).resolve().parent.parent
BASE = "numpy, onnxruntime"
SLOW = "diffusers' StableDiffusionPipeline"  # 36 times the base: a few rounds tell that
SLOW_ROUNDS = 3
CANDIDATES = {
    "nothing": "pass",
    BASE: "import numpy, onnxruntime",
    "latentrt.runtime.pipeline, onnxruntime": "import latentrt.runtime.pipeline, onnxruntime",
    SLOW: "from diffusers import StableDiffusionPipeline",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/import_time.json")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    with tempfile.TemporaryDirectory() as installed:
        install(Path(installed))
        for number in range(arguments.rounds + 1):
            for name, code in CANDIDATES.items():
                if name != SLOW or number <= SLOW_ROUNDS:
                    seconds[name].append(fresh(code, Path(installed)))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"{'import':<42}{'median s':>10}{'ratio':>8}")
    for name, median in medians.items():
        print(f"{name:<42}{median:>10.3f}{median / medians[BASE]:>8.2f}")
    record = {"machine": describe(), "measured": "processor time", "seconds": medians, "samples": seconds}
    arguments.output.write_text(json.dumps(record, indent=1))


def environment(path: Path | None = None) -> dict[str, str]:
    """Return the environment without what keeps bytecode from being written, and with one folder to import from."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    return own if path is None else own | {"PYTHONPATH": str(path)}


def install(folder: Path, tree: Path = ROOT) -> None:
    """Install a checkout's wheel into a folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(tree)]
    subprocess.run(command, check=True, env=environment())


def fresh(code: str, path: Path) -> float:
    """Return the processor time that a fresh interpreter takes to run the code and end."""
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(path), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"`{code}` failed")
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
