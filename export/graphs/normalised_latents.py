"""Latents that a VAE's config calls normalised: a mean and a deviation for each channel, as Playground 2.5's are.

Both halves of the VAE are exported with that in them, so that nothing after the export knows of it: the decoder takes
latents over the scaling factor whatever they mean to it, and the encoder gives the distribution of such latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.engines.bundle.manifest import Family
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.families import FAMILIES

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

KEYS = ("latents_mean", "latents_std")


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """values * scale + shift, a number of each for every channel."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]


def read_normalising(config: Mapping[str, Any], *, family: Family, channels: int, where: str) -> dict[str, Affine]:
    """Return what belongs before the VAE's decoder and behind its encoder, by component; nothing without both keys.

    channels: of the latents; where: the VAE's config, for the error
    Raises CheckpointError.
    """
    given = [config.get(key) for key in KEYS]
    if not FAMILIES[family].normalises or None in given:
        return {}
    mean, deviation = (_numbers(value, key, channels, where) for value, key in zip(given, KEYS, strict=True))
    if min(deviation) <= 0:
        raise CheckpointError(f"{where} $.latents_std: found {list(deviation)}, expected numbers above 0")
    # The encoder's second half are logarithms of variances. diffusers limits them to -30..20 before this and we after
    # it: a deviation of 3e-7 or of 22026 latents.
    return {
        "vae_decoder": Affine(scale=deviation, shift=mean),
        "vae_encoder": Affine(
            scale=(*(1 / d for d in deviation), *(1.0 for _ in deviation)),
            shift=(*(-m / d for m, d in zip(mean, deviation, strict=True)), *(-2 * math.log(d) for d in deviation)),
        ),
    }


def _numbers(value: Any, key: str, channels: int, where: str) -> tuple[float, ...]:
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) != channels or any(type(n) not in (int, float) or not math.isfinite(n) for n in numbers):
        raise CheckpointError(
            f"{where} $.{key}: found {value!r}, expected {channels} numbers, one for each channel of the latents"
        )
    return tuple(float(number) for number in numbers)


def without_normalising(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a VAE's config as it is of graphs that hold the normalising."""
    return {key: value for key, value in config.items() if key not in KEYS}


def normalise_graph(graph: GraphProto, affine: Affine) -> None:
    """Put what a module of ours computes, see `modules.PerChannel`, into half a VAE that was exported without it."""
    from onnx import helper, numpy_helper

    (taken,), (given,) = graph.input, graph.output
    dtype = helper.tensor_dtype_to_np_dtype(taken.type.tensor_type.elem_type)
    for name, numbers in (("scale", affine.scale), ("shift", affine.shift)):
        array = np.array(numbers, dtype=dtype).reshape(1, -1, 1, 1)
        graph.initializer.append(numpy_helper.from_array(array, f"normalising.{name}"))
    if taken.name == "latent_sample":
        _rename(graph, taken.name, "normalising.after")
        nodes = [*_compute(taken.name, "normalising.after"), *graph.node]
    else:
        _rename(graph, given.name, "normalising.before")
        nodes = [*graph.node, *_compute("normalising.before", given.name)]
    del graph.node[:]
    graph.node.extend(nodes)


def _compute(before: str, after: str) -> list[NodeProto]:
    from onnx import helper

    return [
        helper.make_node("Mul", [before, "normalising.scale"], ["normalising.scaled"]),
        helper.make_node("Add", ["normalising.scaled", "normalising.shift"], [after]),
    ]


def _rename(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
