"""The timing cache's file: read where it is there, written in one step, and refused where it is another GPU's.

On a stand-in for the builder's configuration: only TensorRT itself uses the cache, and it needs a GPU.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace

from latentrt.engines.backends import BACKENDS
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.tensorrt.compile import attach_timing_cache, save_timing_cache
from tests.refused import caused_by
from tests.stand_in import install


@dataclass
class Cache:
    content: bytes

    def serialize(self) -> bytes:
        return self.content + b" and more"


@dataclass
class Config:
    """As TensorRT's: None for what is no cache, False for another GPU's."""

    caches: list[Cache] = field(default_factory=list)

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content == b"rubbish" else Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.caches.append(cache)
        return cache.content != b"of another GPU"

    def get_timing_cache(self) -> Cache:
        return self.caches[-1]


def test_what_was_measured_is_kept_and_found_again(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "timing.cache"
    for expected in (b"", b" and more", b" and more and more"):
        config = Config()
        attach_timing_cache(config, file)
        assert config.caches[0].content == expected
        save_timing_cache(config, file)
    assert [path.name for path in file.parent.iterdir()] == ["timing.cache"]


@pytest.mark.parametrize("content", [b"rubbish", b"of another GPU"])
def test_a_file_that_is_not_this_gpus_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "timing.cache"
    file.write_bytes(content)
    with pytest.raises(EngineError, match=r"/timing\.cache\b"):
        attach_timing_cache(Config(), file)
    assert file.read_bytes() == content


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = Config()
    attach_timing_cache(config, tmp_path / "timing.cache")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError, check=caused_by(errno.ENOSPC)):
        save_timing_cache(config, tmp_path / "timing.cache")
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_rtx_takes_no_timing_cache_and_tensorrts_key_does_not_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tensorrt="11.4.0.106", tensorrt_rtx="1.7.1.116")
    cached = BuildOptions(timing_cache=tmp_path / "timing.cache")
    assert "--timing-cache" in str(BACKENDS["tensorrt-rtx"].cannot_build(cached))
    assert BACKENDS["tensorrt"].cannot_build(cached) is None
    assert cached.key_lines() == replace(cached, timing_cache=None).key_lines()
