"""Frames lie at even steps between key frames, and a frame is the same picture whatever batch it is drawn in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.draw.animation import Frame, batches, frame_draw, frame_text, frames_between, slerp
from latentrt.runtime.sampling.noise import TorchCpuNoise, TorchCudaNoise
from tests.refused import about

SHAPE = (4, 6, 5)
keys_and_frames = st.tuples(st.integers(2, 6), st.integers(2, 60)).filter(lambda pair: pair[1] >= pair[0])


def place(frame: Frame) -> float:
    """Return how many legs lie before a frame."""
    return frame.first + frame.weight


@given(keys_and_frames)
def test_frames_go_at_even_steps_from_the_first_key_frame_to_the_last(pair: tuple[int, int]) -> None:
    keys, count = pair
    frames = frames_between(keys, count)
    assert len(frames) == count
    np.testing.assert_allclose([place(frame) for frame in frames], np.linspace(0, keys - 1, count), atol=1e-12)
    assert frames[-1] == Frame(first=keys - 1, second=keys - 1, weight=0.0)


@given(keys_and_frames)
def test_a_loop_comes_back_to_where_it_began_and_shows_it_once(pair: tuple[int, int]) -> None:
    keys, count = pair
    frames = frames_between(keys, count, loop=True)
    np.testing.assert_allclose([place(frame) for frame in frames], np.arange(count) * keys / count, atol=1e-12)
    assert all(frame.second == (frame.first + 1) % keys for frame in frames if frame.weight)
    assert len({(frame.first, frame.weight) for frame in frames}) == count


@given(keys_and_frames, st.booleans())
def test_where_a_key_frame_is_met_it_is_met_exactly(pair: tuple[int, int], loop: bool) -> None:
    keys, count = pair
    assume(count % keys == 0 if loop else (count - 1) % (keys - 1) == 0)
    met = [frame.first for frame in frames_between(keys, count, loop=loop) if frame.weight == 0.0]
    assert met == list(range(keys))


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_batch_is_full_but_the_last(count: int, size: int) -> None:
    frames = [Frame(first=i, second=i, weight=0.0) for i in range(count)]
    found = list(batches(frames, size))
    assert list(itertools.chain(*found)) == frames
    assert {len(batch) for batch in found[:-1]} <= {size}


def drawn(frames: tuple[Frame, ...], size: int, seeds: list[int]) -> Array:
    """Return two draws of every frame, (2, frames, C, h, w)."""
    parts = []
    for batch in batches(frames, size):
        draw = frame_draw(seeds, batch, SHAPE)
        parts.append(np.stack([draw(), draw()]))
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_a_frames_noise_does_not_depend_on_its_batch(size: int) -> None:
    frames, seeds = frames_between(3, 7, loop=True), [11, 5, 8]
    np.testing.assert_array_equal(drawn(frames, size, seeds), drawn(frames, 3, seeds))


def test_a_key_frame_has_its_own_seeds_noise_and_the_others_lie_on_arcs_between() -> None:
    seeds = [11, 5]
    found = drawn(frames_between(2, 5), 5, seeds)
    streams = [TorchCpuNoise(seed) for seed in seeds]
    for draw in found:
        low, high = (stream.normal(SHAPE) for stream in streams)
        for i, frame in enumerate(draw):
            np.testing.assert_allclose(frame, slerp(low, high, i / 4), atol=1e-6)
        np.testing.assert_array_equal(draw[[0, -1]], [low, high])


def test_frames_may_draw_from_another_stream() -> None:
    draw = frame_draw([3, 4], frames_between(2, 2), SHAPE, stream=TorchCudaNoise)
    np.testing.assert_array_equal(draw()[1], TorchCudaNoise(4).normal(SHAPE))


def test_the_text_of_a_frame_is_between_its_key_frames_texts() -> None:
    encoded = TorchCpuNoise(0).normal((3, 7, 5))
    found = frame_text(encoded, frames_between(3, 5))
    expected = [encoded[0], (encoded[0] + encoded[1]) / 2, encoded[1], (encoded[1] + encoded[2]) / 2, encoded[2]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[[0, 2, 4]], encoded)


@pytest.mark.parametrize(
    ("keys", "frames", "field"),
    [
        (1, 8, "keys"),
        (0, 8, "keys"),
        (5, 4, "frames"),
    ],
)
def test_an_impossible_animation_is_refused(keys: int, frames: int, field: str) -> None:
    with pytest.raises(RequestError, check=about(field)):
        frames_between(keys, frames)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError, check=about("batch")):
        list(batches(frames_between(2, 3), 0))
