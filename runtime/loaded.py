"""A bundle loaded for drawing: its engines, text encoders and LoRAs, and what a request is on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from latentrt import __version__
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.lora.weight_changes import Changes, keys_of
from latentrt.engines.spec import Array
from latentrt.engines.workspace.contract import Workspace
from latentrt.runtime.calls import Turn
from latentrt.runtime.draw.draw import BatchSource, Drawing, stream
from latentrt.runtime.draw.finite import SHOWN, TEXT, finite
from latentrt.runtime.draw.job import Job, latent_shape
from latentrt.runtime.draw.loras import Loras
from latentrt.runtime.draw.slots import encode_rows, write_rows
from latentrt.runtime.image_prompts.encode import ImagePrompts
from latentrt.runtime.result import Settings
from latentrt.runtime.text.encoders import PromptEncoders
from latentrt.runtime.text.tokenizer import Prompt

if TYPE_CHECKING:
    from latentrt.engines.open import OpenEngines

logger = logging.getLogger(__name__)


class Loaded:
    """What drawing needs of a bundle. It is not locked: its owner makes callers take turns.

    opened: the engines; encoders: the text encoders; images: what reads image prompts; loras: what LoRA files mean
    here; drawing: draws jobs
    """

    def __init__(self, bundle: Bundle, opened: OpenEngines, encoders: PromptEncoders) -> None:
        self.bundle, self.opened, self.turn = bundle, opened, Turn()
        self.encoders, encoders.engines = encoders, opened.engines
        self.loras = Loras(bundle)
        self.images = ImagePrompts(bundle.manifest, lambda component, inputs: opened.sizeless(component)(inputs))
        self.drawing = Drawing(opened, bundle.manifest)

    @property
    def manifest(self) -> Manifest:
        """Return the bundle's manifest."""
        return self.bundle.manifest

    def adapt(self, changes: Mapping[str, Changes]) -> float:
        """Have the engines compute with changed weights. Returns the seconds it took, 0 where they do already."""
        start = time.perf_counter()
        self.encoders.adapt(keys_of(changes))
        if not self.opened.adapt(changes):
            return 0.0
        taken = time.perf_counter() - start
        what = f"to those of {', '.join(changes)} with LoRAs" if changes else "back to the base's"
        logger.info("changed the weights %s in %.3f s", what, taken)
        return taken

    def prompts(self, job: Job) -> tuple[list[Prompt], list[Prompt]]:
        """Return a job's prompts, and those of the further groups of model rows. Raises RequestError."""
        return job.read_groups(job.prompts, job.negatives)

    def tokens(self, job: Job) -> dict[str, int]:
        """Return the length of a job's text for each of its denoisers. Raises RequestError on what cannot be read."""
        prompts, further = self.prompts(job)
        return {
            part.denoiser: self.encoders.tokens([*prompts, *further], denoiser=part.denoiser) for part in job.ranges
        }

    def encode(self, job: Job, denoiser: str) -> dict[str, Array]:
        """Return what a denoiser attends to: rows by name, the prompts' first. Raises NotFiniteError."""
        rows = self.read(*self.prompts(job), denoiser=denoiser)
        texts = {name: finite(array, TEXT, pictures=len(job.prompts)) for name, array in rows.items()}
        return texts | self.encode_images(job, denoiser)

    def encode_images(self, job: Job, denoiser: str) -> dict[str, Array]:
        """Return a job's image prompts as a denoiser takes them, see `ImagePrompts`. Raises NotFiniteError."""
        pictures = len(job.prompts)
        rows = self.images(job.images, denoiser=denoiser, pictures=pictures, guided=job.guidance.needed)
        return {name: finite(array, SHOWN, pictures=pictures) for name, array in rows.items()}

    def read(self, prompts: Sequence[Prompt], negatives: Sequence[Prompt], *, denoiser: str) -> dict[str, Array]:
        """Return texts as a denoiser takes them: rows by name, the prompts' first."""
        try:
            return self.encoders(prompts, negatives, denoiser=denoiser)
        finally:
            self.opened.rest()

    def source(self, job: Job) -> BatchSource:
        """Return what a request's own prompts and seeds give. Raises RequestError on what cannot be read."""
        start = time.perf_counter()
        tokens = self.tokens(job)

        def write(workspace: Workspace, denoiser: str, slots: slice) -> None:
            prompts, further = self.prompts(job)
            in_place = None
            if workspace.queued and not self.opened.on_demand:
                in_place = self.encoders.device_inputs(prompts, further, denoiser=denoiser)
            if in_place is not None:
                encode_rows(workspace, *in_place, slots, parts=job.guidance.most)
            rows = self.encode_images(job, denoiser) if in_place is not None else self.encode(job, denoiser)
            for name, array in rows.items():
                write_rows(workspace, name, array, slots)

        return BatchSource(
            tokens=tokens,
            tokenize_s=time.perf_counter() - start,
            write=write,
            draw=stream(job.request.noise, job.seeds, latent_shape(job.size, self.manifest.latents)),
        )

    def settings(self, job: Job, picture: int) -> Settings:
        """Return what one picture of a job is drawn with."""
        return Settings(
            prompt=job.prompts[picture],
            negative_prompt=job.negatives[picture],
            steps=job.plan.steps,
            guidance=job.scale,
            sampler=job.plan.sampler,
            size=job.size,
            model=self.bundle.name,
            version=f"latentrt {__version__}",
            further=job.request.further,
        )
