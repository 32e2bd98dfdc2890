"""The text of what is drawn first, encoded while other networks are still being opened."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.errors import LatentrtError
from latentrt.engines.spec import Engine
from latentrt.runtime.text.encoders import PromptEncoders
from latentrt.runtime.text.tokenizer import Prompt, PromptTokenizer


class EarlyText:
    """Takes text encoders as they open, and encodes texts as soon as all are there.

    prompts, negatives: as `PromptEncoders` takes them; denoisers: who attends to them
    """

    def __init__(
        self, manifest: Manifest, prompts: Sequence[Prompt], negatives: Sequence[Prompt], denoisers: Sequence[str]
    ) -> None:
        self._manifest, self._prompts, self._negatives, self._denoisers = manifest, prompts, negatives, denoisers
        self._missing = set(manifest.of_role("text_encoder"))
        self._engines: dict[str, Engine] = {}
        self._change = threading.Condition()
        self._over = False

    def take(self, component: str, engine: Engine) -> None:
        """Note an engine that was opened."""
        with self._change:
            self._engines[component] = engine
            self._missing.discard(component)
            self._change.notify_all()

    def end(self) -> None:
        """Say that no more engines come."""
        with self._change:
            self._over = True
            self._change.notify_all()

    def encode(self, tokenizers: Mapping[str, PromptTokenizer]) -> PromptEncoders | None:
        """Wait for the text encoders; return what remembers the texts, None where one did not come."""
        with self._change:
            self._change.wait_for(lambda: self._over or not self._missing)
            if self._missing:
                return None
        encoders = PromptEncoders(self._manifest, self._engines, tokenizers)
        with suppress(LatentrtError):  # drawing will meet it again, and tell
            for denoiser in self._denoisers:
                encoders(self._prompts, self._negatives, denoiser=denoiser)
        return encoders
