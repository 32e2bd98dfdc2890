"""What Winograd's method gives on this CPU: one 3 x 3 convolution with and without it, by channels and size.

    python benchmarks/cpu_convolutions.py [--rounds 8] [--output FILE]

One thread, whose own time is counted, whatever else is running. Both take turns; a ratio is the median over the rounds
of the time of the convolution as it stands over that by Winograd's method, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from paired import paired_ratio

from latentrt.engines.graphs.winograd import use_winograd
from latentrt.runtime.bench.machine import Watch, describe, now
from latentrt.runtime.bench.rounds import take_turns

# (rows, channels, side): of decoders, as large as SD 1.5's and smaller, and of UNets.
SHAPES = (
    (1, 512, 32),
    (1, 512, 64),
    (1, 256, 128),
    (1, 128, 64),
    (1, 128, 256),
    (1, 64, 64),
    (2, 320, 32),
    (2, 640, 16),
    (2, 1280, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    watch, found = Watch(), []
    for rows, channels, side in SHAPES:
        figures = compare(rows, channels, side, rounds=arguments.rounds)
        found.append({"rows": rows, "channels": channels, "side": side, **figures})
        ratio = figures["ratio"]
        between = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
        print(f"{rows} x {channels:4} channels, {side:3}x{side:<3}  {ratio['estimate']:.2f}{between}", flush=True)
    document = {
        "kind": "latentrt cpu convolutions",
        "created": now(),
        "command": "python benchmarks/cpu_convolutions.py",
        "machine": describe(),
        "conditions": msgspec.to_builtins(watch.conditions()),
        "convolutions": found,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def compare(rows: int, channels: int, side: int, *, rounds: int) -> dict[str, Any]:
    """Return both ways' seconds on one thread, their ratio, and the largest difference over the largest output."""
    generator = np.random.default_rng(0)
    sessions = {way: session_of(channels, winograd=way == "winograd") for way in ("direct", "winograd")}
    x = generator.standard_normal((rows, channels, side, side), dtype=np.float32)
    outputs = [session.run(None, {"x": x})[0] for session in sessions.values()]
    seconds: dict[str, list[float]] = {way: [] for way in sessions}
    for _, way in take_turns(list(sessions), rounds=rounds, most_seconds=600.0, seed=0):
        start = time.thread_time()
        sessions[way].run(None, {"x": x})
        seconds[way].append(time.thread_time() - start)
    return {
        "ratio": msgspec.to_builtins(paired_ratio(seconds["winograd"], seconds["direct"])),
        "difference": float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max()),
        "samples": seconds,
    }


def session_of(channels: int, *, winograd: bool) -> onnxruntime.InferenceSession:
    """Open a convolution of pictures of any size, with the same weights each time."""
    weights = np.random.default_rng(1).standard_normal((channels, channels, 3, 3), dtype=np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", channels, "height", "width"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", channels, "made_height", "made_width"])
    node = helper.make_node("Conv", ["x", "weights"], ["y"], pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "convolution", [x], [y], [numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if winograd:
        use_winograd(model, Path(), least_channels=1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
