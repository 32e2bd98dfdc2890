"""Weights that make a sum over nodes exact for polynomials: what linear multistep methods are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentrt.engines.spec import Array


def moment_weights(nodes: Sequence[float], moments: Sequence[float]) -> Array:
    """Return w with sum(w * nodes**n) == moments[n] for every n below the number of nodes: (len(nodes),), float64."""
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.asarray(moments, dtype=np.float64))
