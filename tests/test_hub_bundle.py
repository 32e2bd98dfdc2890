"""A bundle that was published on the hub and is opened from its cache: its own links are followed, and no others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from latentrt.engines.bundle.files import Bundle, inside
from latentrt.engines.errors import BundleError
from tests.hub_cache import REVISION, in_hub_cache
from tests.test_bundle import write_bundle

GRAPH = "onnx/unet/model.onnx"
Attack = Callable[[Path], str]
"""(the bundle's directory) -> the path in it that is asked for"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A bundle in the hub's cache, beside another repository and a secret."""
    write_bundle(tmp_path / "bundle")
    (tmp_path / "secret").write_text("secret")
    in_hub_cache(tmp_path / "secret", tmp_path / "cache", repository="models--other--model")
    return in_hub_cache(tmp_path / "bundle", tmp_path / "cache")


def link(root: Path, target: str | Path, name: str = "link") -> str:
    (root / name).symlink_to(target)
    return name


def other_blob(root: Path) -> Path:
    (blob,) = (root.parents[2] / "models--other--model" / "blobs").iterdir()
    return blob


def to_an_absolute_path(root: Path) -> str:
    return link(root, "/etc/passwd")


def to_a_relative_path(root: Path) -> str:
    return link(root, os.path.relpath("/etc/passwd", root))


def to_another_repository(root: Path) -> str:
    return link(root, os.path.relpath(other_blob(root), root))


def past_the_blobs(root: Path) -> str:
    return link(root, f"../../blobs/../../models--other--model/blobs/{other_blob(root).name}")


def through_a_blob(root: Path) -> str:
    (root.parent.parent / "blobs" / "0123").symlink_to(other_blob(root))
    return link(root, "../../blobs/0123")


def through_another_link(root: Path) -> str:
    link(root, "/etc/passwd", "first")
    return link(root, "first")


def through_a_directory(root: Path) -> str:
    return link(root, "/etc", "etc") + "/passwd"


def to_what_the_cache_notes(root: Path) -> str:
    assert (root.parent.parent / "refs" / "main").read_text() == REVISION
    return link(root, "../../refs/main")


def below_the_blobs(root: Path) -> str:
    """The cache's blobs lie side by side: what is deeper is no file of the repository."""
    deeper = root.parent.parent / "blobs" / "deeper"
    deeper.mkdir()
    (deeper / "file").write_text("x")
    return link(root, "../../blobs/deeper/file")


def in_a_circle(root: Path) -> str:
    link(root, "link", "back")
    return link(root, "back")


def to_itself(root: Path) -> str:
    return link(root, "link")


def upwards(root: Path) -> str:
    return f"../../blobs/{next((root.parent.parent / 'blobs').iterdir()).name}"


def absolute(root: Path) -> str:
    return str(root / GRAPH)


def with_a_nul(root: Path) -> str:
    return "onnx/\0"


def with_half_a_character(root: Path) -> str:
    return "onnx/\ud800"


ATTACKS: tuple[Attack, ...] = (
    to_an_absolute_path,
    to_a_relative_path,
    to_another_repository,
    past_the_blobs,
    through_a_blob,
    through_another_link,
    through_a_directory,
    to_what_the_cache_notes,
    below_the_blobs,
    in_a_circle,
    to_itself,
    upwards,
    absolute,
    with_a_nul,
    with_half_a_character,
)


def test_a_bundle_in_the_hubs_cache_is_whole(published: Path) -> None:
    assert (published / GRAPH).is_symlink()
    opened = Bundle.open(published)
    for name in opened.manifest.files:
        assert opened.path(name, check="hash") == published / name


def test_a_part_of_a_repository_can_be_the_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "repository" / "sub" / "bundle")
    snapshot = in_hub_cache(tmp_path / "repository", tmp_path / "cache")
    assert Bundle.open(snapshot / "sub" / "bundle").path(GRAPH, check="hash").is_file()


def test_a_bundle_is_called_as_its_repository_or_its_directory(published: Path, tmp_path: Path) -> None:
    assert Bundle.open(published).name == "name"
    assert Bundle.open(tmp_path / "bundle").name == "bundle"
    snapshot = in_hub_cache(tmp_path / "bundle", tmp_path / "cache", repository="models--user--two.parts-1")
    (tmp_path / "mine").symlink_to(snapshot)
    assert Bundle.open(tmp_path / "mine").name == "two.parts-1"


def test_the_cache_may_be_reached_through_a_link(published: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(published)
    assert Bundle.open(tmp_path / "mine").path(GRAPH, check="hash") == tmp_path / "mine" / GRAPH


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_every_other_link_is_refused(published: Path, attack: Attack) -> None:
    path = attack(published)
    with pytest.raises(BundleError) as caught:
        inside(published, path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_graph_that_is_such_a_link_is_not_opened(published: Path) -> None:
    (published / GRAPH).unlink()
    (published / GRAPH).symlink_to(other_blob(published))
    with pytest.raises(BundleError, match=f"'{GRAPH}'"):
        Bundle.open(published).path(GRAPH)


def test_blobs_that_are_a_link_themselves_are_not_followed(published: Path) -> None:
    blobs = published.parent.parent / "blobs"
    blobs.rename(blobs.with_name("elsewhere"))
    blobs.symlink_to("elsewhere")
    with pytest.raises(BundleError):
        inside(published, GRAPH)


@pytest.mark.parametrize("repository", ["blobs-of-mine", "models", "models--", "other--user--name"])
def test_only_the_hubs_own_names_make_a_cache(tmp_path: Path, repository: str) -> None:
    write_bundle(tmp_path / "bundle")
    snapshot = in_hub_cache(tmp_path / "bundle", tmp_path / "cache", repository=repository)
    with pytest.raises(BundleError):
        Bundle.open(snapshot).path(GRAPH)


def test_a_directory_elsewhere_may_not_borrow_a_caches_blobs(published: Path, tmp_path: Path) -> None:
    """A copy of the links alone, as `cp -a` makes of a snapshot, is not in the cache."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").symlink_to((published / "manifest.json").resolve())
    with pytest.raises(BundleError):
        Bundle.open(mine)


def test_engines_that_a_directory_link_brings_are_refused(published: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "engine.json").write_text("{}")
    (published / "engines").mkdir()
    (published / "engines" / "cpu-key").symlink_to(elsewhere)
    with pytest.raises(BundleError, match=r"'engines/cpu-key/engine\.json'"):
        Bundle.open(published).engine_directories()
