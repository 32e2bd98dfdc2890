"""How far engines may be from what they are compared with."""

from __future__ import annotations

from latentrt.engines.bundle.manifest import ComponentSpec
from latentrt.engines.spec import Precision

# Largest difference allowed, over the range of the expected values. fp32: other kernels, other summation order.
# fp16: weights and activations carry 11 bits, and errors add up over some hundred layers.
# fp8, int8: of what stays in float16.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "fp16": 3e-2, "fp8": 3e-2, "int8": 3e-2}
# Of what computes in 8 bits, over the error of its graph as it was exported: a number that another order of sums moves
# over the edge between two of 8 bits is off by as much as rounding it was.
MOVED = 2.0
# Pixels are rounded, so a difference far below one level can still move a value by one.
PIXEL_LEVEL = 1 / 255


def tolerance(component: ComponentSpec, *precisions: Precision) -> float:
    """Return what is allowed of a component where precisions meet: of the stored graph, and of what computes it."""
    own = MOVED * (component.error or 0.0) if component.quantised else 0.0
    return max(own, *(TOLERANCES[precision] for precision in precisions))
