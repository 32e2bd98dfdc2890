"""The generators agree with torch's, so a seed draws the same picture with and without torch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.noise import TorchCpuNoise

TOLERANCE = 5e-7  # torch's vectorised logarithm, sine and cosine differ from NumPy's in the last bits

sizes = st.one_of(st.integers(0, 40), st.sampled_from([64, 100, 256, 1000, 4 * 64 * 64]))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), calls=st.lists(sizes, min_size=1, max_size=5))
def test_successive_calls_continue_torchs_stream_at_any_size(seed: int, calls: list[int]) -> None:
    ours, theirs = TorchCpuNoise(seed), torch.Generator("cpu").manual_seed(seed)
    for size in calls:
        expected = torch.randn(size, generator=theirs).numpy()
        np.testing.assert_allclose(ours.normal((size,)), expected, rtol=0, atol=TOLERANCE)


def test_a_latent_shape_is_filled_in_torchs_order() -> None:
    expected = torch.randn((2, 4, 5, 7), generator=torch.Generator("cpu").manual_seed(12345)).numpy()
    found = TorchCpuNoise(12345).normal((2, 4, 5, 7))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_a_short_request_leaves_its_spare_normal_to_the_next_short_one() -> None:
    ours, theirs = TorchCpuNoise(3), torch.Generator("cpu").manual_seed(3)
    for size in (3, 20, 1):  # the long request in between takes nothing of it
        expected = torch.randn(size, generator=theirs).numpy()
        np.testing.assert_allclose(ours.normal((size,)), expected, rtol=0, atol=TOLERANCE)


def test_different_seeds_give_different_noise() -> None:
    assert not np.array_equal(TorchCpuNoise(0).normal((32,)), TorchCpuNoise(1).normal((32,)))
