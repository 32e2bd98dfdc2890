"""Movies are read back by the libraries that play them: the frames, their times, and whether they run round."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.images.write_movie import FASTEST, check_movie, frame_times, save_movie
from tests.refused import about

# Largest mean difference of a frame in levels of 255: GIF has 256 colours a frame, WebP and MP4 lose a little.
LOSS = {".gif": 4.0, ".webp": 2.0, ".mp4": 2.0}


def frames(count: int = 6, width: int = 64, height: int = 48) -> list[Array]:
    rows, columns = np.indices((height, width))
    return [
        np.stack([columns * 2, rows * 2, np.full_like(rows, 40 * k)], axis=-1).astype(np.uint8) for k in range(count)
    ]


def needs_av(suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av", reason="PyAV is not installed: pip install 'latentrt[video]'")


def read(path: Path) -> tuple[list[Array], float]:
    """Return the frames as a player shows them, and how many seconds they take."""
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert stream.duration is not None
            assert stream.time_base is not None
            return shown, float(stream.duration * stream.time_base)
    shown, milliseconds = [], 0.0
    with Image.open(path) as movie:
        for k in range(getattr(movie, "n_frames", 1)):
            movie.seek(k)
            shown.append(np.asarray(movie.convert("RGB")))
            milliseconds += movie.info["duration"]
    return shown, milliseconds / 1000


@pytest.mark.parametrize("suffix", FASTEST)
def test_every_frame_is_shown_for_its_time(suffix: str, tmp_path: Path) -> None:
    needs_av(suffix)
    path = tmp_path / "new" / f"movie{suffix}"
    save_movie(frames(), path, fps=12)
    shown, seconds = read(path)
    assert len(shown) == 6
    assert seconds == pytest.approx(0.5, abs=0.001)
    for found, expected in zip(shown, frames(), strict=True):
        assert np.abs(found.astype(float) - expected).mean() <= LOSS[suffix]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", FASTEST)
def test_frames_may_be_drawn_while_they_are_written(suffix: str, tmp_path: Path) -> None:
    needs_av(suffix)
    save_movie(iter(frames()), tmp_path / f"a{suffix}", fps=10)
    save_movie(frames(), tmp_path / f"b{suffix}", fps=10)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_movie_runs_round_or_once(suffix: str, tmp_path: Path) -> None:
    save_movie(frames(), tmp_path / f"round{suffix}")
    save_movie(frames(), tmp_path / f"once{suffix}", loop=False)
    with Image.open(tmp_path / f"round{suffix}") as movie:
        assert movie.info["loop"] == 0  # both formats: forever
    with Image.open(tmp_path / f"once{suffix}") as movie:
        assert movie.info.get("loop", 1) == 1  # GIF says it by saying nothing


def test_an_mp4_says_how_its_colours_are_meant(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'latentrt[video]'")
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50)]
    save_movie([np.full((64, 64, 3), c, dtype=np.uint8) for c in colours], tmp_path / "m.mp4", fps=29.97)
    shown, _ = read(tmp_path / "m.mp4")
    for found, expected in zip(shown, colours, strict=True):
        np.testing.assert_allclose(found[32, 32], expected, atol=3)
    with av.open(str(tmp_path / "m.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.colorspace == 1  # ITU-R BT.709
        assert stream.codec_context.pix_fmt == "yuv420p"  # what every player can play
        assert float(stream.average_rate) == pytest.approx(29.97)


@given(st.integers(1, 300), st.floats(0.1, 50))
def test_times_of_frames_do_not_drift(count: int, fps: float) -> None:
    times = frame_times(count, fps, unit=100)
    assert len(times) == count
    assert abs(sum(times) - 100 * count / fps) <= 0.5
    assert all(abs(time - 100 / fps) <= 1 for time in times)


@pytest.mark.parametrize("suffix", FASTEST)
def test_a_drawing_that_fails_leaves_no_movie_and_the_old_one(suffix: str, tmp_path: Path) -> None:
    needs_av(suffix)
    path = tmp_path / f"movie{suffix}"
    path.write_bytes(b"old")

    def failing() -> Iterator[Array]:
        yield from frames(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_movie(failing(), path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_missing_writer_is_said_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # as where it is not installed
    with pytest.raises(EngineError, match=r"\bPyAV\b.*pip install 'latentrt\[video\]'"):
        check_movie(tmp_path / "movie.mp4", fps=8)


@pytest.mark.parametrize(
    ("name", "fps", "field"),
    [
        ("movie.avi", 8, "output"),
        ("movie", 8, "output"),
        ("movie.gif", 60, "fps"),
        ("movie.WEBP", 0, "fps"),
        ("movie.webp", float("nan"), "fps"),
    ],
)
def test_an_impossible_movie_is_refused_before_it_is_drawn(name: str, fps: float, field: str) -> None:
    with pytest.raises(RequestError, check=about(field)):
        check_movie(Path(name), fps=fps)


@pytest.mark.parametrize(
    ("pictures", "field"),
    [
        ([], "frames"),
        (
            [*frames(1), *frames(1, width=32)],
            "frames",
        ),
        ([np.zeros((8, 8, 3))], "frames"),
        ([np.zeros((8, 8), dtype=np.uint8)], "frames"),
    ],
)
def test_what_are_no_frames_is_refused(pictures: list[Array], field: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, check=about(field)):
        save_movie(pictures, tmp_path / "movie.webp")
    assert list(tmp_path.iterdir()) == []


def test_odd_sides_are_refused_where_the_format_has_none(tmp_path: Path) -> None:
    needs_av(".mp4")
    with pytest.raises(RequestError, check=about("frames")):
        save_movie(frames(width=63), tmp_path / "movie.mp4")
