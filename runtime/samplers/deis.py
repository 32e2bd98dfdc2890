"""DEIS, arXiv:2204.13902: exponential integrators with Lagrange interpolation of the noise in log rho."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.dpm import FEW
from latentrt.runtime.samplers.equations import noise
from latentrt.runtime.samplers.walks import Walk


def deis(walk: Walk, prediction: str, *, order: int) -> Iterator[Stage]:
    """Yield the stages of log-rho AB-DEIS, Table 1: state is the latents and order - 1 past noises."""
    for k, (timestep, here, there) in walk:
        x, *past, m, _ = basis(order)
        noises = [noise(x, m, here, prediction), *past]
        degree = walk.order(k, order, few=FEW)
        rhos = [walk.legs[k - i].here for i in range(degree)]
        weights = log_integrals([r.sigma / r.alpha for r in rhos], there.sigma / there.alpha)
        step = x / here.alpha + np.tensordot(weights, np.stack(noises[:degree]), axes=1)
        yield Stage(timestep, here, x, (there.alpha * step, *noises[: order - 1]))


def log_integrals(nodes: Sequence[float], stop: float) -> Array:
    """Integrate each Lagrange basis polynomial in log rho, of the nodes, over rho from nodes[0] to stop.

    returns: (len(nodes),), float64
    """
    logs = [math.log(node) for node in nodes]
    weights = []
    for i, at in enumerate(logs):
        others = [other for j, other in enumerate(logs) if j != i]
        basis_polynomial = np.poly1d(others, r=True) / math.prod(at - other for other in others)
        weights.append(_antiderivative(basis_polynomial, stop) - _antiderivative(basis_polynomial, nodes[0]))
    return np.array(weights, dtype=np.float64)


def _antiderivative(p: np.poly1d, rho: float) -> float:
    # the antiderivative of p(log rho) is rho (p - p' + p'' - ..)(log rho): integration by parts
    log, total, sign = math.log(rho), 0.0, 1.0
    for n in range(p.order + 1):
        total += sign * float(p.deriv(n)(log)) if n else float(p(log))
        sign = -sign
    return rho * total
