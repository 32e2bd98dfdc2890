"""Pictures drawn through TensorRT's contexts, on a stand-in for the device that runs late and forgives nothing.

The contexts run the very graphs that are compiled for TensorRT, in ONNX Runtime. Nothing here has run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import ClosedError, EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import STATE_ROWS
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library
from tests.studio import (
    DRAWN,
    LONG,
    ONE,
    STEPS,
    TALL,
    TWO,
    Request,
    Studio,
    assert_same,
    draw_on,
    expected,
    make_studio,
    picture,
    plan_of,
)

STILL = {"state": (1, STATE_ROWS, 4, 8, 8), "known": (1, 2, 4, 8, 8), "keep_mask": (1, 1, 8, 8)}


@pytest.fixture(scope="module")
def studio(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return make_studio(Bundle.open(sd1_bundle), tmp_path_factory.mktemp("plans") / "bundle")


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = HostDevice()
    yield device
    assert device.leftovers() == {}, "a test leaves nothing on the device"


REQUESTS = {
    "guided": Request(),
    "not guided": Request(guided=None),
    "noise of the sampler": Request(sampler="euler_ancestral"),
    "guided in the middle": Request(guided=(0.3, 0.7)),
    "much memory": Request(sampler="unipc"),
    "two pictures": Request(shape=TWO, sampler="dpmpp_2m_sde", guided=(0.0, 0.5)),
    "tall": Request(shape=TALL),
    "long prompts": Request(shape=LONG),
}


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", REQUESTS)
def test_pictures_are_those_of_the_numpy_loop(studio: Studio, device: HostDevice, name: str, graphs: bool) -> None:
    """Three in a row: kernel by kernel and recorded, then from the graphs, then with another seed."""
    request = REQUESTS[name]
    with studio.open(device, graphs=graphs) as session:
        workspace = session.workspace(request.shape, **DRAWN)
        wanted = expected(studio, request)
        for _ in range(2):
            assert_same(picture(workspace, studio, request), wanted)
        other = replace(request, seed=7)
        assert_same(picture(workspace, studio, other), expected(studio, other))


def test_the_first_picture_records_each_pass_once_and_the_next_only_launches(
    studio: Studio, device: HostDevice
) -> None:
    """Of two encoders and two stages only those of the request run; every pass is put kernel by kernel once."""
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        device.forget()
        first = picture(workspace, studio, Request())
        calls = device.counted()
        assert (calls["begin_capture"], calls["end_capture"]) == (3, 3)
        assert calls["launch"] == STEPS - 1  # encoder, first stage and decoder went kernel by kernel
        device.forget()
        second = picture(workspace, studio, Request())
        calls = device.counted()
        assert calls["begin_capture"] == 0 and calls["launch"] == STEPS + 2
        np.testing.assert_array_equal(first[1], second[1])


def test_a_picture_is_one_queue_and_one_wait(studio: Studio, device: HostDevice) -> None:
    """From the second picture on: a copy and a launch a stage, nothing allocated, one wait at the end."""
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        picture(workspace, studio, Request())
        device.forget()
        draw_on(workspace, studio, Request())
        assert device.ran == [] and "wait" not in device.counted()
        workspace.read("pixels")
        stage = ["copy_in", "copy", "run next_state 1"]
        assert device.ran == [
            *("copy_in", "run last_hidden_state 1", "copy"),
            "copy_in",
            *(stage * STEPS),
            *("run pixels 0", "copy_out"),
        ]
        calls = device.counted()
        assert calls["wait"] == 1
        assert set(calls) == {"copy_in", "copy", "launch", "record", "copy_out", "wait"}


def test_noise_is_copied_only_where_it_has_weight(studio: Studio, device: HostDevice) -> None:
    """The last stage of an ancestral sampler draws none: what the stage before left is cleared, once."""
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        draw_on(workspace, studio, Request(sampler="euler_ancestral"))
        workspace.read("pixels")
        device.forget()
        draw_on(workspace, studio, Request(sampler="euler_ancestral"))
        sizes = [int(call.split()[1]) for call in device.calls if call.startswith("copy_in")]
        with_noise, without = sizes[-2], sizes[-1]
        assert sizes[2:] == [with_noise] * (STEPS - 1) + [without]
        assert with_noise - without >= 4 * 8 * 8 * 4
        assert device.counted()["zero"] == 1


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_few_slots_wait_for_a_copy_long_past_and_never_for_the_queue(
    studio: Studio, device: HostDevice, slots: int
) -> None:
    request = Request(sampler="euler_ancestral")
    with studio.open(device, slots=slots) as session:
        workspace = session.workspace(ONE, **DRAWN)
        picture(workspace, studio, request)
        device.forget()
        draw_on(workspace, studio, request)
        assert device.counted()["wait"] == STEPS - slots
        assert device.pending() >= slots
        workspace.read("pixels")
        assert_same((workspace.read("state")[:, 0], workspace.read("pixels")), expected(studio, request))


def test_a_second_picture_may_be_queued_before_the_first_is_fetched(studio: Studio, device: HostDevice) -> None:
    other = Request(seed=5, guided=None)
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        draw_on(workspace, studio, Request())
        draw_on(workspace, studio, other)
        found = workspace.read("pixels")
        assert_same((workspace.read("state")[:, 0], found), expected(studio, other))


def test_workspacees_share_scratch_memory_which_grows_with_the_largest(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        small = session.workspace(ONE, **DRAWN)
        assert_same(picture(small, studio, Request()), expected(studio, Request()))
        before = session.scratch_bytes
        tall = session.workspace(TALL, **DRAWN)
        assert session.scratch_bytes > before
        device.forget()
        assert_same(picture(small, studio, Request()), expected(studio, Request()))
        assert device.counted()["begin_capture"] == 3  # what was recorded used the memory where it was
        device.forget()
        tall_request = Request(shape=TALL, seed=3)
        assert_same(picture(tall, studio, tall_request), expected(studio, tall_request))
        assert_same(picture(small, studio, Request()), expected(studio, Request()))
        assert session.scratch_bytes > before and device.counted()["allocate"] == 0


def test_the_workspace_that_was_used_longest_ago_makes_room(studio: Studio, device: HostDevice) -> None:
    with studio.open(device, workspaces=2) as session:
        first, second = session.workspace(ONE, **DRAWN), session.workspace(TWO, **DRAWN)
        assert session.workspace(ONE, **DRAWN) is first
        session.workspace(TALL, **DRAWN)
        assert session.workspace(ONE, **DRAWN) is first
        assert_same(picture(second, studio, Request(shape=TWO)), expected(studio, Request(shape=TWO)))
        before = device.leftovers()["memory"]
        del second
        assert device.leftovers()["memory"] < before


def test_a_workspace_is_handed_out_blank(studio: Studio, device: HostDevice) -> None:
    """Nothing of a request that was left in the middle, or that kept a part of a picture, is seen by the next."""
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        workspace.write("keep_mask", np.zeros((1, 1, 8, 8)))
        workspace.write("known", np.ones((1, 2, 4, 8, 8)))
        draw_on(workspace, studio, Request())
        again = session.workspace(ONE, **DRAWN)
        assert again is workspace
        for call in (
            lambda: again.read("pixels"),
            lambda: again.run("vae_decoder"),
            lambda: again.read("state"),
            lambda: again.run("unet"),
        ):
            with pytest.raises(EngineError):
                call()
        assert_same(picture(again, studio, Request()), expected(studio, Request()))


def test_what_is_kept_stays_as_it_is_known(studio: Studio, device: HostDevice) -> None:
    """The left half is drawn, the right half ends as the known latents: the plan's last level has no noise."""
    known = np.random.default_rng(9).standard_normal((1, 2, 4, 8, 8), dtype=np.float32)
    mask = np.zeros((1, 1, 8, 8), dtype=np.float32)
    mask[..., :4] = 1
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        workspace.write("keep_mask", mask)
        workspace.write("known", known)
        latents, _ = picture(workspace, studio, Request())
        (plan, _), right = plan_of(studio, Request()), slice(4, 8)
        np.testing.assert_allclose(latents[..., right], plan.levels[-1, 0] * known[:, 0][..., right], atol=1e-5)
        assert np.abs(latents[..., :4] - known[:, 0][..., :4]).max() > 0.1


def test_events_tell_the_device_time_between_them(studio: Studio, device: HostDevice) -> None:
    """Each piece of work takes the stand-in a thousandth of a second. Events that nobody holds serve again."""
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        picture(workspace, studio, Request())
        for _ in range(3):
            events = [workspace.event()]
            draw_on(workspace, studio, Request(guided=None))
            events += [workspace.event(), workspace.event()]
            assert events[1].since(events[0]) == (3 + 1 + 3 * STEPS + 2) / 1e3
            assert events[2].since(events[1]) == 0
            device.forget() if "create_event" in device.counted() else None
        assert "create_event" not in device.counted()


def test_waiting_for_an_event_is_not_waiting_for_the_queue(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        assert device.pending() > 0
        events = []
        for name in ("state", "known", "keep_mask"):
            events.append(workspace.event())
            workspace.write(name, np.zeros(STILL[name]))
        before = device.pending()
        events[0].wait()
        assert 0 < device.pending() < before
        events[2].wait()
        assert device.pending() == 1


def test_threads_share_a_session(studio: Studio, device: HostDevice) -> None:
    requests = [Request(seed=1), Request(shape=TALL, seed=2), Request(shape=TWO, seed=3)]
    wanted = [expected(studio, request) for request in requests]
    found: dict[int, tuple[Array, Array]] = {}
    device.capture_pause_s = 0.01
    with studio.open(device) as session:
        workspaces = [session.workspace(request.shape, **DRAWN) for request in requests]

        def work(number: int) -> None:
            for _ in range(3):
                found[number] = picture(workspaces[number], studio, requests[number])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(len(requests)):
        assert_same(found[number], wanted[number])


def test_closing_frees_everything_once(studio: Studio, device: HostDevice) -> None:
    library = make_library(device)
    session = studio.open(device, library=library)
    workspace, engine = session.workspace(ONE, **DRAWN), session.engine("vae_encoder")
    draw_on(workspace, studio, Request())
    assert len(library.engines) == 4 and device.leftovers()
    session.close()
    session.close()
    workspace.close()
    engine.close()
    assert device.leftovers() == {} and len(library.engines) == 0
    for call in (
        lambda: workspace.read("pixels"),
        lambda: session.workspace(ONE, **DRAWN),
        lambda: engine({}),
        lambda: workspace.run("vae_decoder"),
    ):
        with pytest.raises(ClosedError):
            call()
