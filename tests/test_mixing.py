"""Noise between two seeds lies on the arc between them, as in A1111's interface; prompts mix on a line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import expm

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.draw.animation import mix_text, slerp, variation_seeds, vary
from latentrt.runtime.sampling.noise import TorchCpuNoise
from tests.refused import about

weights = st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)


def noise(seed: int, *shape: int) -> Array:
    return TorchCpuNoise(seed).normal(shape or (4, 8, 8))


def rotated(first: Array, second: Array, weight: float) -> Array:
    """Return the same by turning the plane of the two vectors: the exponential of a skew matrix, and the lengths apart.

    For vectors of one length only, where the arc is a rotation.
    """
    a, b = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    u = a / np.linalg.norm(a)
    v = b - (b @ u) * u
    v /= np.linalg.norm(v)
    angle = np.arctan2(b @ v, b @ u)
    turned = expm(weight * angle * (np.outer(v, u) - np.outer(u, v))) @ a
    return np.asarray(turned.reshape(first.shape))


@given(seeds, seeds, weights)
def test_an_arc_is_a_rotation_in_the_plane_of_its_ends(one: int, two: int, weight: float) -> None:
    first, second = noise(one, 3, 4), noise(two, 3, 4)
    second = second * np.float32(np.linalg.norm(first) / np.linalg.norm(second))
    if one % 2**32 == two % 2**32:
        return
    np.testing.assert_allclose(slerp(first, second, weight), rotated(first, second, weight), atol=1e-5)


@given(seeds, seeds, weights)
def test_noise_keeps_its_size_on_the_arc(one: int, two: int, weight: float) -> None:
    first, second = noise(one, 4, 32, 32), noise(two, 4, 32, 32)
    sizes = sorted(float(np.linalg.norm(x)) for x in (first, second))
    middle = float(np.linalg.norm(slerp(first, second, weight)))
    assert 0.95 * sizes[0] <= middle <= 1.05 * sizes[1]  # two seeds' noise is not quite of one size
    assert one == two or np.linalg.norm((first + second) / 2) < 0.8 * sizes[0]


@given(seeds, seeds, st.sampled_from([None, (-2,), (-1, -2, -3)]))
def test_both_ends_are_exact(one: int, two: int, axes: tuple[int, ...] | None) -> None:
    first, second = noise(one), noise(two)
    np.testing.assert_array_equal(slerp(first, second, 0.0, axes=axes), first)
    np.testing.assert_array_equal(slerp(first, second, 1.0, axes=axes), second)


@given(seeds, weights, st.sampled_from([-2.0, -1.0, 0.0, 1e-9, 0.5, 1.0, 3.0]))
def test_vectors_on_one_line_are_mixed_along_it(seed: int, weight: float, scale: float) -> None:
    first = noise(seed)
    second = first * np.float32(scale)
    expected = (1 - weight) * first + weight * second
    np.testing.assert_allclose(slerp(first, second, weight), expected, rtol=1e-5, atol=1e-5)


def test_each_picture_may_have_its_own_weight() -> None:
    first, second = noise(1, 3, 4, 8, 8), noise(2, 3, 4, 8, 8)
    share = np.array([0.0, 0.3, 1.0]).reshape(3, 1, 1, 1)
    found = slerp(first, second, share, axes=(1, 2, 3))
    for i in range(3):
        np.testing.assert_array_equal(found[i], slerp(first[i], second[i], float(share[i, 0, 0, 0])))


def community_slerp(share: float, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """What A1111's interface computes for noise of (C, h, w), written down from its formula: angles by column."""
    cosine = (low * high).sum(1) / (low.norm(dim=1) * high.norm(dim=1))
    angle = torch.acos(cosine)[:, None]
    return (torch.sin((1 - share) * angle) * low + torch.sin(share * angle) * high) / torch.sin(angle)


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.5, 1.0])
def test_a_variation_is_the_community_interfaces(strength: float) -> None:
    low, high = (torch.randn((4, 16, 24), generator=torch.Generator().manual_seed(seed)) for seed in (123, 456))
    found = vary(noise(123, 1, 4, 16, 24), noise(456, 1, 4, 16, 24), strength)
    np.testing.assert_allclose(found[0], community_slerp(strength, low, high).numpy(), atol=2e-5)


def test_no_variation_is_the_seeds_own_noise() -> None:
    np.testing.assert_array_equal(vary(noise(1, 2, 4, 8, 8), noise(2, 2, 4, 8, 8), 0), noise(1, 2, 4, 8, 8))


def test_variations_of_one_seed_count_up() -> None:
    assert variation_seeds(7, 100, 3) == ((7, 7, 7), (100, 101, 102))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_an_impossible_variation_is_refused(strength: float) -> None:
    with pytest.raises(RequestError, check=about("variation_strength")):
        vary(noise(1), noise(2), strength)


@given(weights)
def test_prompts_mix_as_torch_mixes_them(weight: float) -> None:
    first, second = noise(1, 2, 7, 5), noise(2, 2, 7, 5)
    expected = torch.lerp(torch.from_numpy(first), torch.from_numpy(second), weight).numpy()
    np.testing.assert_allclose(mix_text(first, second, weight), expected, atol=1e-6)
    np.testing.assert_array_equal(mix_text(first, second, 0), first)
    np.testing.assert_array_equal(mix_text(first, second, 1), second)


def test_prompts_of_different_lengths_are_refused() -> None:
    with pytest.raises(RequestError, match=r" 77 .* 154 "):
        mix_text(noise(1, 77, 4), noise(2, 154, 4), 0.5)
