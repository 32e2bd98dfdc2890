"""A picture that shares its stages with others is the one drawn alone, whatever they are and whenever they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import SKIP_LAYERS, STATE_ROWS
from latentrt.engines.tensorrt.engines import TensorRTSession
from latentrt.engines.workspace.contract import STATE, TEXT, Workspace
from latentrt.runtime.draw.denoise import Batch, Loop
from latentrt.runtime.draw.slots import write_rows
from latentrt.runtime.draw.start import Start
from latentrt.runtime.sampling.catalogue import SAMPLERS, find, sampler_names
from latentrt.runtime.sampling.guidance import Guidance, plan_guidance
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.plan import SamplingPlan
from tests.sampler_oracle import STABLE_DIFFUSION
from tests.sketch import SIZE, TOKENS, WIDTH, bound_workspace, compiled, numpy_workspace, shape_for
from tests.studio import DRAWN

SLOTS = 4
COMPILED = (4, 5, 8, 9, 12)  # model rows: what needs 6 or 7 is filled up
RANGE = 1e-4  # of the largest latent: the same float32 sums in another order, through a whole trajectory

Make = Callable[[], Workspace]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TensorRTSession]:
    directory = tmp_path_factory.mktemp("slots") / "engines" / "host"
    with compiled(directory, STATE_ROWS, {SLOTS: COMPILED}, skips=True) as opened:
        yield opened[True]


@pytest.fixture(scope="module", params=["numpy", "bound", "device"])
def make(request: pytest.FixtureRequest, session: TensorRTSession) -> Make:
    """Make a blank workspace of each kind."""
    bound = bound_workspace(SLOTS, STATE_ROWS, skips=True)

    def blank() -> Workspace:
        if request.param == "numpy":
            return numpy_workspace(SLOTS, STATE_ROWS, skips=True)
        if request.param == "device":
            return session.workspace(shape_for(SLOTS), **DRAWN)
        bound.reset(decoder="vae_decoder")
        return bound

    return blank


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is drawn: some pictures of one plan. after: the stages of others before it joins, where there is room

    skip: of skip-layer guidance
    """

    sampler: str
    steps: int
    scale: float
    interval: tuple[float, float]
    rescale: float
    start: str
    seed: int
    skip: float = 0.0
    pictures: int = 1
    after: int = 0

    @property
    def plan(self) -> SamplingPlan:
        prediction = SAMPLERS[find(self.sampler).sampler].predictions[0]
        schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=prediction)  # type: ignore[arg-type]
        return make_plan(self.sampler, schedule, steps=self.steps)

    def guidance(self, plan: SamplingPlan) -> Guidance:
        return plan_guidance(
            plan,
            self.scale,
            self.pictures,
            interval=self.interval,
            rescale=self.rescale,
            skip=self.skip if self.scale > 1 else 0.0,
            skip_interval=(0.1, 0.8),
        )

    def join(self, loop: Loop, workspace: Workspace, slots: slice) -> Batch:
        """Write text and start to slots, and go along."""
        plan, draw = self.plan, np.random.default_rng(self.seed)
        guidance = self.guidance(plan)

        def normal(*shape: int) -> Array:
            return draw.standard_normal((self.pictures, *shape), dtype=np.float32)

        texts = [normal(TOKENS, WIDTH) for _ in range(guidance.most)]
        write_rows(workspace, TEXT, np.concatenate(texts), slots)
        write_rows(
            workspace, SKIP_LAYERS, np.float32([0, 0, 1]).repeat(self.pictures)[: len(texts) * self.pictures], slots
        )
        image, noise = normal(*SIZE), normal(*SIZE)
        mask = (normal(1, *SIZE[1:])[:1] > 0).astype(np.float32)
        kept = {"kept": image, "mask": mask} if self.start == "mask" else {}
        begins = Start(noise=noise, image=None if self.start == "text" else image, **kept)
        for name, array in begins.inputs(plan, state_rows=workspace.state_rows).items():
            workspace.write(name, array, slots)
        if self.start == "lost":
            workspace.write(STATE, np.nan, slots)
        batch = Batch(plan=plan, guidance=guidance, draw=lambda: normal(*SIZE), slots=slots, stages=range(plan.stages))
        loop.join(batch)
        return batch


def alone(wish: Wish) -> Array:
    """Return the latents of a wish that shares nothing, on NumPy's workspace, and the pixels of them."""
    workspace = numpy_workspace(wish.pictures, wish.plan.rows, skips=True)
    loop = Loop(workspace, "unet")
    batch = wish.join(loop, workspace, slice(0, wish.pictures))
    while batch.running:
        loop.advance()
    return workspace.read(STATE)[:, 0]


def together(workspace: Workspace, wishes: list[Wish]) -> dict[int, Array]:
    """Draw wishes, each from the stage on that it comes at and that has room for it; return the latents of each."""
    loop, waiting, stage = Loop(workspace, "unet"), dict(enumerate(wishes)), 0
    batches: dict[int, Batch] = {}
    found: dict[int, Array] = {}
    while waiting or batches:
        for number, wish in list(waiting.items()):
            slots = room(loop, wish.pictures)
            if slots is not None and (stage >= wish.after or not batches):
                batches[number] = waiting.pop(number).join(loop, workspace, slots)
        loop.advance()
        stage += 1
        for number, batch in list(batches.items()):
            if not batch.running:
                found[number] = workspace.read(STATE, batch.slots)[:, 0]
                loop.leave(batches.pop(number))
    return found


def room(loop: Loop, pictures: int) -> slice | None:
    """Return the last free slots, so that pictures are in the first ones seldom; None if there are too few."""
    taken = {slot for batch in loop.batches for slot in range(batch.slots.start, batch.slots.stop)}
    starts = range(SLOTS - pictures, -1, -1)
    start = next((one for one in starts if not taken & set(range(one, one + pictures))), None)
    return None if start is None else slice(start, start + pictures)


WISHES = st.builds(
    Wish,
    sampler=st.sampled_from(sampler_names()),
    steps=st.integers(4, 6),
    scale=st.sampled_from([1.0, 1.5, 2.0]),
    interval=st.sampled_from([(0.0, 1.0), (0.0, 0.5)]),
    rescale=st.sampled_from([0.0, 0.7]),
    skip=st.sampled_from([0.0, 1.5]),
    start=st.sampled_from(["text", "image", "mask", "lost"]),
    seed=st.integers(0, 1 << 16),
    pictures=st.sampled_from([1, 1, 2]),
    after=st.integers(0, 6),
)


def assert_alike(found: dict[int, Array], wishes: list[Wish]) -> None:
    for number, wish in enumerate(wishes):
        if wish.start == "lost":
            assert not np.isfinite(found[number]).all()
            continue
        expected = alone(wish)
        np.testing.assert_allclose(found[number], expected, rtol=0, atol=RANGE * float(np.abs(expected).max()))


@settings(max_examples=40)
@given(wishes=st.lists(WISHES, min_size=1, max_size=6))
def test_a_picture_among_others_is_the_one_drawn_alone(make: Make, wishes: list[Wish]) -> None:
    assert_alike(together(make(), wishes), wishes)


@pytest.mark.parametrize("name", sampler_names())
def test_every_sampler_can_share_its_stages(make: Make, name: str) -> None:
    """Guided and not, from an image with a mask and from noise, one behind the other."""
    common: dict[str, Any] = {"sampler": name, "interval": (0.0, 1.0), "rescale": 0.0}
    wishes = [
        Wish(steps=5, scale=2.0, start="mask", seed=1, **common),
        Wish(steps=4, scale=1.0, start="text", seed=2, after=1, **common),
        Wish(steps=6, scale=1.5, start="image", seed=3, after=2, pictures=2, skip=2.8, **common),
    ]
    assert_alike(together(make(), wishes), wishes)


def test_slots_are_given_once(make: Make) -> None:
    workspace = make()
    wish = Wish(sampler="euler", steps=2, scale=1.0, interval=(0.0, 1.0), rescale=0.0, start="text", seed=0)
    loop = Loop(workspace, "unet")
    wish.join(loop, workspace, slice(1, 2))
    for slots in (slice(1, 2), slice(SLOTS, SLOTS + 1), slice(2, 4)):
        with pytest.raises(EngineError):
            wish.join(loop, workspace, slots)
