"""Golden pairs: recorded inputs with the float32 outputs of the checkpoint, and the comparison of a graph with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from latentrt.engines.compare import relative_error
from latentrt.engines.errors import CheckpointError
from latentrt.engines.spec import Array, Precision
from latentrt.engines.verify.references import golden_pair, read_arrays, write_arrays
from latentrt.export.configs.tensors import Tensor
from latentrt.export.graphs.run import Arrays, run_in_pieces
from latentrt.export.networks.components import Case, Component, place_of

Pair = tuple[Mapping[str, Array], Mapping[str, Array]]
"""Inputs and the outputs they must give."""

# The largest difference from torch's float32, over the largest magnitude of the output. float32 graphs do the same
# arithmetic in another order: 1e-6 was measured, 1e-5 for VAEs, and weights may amplify it. float16 rounds each
# layer to 11 bits, which grows with depth: the limit is 30 roundings in a row, where a lost layer is off by 1e-1.
SIZES = (1024, 768, 0, 32, 1024, 768)  # original height and width, crop from top and left, target height and width
TOLERANCES: Mapping[Precision, float] = {"fp32": 2e-4, "fp16": 3e-2}


def make_inputs(
    component: Component,
    dimensions: Mapping[str, int],
    which: Case,
    *,
    precision: Precision,
    scaling_factor: float,
    texts: Sequence[Sequence[int]] = (),
    shift: float = 0.0,
) -> Arrays:
    """Make inputs like those that the network meets, in the graph's dtypes, always the same for the same arguments.

    texts: tokens of real prompts, each with its end, for a network that is shown those
    """
    generator = np.random.default_rng([0, place_of(component.name), which != "traced"])
    sizes = {**dimensions, **component.sizes(which, dimensions)}
    made = {}
    for tensor in component.takes(dimensions):
        spec = tensor.spec(dimensions, precision)
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
        if tensor.values == "text":
            values = _pad_texts(texts, shape, pad=dimensions["text_padding"])
        else:
            values = _draw(tensor, shape, generator, dimensions)
        if tensor.values == "latents":
            values = values / scaling_factor + shift
        # Rounded to float16 in both precisions: then a float16 engine and the float32 checkpoint see the same input.
        if tensor.dtype is None:
            values = values.astype(np.float16)
        made[tensor.name] = values.astype(spec.dtype)
    return made


def _pad_texts(texts: Sequence[Sequence[int]], shape: Sequence[int], *, pad: int) -> Array:
    """Return rows of tokens: a text that is too long loses what stands before its end."""
    rows = np.full(shape, pad)
    for row, ids in zip(rows, texts, strict=False):
        fitting = [*ids[:-1][: shape[1] - 1], ids[-1]]
        row[: len(fitting)] = fitting
    return rows


def _draw(
    tensor: Tensor,
    shape: tuple[int, ...],
    generator: np.random.Generator,
    dimensions: Mapping[str, int],
) -> Array:
    if tensor.values == "tokens":
        ids = generator.integers(0, dimensions["vocabulary"], shape)
        ids[:, 0] = dimensions["begin_token"]  # its hidden states are the largest of a trained encoder
        ids[:, shape[1] // 2 :] = dimensions["end_token"]  # the pooled output is read where the text ends
        return ids
    if tensor.values == "timesteps":
        return np.linspace(999.0, 1.5, shape[0] + 2, dtype=np.float32)[1:-1]  # fractional, as sigma spacings give
    if tensor.values == "sizes":
        return np.broadcast_to(np.resize(SIZES, shape[1]).astype(np.float32), shape)
    if tensor.values == "places":
        return np.arange(shape[0], dtype=np.float32)
    if tensor.values == "switch":
        return np.arange(shape[0]) % 2  # off in the first row, on in the second
    if tensor.values == "unit":
        return generator.uniform(0.0, 1.0, shape)
    if tensor.values == "pixels":
        return generator.uniform(-1.0, 1.0, shape)
    return generator.standard_normal(shape)


def check_graph(component: str, graph: Path, pairs: Sequence[Pair], *, precision: Precision) -> float:
    """Run a graph on the inputs of each pair and return the largest relative difference.

    Raises CheckpointError if it is above the tolerance; a value that is not finite makes it infinite.
    """
    found = run_in_pieces(graph, [inputs for inputs, _ in pairs])
    worst = max(compare(component, outputs, expected) for outputs, (_, expected) in zip(found, pairs, strict=True))
    require_close(component, worst, precision=precision)
    return worst


def compare(component: str, found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Return the largest relative difference of any output. Raises CheckpointError if a shape is another one."""
    for name, reference in expected.items():
        if found[name].shape != reference.shape:
            raise CheckpointError(
                f"{component}: the exported graph gives {name} the shape {found[name].shape} where the checkpoint "
                f"gives {reference.shape}; please report it with the checkpoint's name"
            )
    return max(relative_error(found[name], reference) for name, reference in expected.items())


def require_close(component: str, error: float, *, precision: Precision) -> None:
    """Raise CheckpointError if a graph's error is above the tolerance of its precision."""
    if error > TOLERANCES[precision]:
        by = f"{error:.1e} of the output's range, more than {TOLERANCES[precision]:.0e}"
        by = "infinity: something is not finite" if error == float("inf") else by
        raise CheckpointError(
            f"{component}: the exported graph differs from the checkpoint by {by}; {_FIXES[precision]}"
        )


def require_finite(component: str, outputs: Mapping[str, Array]) -> None:
    """Raise CheckpointError if the checkpoint's own outputs are not numbers: nothing could be compared with them."""
    broken = [name for name, array in outputs.items() if not np.isfinite(array).all()]
    if broken:
        raise CheckpointError(
            f"{component}: the checkpoint's own {', '.join(broken)} is not finite in float32; its weights are damaged, "
            "download them again"
        )


_FIXES: Mapping[Precision, str] = {
    "fp32": "please report it with the checkpoint's name",
    "fp16": "export it with --precision fp32",
}


def widen(inputs: Mapping[str, Array]) -> Arrays:
    """Return inputs as the float32 graph takes them."""
    return {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in inputs.items()}


def save_golden(path: Path, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Write `input.<name>` in the graph's dtypes and `output.<name>` in float32 as safetensors. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"input.{name}": array for name, array in inputs.items()}
    arrays |= {f"output.{name}": array.astype(np.float32) for name, array in outputs.items()}
    write_arrays(path, arrays)


def load_golden(path: Path) -> Pair:
    """Read what `save_golden` wrote. Raises OSError."""
    return golden_pair(read_arrays(path))
