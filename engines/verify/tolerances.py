"""How far engines may be from what they are compared with."""

from __future__ import annotations

from latentrt.engines.spec import Precision

# Largest difference allowed, over the range of the expected values. fp32: other kernels, other summation order.
# fp16: weights and activations carry 11 bits, and errors add up over some hundred layers.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "fp16": 3e-2}
# Pixels are rounded, so a difference far below one level can still move a value by one.
PIXEL_LEVEL = 1 / 255


def tolerance(*precisions: Precision) -> float:
    """Return what is allowed where these precisions meet: of the stored graph, and of what computes it."""
    return max(TOLERANCES[precision] for precision in precisions)
