"""What the speed was bought with: error against fp32, and how many of the demo's prompts come out right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.progress import Report as Progress
from latentrt.engines.spec import Array
from latentrt.engines.verify.verify import verify
from latentrt.runtime.bench.result import ComponentError, PromptScore, Settings
from latentrt.runtime.bench.samples import share_interval

if TYPE_CHECKING:
    from latentrt.runtime.pipeline import Pipeline

# (how many) -> the prompts, and a judge that tells of the i-th picture, (height, width, 3) uint8, whether it is right.
PromptSet = Callable[[int], tuple[Sequence[str], Callable[[int, Array], bool]]]
PromptSets = Mapping[str, PromptSet]  # by the checkpoint that a bundle was exported from


def component_errors(bundle: Bundle, backend: str, device: int, progress: Progress) -> tuple[ComponentError, ...]:
    """Replay the golden pairs on a backend. Raises EngineError if an engine drifts: its speed means nothing."""
    errors = []
    for row in verify(bundle, backend=backend, device=device, report=progress):  # type: ignore[arg-type]
        if not row.ok:
            raise EngineError(f"{row.what} ({backend}): {row.message}; a broken engine is not measured")
        if row.error is not None and row.limit is not None:
            errors.append(ComponentError(backend=backend, component=row.what, error=row.error, limit=row.limit))
    return tuple(errors)


def prompt_set(bundle: Bundle, sets: PromptSets) -> PromptSet:
    """Return the prompts that belong to a bundle's checkpoint. Raises RequestError if there are none."""
    checkpoint = bundle.manifest.provenance.checkpoint
    if checkpoint not in sets:
        known = ", ".join(f"'{name}'" for name in sets)
        raise RequestError(f"--accuracy: prompts with known answers exist for {known}, found a bundle of {checkpoint}")
    return sets[checkpoint]


def score_prompts(pipe: Pipeline, settings: Settings, prompts: PromptSet, count: int) -> PromptScore:
    """Draw held-out prompts with the settings of a variant, seeds 0, 1, 2, …, and count the right pictures."""
    texts, judge = prompts(count)
    right = 0
    for first in range(0, count, settings.batch):
        some = list(texts[first : first + settings.batch])
        drawn = pipe(
            some,
            steps=settings.steps,
            sampler=settings.sampler,
            guidance=settings.guidance,
            size=(settings.width, settings.height),
            seed=[first + i for i in range(len(some))],
        )
        right += sum(judge(first + i, picture) for i, picture in enumerate(drawn.pixels))
    low, high = share_interval(right, count)
    return PromptScore(prompts=count, right=right, share=right / count, low=low, high=high)
