"""The linear preview of a VAE: a matrix that turns latents into small pictures, fitted on the graphs of a bundle.

Any checkpoint must do, and no pictures are at hand: so the VAE encodes pictures that are made up, and the matrix is
the least squares from their latents to what the decoder makes of those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import CheckpointError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import FRAMES
from latentrt.export.graphs.run import open_session, run_session

SIDE = 8  # latents a side of each picture
PICTURES = 20  # 1280 latents for the few numbers of a fit
HELD_OUT = 5  # more pictures, on which the fit is measured
RIDGE = 1e-4  # of a latent's unit variance: keeps the weights of a latent that never changes at zero
GRAPHS = ("vae_encoder", "vae_decoder")

Draw = Callable[[np.random.Generator, int], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewFit:
    """What was fitted.

    weights: for each channel what it adds to red, green and blue, 0 to 255, and last what is there without any
    r_squared: the share of the colours' variance that it explains, on pictures that it was not fitted on
    """

    weights: tuple[tuple[float, ...], ...]
    r_squared: float


def fit_preview(staged: Path, latents: LatentSpec) -> PreviewFit:
    """Fit the preview of the VAE whose graphs lie in a bundle that is being written. The same graphs give the same.

    Raises CheckpointError if the VAE gives numbers that are not finite.
    """
    generator = np.random.default_rng(0)
    pictures = [made_up_picture(generator, SIDE * latents.factor) for _ in range(PICTURES + HELD_OUT)]
    encoder, decoder = (_network(staged / "onnx" / name / "model.onnx") for name in GRAPHS)
    pairs = [_pair(picture, encoder, decoder, latents) for picture in pictures]  # one at a time: little memory
    inputs, colours = (np.concatenate(part) for part in zip(*pairs, strict=True))
    if not np.isfinite(inputs).all() or not np.isfinite(colours).all():
        raise CheckpointError(
            "the VAE turns ordinary pictures into numbers that are not finite; export it with --precision fp32, "
            "or take another VAE with --vae"
        )
    fitted = SIDE * SIDE * PICTURES
    weights = least_squares(inputs[:fitted], colours[:fitted])
    return PreviewFit(
        weights=tuple(tuple(float(f"{number:.6g}") for number in row) for row in weights),
        r_squared=r_squared(inputs[fitted:] @ weights[:-1] + weights[-1], colours[fitted:]),
    )


def _network(graph: Path) -> Callable[[Array], Array]:
    """Return a graph of one input and one output as a function of float32 arrays; a picture is a video of one frame."""
    session = open_session(graph)
    taken, *further = session.get_inputs()  # type: ignore[attr-defined]
    beside = {one.name: np.zeros(1, np.float32) for one in further}
    assert beside.keys() <= {FRAMES}
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[taken.type]

    def run(array: Array) -> Array:
        (output,) = run_session(session, {taken.name: array.astype(dtype), **beside}).values()
        return output.astype(np.float32)

    return run


def _pair(
    picture: Array, encoder: Callable[[Array], Array], decoder: Callable[[Array], Array], space: LatentSpec
) -> tuple[Array, Array]:
    """Return a picture's latents as the sampler has them, and the mean colour that each decodes to: (h * w, C or 3)."""
    means = encoder(picture[None])[:, : space.channels]
    decoded = np.clip(decoder(means)[0] * 127.5 + 127.5, 0, 255)
    cells = decoded.reshape(3, SIDE, space.factor, SIDE, space.factor).mean(axis=(2, 4))
    return space.scaled(means[0]).reshape(space.channels, -1).T, cells.reshape(3, -1).T


def least_squares(inputs: Array, targets: Array) -> Array:
    """Return weights and, in the last row, offsets of inputs @ weights + offset ~ targets: (C + 1, T), float64."""
    x, y = inputs.astype(np.float64), targets.astype(np.float64)
    inner, outer = x - x.mean(axis=0), y - y.mean(axis=0)
    normal = inner.T @ inner + RIDGE * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(normal, inner.T @ outer)
    return np.concatenate([weights, [y.mean(axis=0) - x.mean(axis=0) @ weights]])


def r_squared(found: Array, targets: Array) -> float:
    """Return the share of the targets' variance that is found, over all columns together; 0 if there is none."""
    rest = float(((targets - found) ** 2).sum())
    total = float(((targets - targets.mean(axis=0)) ** 2).sum())
    return 1 - rest / total if total > 0 else 0.0


def made_up_picture(generator: np.random.Generator, side: int) -> Array:
    """Make up a picture with soft and hard edges in many colours: (3, side, side), float32, -1 to 1."""
    picture = LAYERS[0](generator, side)
    for layer in generator.permutation(len(LAYERS))[:2]:
        share = generator.uniform(0.3, 1.0) * _disc(generator, side)
        picture = (1 - share) * picture + share * LAYERS[layer](generator, side)
    return picture.astype(np.float32)


def _colour(generator: np.random.Generator) -> Array:
    return generator.uniform(-1, 1, (3, 1, 1))


def _gradient(generator: np.random.Generator, side: int) -> Array:
    angle = generator.uniform(0, 2 * np.pi)
    rows, columns = np.indices((side, side)) / side - 0.5
    share = np.clip(0.5 + rows * np.sin(angle) + columns * np.cos(angle), 0, 1)
    return np.asarray((1 - share) * _colour(generator) + share * _colour(generator))


def _clouds(generator: np.random.Generator, side: int) -> Array:
    """Return noise whose grains are a random power of two of the picture, with soft edges."""
    grains = 2 ** int(generator.integers(1, 5))
    coarse = generator.uniform(-1, 1, (3, grains + 1, grains + 1))
    at = np.linspace(0, grains, side, endpoint=False)
    low, share = at.astype(int), at % 1
    across = coarse[:, :, low] * (1 - share) + coarse[:, :, low + 1] * share
    return np.asarray(across[:, low] * (1 - share[:, None]) + across[:, low + 1] * share[:, None])


def _flat(generator: np.random.Generator, side: int) -> Array:
    return np.broadcast_to(_colour(generator), (3, side, side))


def _disc(generator: np.random.Generator, side: int) -> Array:
    """Return how much of each pixel a disc of a random place, size and softness covers: (side, side), 0 to 1."""
    rows, columns = np.indices((side, side)) / side
    down, across = generator.uniform(0.2, 0.8, 2)
    distance = np.hypot(rows - down, columns - across)
    return np.asarray(np.clip((generator.uniform(0.15, 0.5) - distance) * side / generator.uniform(1, 24), 0, 1))


LAYERS: tuple[Draw, ...] = (_gradient, _clouds, _flat)
