"""The generators agree with torch's, so a seed draws the same picture with and without torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.sampling.noise import TorchCpuNoise, TorchCudaNoise, philox

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


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that Random123 is published with
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_known_answers(counter: str, key: str, expected: str) -> None:
    words, (first, second) = [int(w, 16) for w in counter.split()], [int(w, 16) for w in key.split()]
    found = philox(np.array(words, dtype=np.uint64)[:, None], (first, second))
    assert [f"{int(word):08x}" for word in found[:, 0]] == expected.split()


CUDA_SEED_0 = [  # torch.randn(3, 4, device="cuda") after torch.cuda.manual_seed(0), as published with a web interface
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


def test_the_first_normals_of_a_cuda_generator_are_torchs() -> None:
    np.testing.assert_allclose(TorchCudaNoise(0).normal((3, 4)), CUDA_SEED_0, rtol=0, atol=2e-6)


def test_cuda_noise_does_not_depend_on_the_gpu_until_its_threads_run_out() -> None:
    small, large = (TorchCudaNoise(7, resident_threads=n).normal((1000,)) for n in (1024, 10_240))
    np.testing.assert_array_equal(small, large)
    assert not np.array_equal(
        TorchCudaNoise(7, resident_threads=512).normal((1000,)),
        TorchCudaNoise(7, resident_threads=1024).normal((1000,)),
    )


def test_cuda_noise_of_successive_calls_differs_and_is_unit_normal() -> None:
    generator = TorchCudaNoise(123456789012)
    first, second = generator.normal((4, 64, 64)), generator.normal((4, 64, 64))
    assert first.dtype == np.float32 and first.shape == (4, 64, 64)
    assert abs(float(np.corrcoef(first.ravel(), second.ravel())[0, 1])) < 0.03
    for values in (first, second):
        assert abs(float(values.mean())) < 0.03 and abs(float(values.std()) - 1) < 0.03


@pytest.mark.gpu
def test_cuda_noise_is_the_gpus_own() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU with a CUDA build of torch")
    properties = torch.cuda.get_device_properties(0)
    threads = properties.multi_processor_count * properties.max_threads_per_multi_processor
    ours, theirs = TorchCudaNoise(5, resident_threads=threads), torch.Generator("cuda").manual_seed(5)
    for size in (5, 16_384, 5 * threads + 3, 100):
        expected = torch.randn(size, generator=theirs, device="cuda").cpu().numpy()
        np.testing.assert_allclose(ours.normal((size,)), expected, rtol=0, atol=5e-6)
