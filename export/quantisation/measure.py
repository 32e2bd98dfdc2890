"""What 8 bits lose: the noise that they add to a denoiser's outputs at real stages, against the float32 reference."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentrt.engines.spec import Array
from latentrt.export.graphs.ranges import MEASURED, tell_largest
from latentrt.export.graphs.run import run_in_pieces
from latentrt.export.graphs.types import load_typed
from latentrt.export.quantisation.levels import operands
from latentrt.export.quantisation.scales import Scale, Scheme, insert_scales

Met = tuple[Mapping[str, Array], Mapping[str, Array], float]
"""What a denoiser was given at a stage, what it gave, and the weight of that in the latents that came next."""

AT_ONCE = 8  # cases that a graph is run on together: what crosses its pieces is held for all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """A denoiser at real stages.

    graph: in float32, whatever it is stored in; others are written beside it, and share its weights
    shown: what the ranges are recorded on; held_out: what the loss is measured on
    """

    graph: Path
    shown: Sequence[Met]
    held_out: Sequence[Met]

    def largest(self, names: Collection[str]) -> dict[str, float]:
        """Return the largest magnitude of each operand of some nodes, by its name; weights are left out."""
        model = load_typed(self.graph)
        values = [
            value
            for node in model.graph
            if node.name in names
            for value in operands(node)
            if not value.is_initializer()
        ]
        tell_largest(model, list(dict.fromkeys(values)))
        found: dict[str, float] = {}
        for outputs in self._run(model, [inputs for inputs, *_ in self.shown]):
            for name, array in outputs.items():
                if name.startswith(MEASURED):
                    value = name.removeprefix(MEASURED)
                    found[value] = max(found.get(value, 0.0), float(array))
        return found

    def loss(self, names: Collection[str], scales: Mapping[str, Scale], scheme: Scheme) -> float:
        """Return `noise` with some nodes in 8 bits."""
        model = load_typed(self.graph)
        insert_scales(model, names, scales, scheme, stored=False)
        return noise(self._run(model, [inputs for inputs, *_ in self.held_out]), self.held_out)

    def _run(self, model: ir.Model, cases: Sequence[Mapping[str, Array]]) -> Iterator[Mapping[str, Array]]:
        beside = self.graph.with_name("tried.onnx")
        ir.save(model, beside)
        for first in range(0, len(cases), AT_ONCE):
            yield from run_in_pieces(beside, cases[first : first + AT_ONCE])


def noise(found: Iterable[Mapping[str, Array]], stages: Sequence[Met]) -> float:
    """Return what differences from the outputs of stages put into the latents, over what the outputs put there.

    Both are roots of sums of squares, each stage's with its weight; infinity where something is not finite.
    """
    lost = there = 0.0
    for outputs, (_, expected, weight) in zip(found, stages, strict=True):
        for name, target in expected.items():
            wide = target.astype(np.float64) * weight
            lost += float(np.square(outputs[name] * weight - wide).sum())
            there += float(np.square(wide).sum())
    return math.sqrt(lost / max(there, 1e-30)) if math.isfinite(lost) else math.inf
