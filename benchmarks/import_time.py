"""What `import latentrt.runtime` costs, against importing NumPy and ONNX Runtime alone, in fresh interpreters.

python benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from latentrt.runtime.bench.machine import describe

CANDIDATES = {
    "nothing": "pass",
    "numpy, onnxruntime": "import numpy, onnxruntime",
    "latentrt.runtime.pipeline, onnxruntime": "import latentrt.runtime.pipeline, onnxruntime",
    "diffusers' StableDiffusionPipeline": "from diffusers import StableDiffusionPipeline",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/import_time.json"))
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in range(arguments.rounds + 1):  # in turn, so that a drift of the machine hits all alike
        for name, code in CANDIDATES.items():
            seconds[name].append(fresh(code))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    base = medians["numpy, onnxruntime"]
    print(f"{'import':<42}{'median s':>10}{'ratio':>8}")
    for name, median in medians.items():
        print(f"{name:<42}{median:>10.3f}{median / base:>8.2f}")
    arguments.output.write_text(json.dumps({"machine": describe(), "seconds": medians, "samples": seconds}, indent=1))


def fresh(code: str) -> float:
    """Return the seconds that a fresh interpreter takes to run the code and end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
