"""DEIS, arXiv:2204.13902: exponential integrators with Lagrange interpolation of the noise in log rho."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from latentrt.engines.spec import Array
from latentrt.runtime.plan import Stage, basis
from latentrt.runtime.samplers.dpm import FEW
from latentrt.runtime.samplers.equations import noise
from latentrt.runtime.samplers.quadrature import moment_weights
from latentrt.runtime.samplers.walks import Walk


def deis(walk: Walk, prediction: str, *, order: int, lower_order_final: bool = True) -> Iterator[Stage]:
    """Yield the stages of log-rho AB-DEIS, Table 1: state is the latents and order - 1 past noises."""
    for k, (timestep, here, there) in walk:
        x, *past, m, _ = basis(order)
        noises = [noise(x, m, here, prediction), *past]
        degree = walk.order(k, order, few=FEW if lower_order_final else 0)
        rhos = [walk.legs[k - i].here for i in range(degree)]
        weights = log_integrals([r.sigma / r.alpha for r in rhos], there.sigma / there.alpha)
        step = x / here.alpha + np.tensordot(weights, np.stack(noises[:degree]), axes=1)
        yield Stage(timestep, here, x, (there.alpha * step, *noises[: order - 1]))


def log_integrals(nodes: Sequence[float], stop: float) -> Array:
    """Return what each node's value weighs in the integral over rho, from nodes[0] to stop, of their interpolation.

    The interpolation is a polynomial in log rho. returns: (len(nodes),), float64
    """
    start, end = nodes[0], math.log(stop / nodes[0])
    moments = [stop - start]  # of u = log(rho / start), each by parts from the one before
    for n in range(1, len(nodes)):
        moments.append(stop * end**n - n * moments[-1])
    return moment_weights([math.log(node / start) for node in nodes], moments)
