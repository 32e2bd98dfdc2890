"""What a session on a GPU does when the GPU is full or lost, when its process is forked, and when nobody closes it."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import ClosedError, DeviceLostError, EngineError, OutOfMemoryError, backend_error
from latentrt.engines.workspace.contract import STATE
from tests.host_device import HostDevice
from tests.studio import DRAWN, LONG, ONE, TWO, Request, Studio, assert_same, draw_on, expected, make_studio, picture

ILLEGAL = "cudaEventQuery: cudaErrorIllegalAddress (an illegal memory access was encountered)"


@pytest.fixture(scope="module")
def studio(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return make_studio(Bundle.open(sd1_bundle), tmp_path_factory.mktemp("lost"))


@pytest.fixture
def device() -> Iterator[HostDevice]:
    yield HostDevice()


def test_a_lost_gpu_is_told_by_its_first_error_and_closing_says_nothing(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        engine, workspace = session.engine("vae_encoder"), session.workspace(ONE, **DRAWN)
        draw_on(workspace, studio, Request())
        device.broken = ILLEGAL
        device.forget()
        for attempt in (lambda: workspace.read(STATE), lambda: workspace.read("pixels")):
            with pytest.raises(DeviceLostError) as caught:
                attempt()
            assert str(caught.value) == ILLEGAL and not caught.value.retryable
        with pytest.raises(DeviceLostError):
            session.workspace(TWO, **DRAWN)
    assert not {"free", "free_pinned", "free_graph", "destroy_stream"} & device.counted().keys()
    with pytest.raises(ClosedError):
        session.workspace(ONE, **DRAWN)
    with pytest.raises(ClosedError):
        engine({"sample": [[0]]})


def test_a_gpu_found_lost_while_closing_does_not_keep_it_from_closing(studio: Studio, device: HostDevice) -> None:
    session = studio.open(device)
    draw_on(session.workspace(ONE, **DRAWN), studio, Request())
    device.broken = ILLEGAL
    session.close()
    with pytest.raises(ClosedError):
        session.engine("unet")


def test_a_forked_process_is_refused_and_closes_without_touching_the_gpu(studio: Studio, device: HostDevice) -> None:
    session = studio.open(device)
    workspace = session.workspace(ONE, **DRAWN)
    draw_on(workspace, studio, Request())
    device.forked = True
    device.forget()
    for attempt in (lambda: workspace.run("vae_decoder"), lambda: session.workspace(TWO, **DRAWN)):
        with pytest.raises(DeviceLostError):
            attempt()
    session.close()
    assert device.calls == []


def test_a_session_that_nobody_has_frees_what_it_took(studio: Studio, device: HostDevice) -> None:
    session = studio.open(device)
    picture(session.workspace(ONE, **DRAWN), studio, Request())
    session.engine("text_encoder")({"input_ids": [[0] * 77]})
    assert device.leftovers()
    del session
    gc.collect()
    assert device.leftovers() == {}


AT_EXIT = """
import atexit, sys
from pathlib import Path
from latentrt.engines.bundle.files import Bundle
from tests.host_device import HostDevice
from tests.studio import DRAWN, ONE, make_studio
device = HostDevice()
atexit.register(lambda: print(device.leftovers()))  # before the session's, so that it runs after them
studio = make_studio(Bundle.open(sys.argv[1]), Path(sys.argv[2]))
session = studio.open(device)
workspace = session.workspace(ONE, **DRAWN)
engine = session.engine("text_encoder")
engine({"input_ids": [[0] * 77]})
print(sorted(device.leftovers()))
"""


def test_what_is_open_when_the_program_ends_is_freed(sd1_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_EXIT, str(sd1_bundle), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.stdout.splitlines() == ["['events', 'graphs', 'memory', 'pinned', 'streams']", "{}"], done.stderr


def test_a_full_gpu_gives_up_the_shapes_that_nobody_has_and_draws_the_new_one(
    studio: Studio, device: HostDevice
) -> None:
    with studio.open(device) as session:
        for shape in (ONE, LONG):
            session.workspace(shape, **DRAWN)
        device.capacity = device.memory.used
        request = Request(shape=TWO)
        assert_same(picture(session.workspace(TWO, **DRAWN), studio, request), expected(studio, request))
        assert device.memory.used <= device.capacity


def test_a_shape_that_is_in_use_is_not_given_up(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        draw_on(workspace, studio, Request())
        device.capacity = device.memory.used
        with pytest.raises(OutOfMemoryError):
            session.workspace(TWO, **DRAWN)
        found = (workspace.read(STATE)[:, 0], workspace.read("pixels"))
        assert_same(found, expected(studio, Request()))


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", DeviceLostError),
        ("Cuda Runtime (unspecified launch failure)", DeviceLostError),
        ("CUDA failure 3: initialization error ; GPU=0", DeviceLostError),
        ("CUDA failure 2: out of memory ; GPU=0", OutOfMemoryError),
        ("an invalid argument", EngineError),
    ],
)
def test_what_a_library_says_of_a_lost_gpu_is_that_kind_of_error(words: str, kind: type[EngineError]) -> None:
    assert type(backend_error(f"it failed: {words}", words)) is kind
