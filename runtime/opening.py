"""Opening a bundle for drawing: its engines and, beside them on a thread, its tokenizers and the first text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentrt.engines.bundle.files import Bundle, Check
from latentrt.engines.open import OpenEngines, open_engines
from latentrt.runtime.draw.job import resolve
from latentrt.runtime.request import DECODERS, Request
from latentrt.runtime.text.encoders import PromptEncoders, read_tokenizers
from latentrt.runtime.text.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from latentrt.runtime.text.early import EarlyText


def one_thread() -> ThreadPoolExecutor:
    """Return what runs work in a thread of its own, which starts with the first."""
    from concurrent.futures import ThreadPoolExecutor  # for what opens a bundle

    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt")


def open_bundle(
    bundle: Bundle, first: Request | None, *, check: Check, on_demand: tuple[str, ...], **opening: Any
) -> tuple[OpenEngines, PromptEncoders]:
    """Open engines and, meanwhile, read the tokenizers and encode what is drawn first. Raises as `Pipeline.load`."""
    early = None
    if first is not None and not first.loras and not on_demand:
        from latentrt.runtime.text.early import EarlyText  # for those who know what comes

        job = resolve(first, bundle.manifest)
        texts = job.read_groups(job.prompts, job.negatives)
        early = EarlyText(bundle.manifest, *texts, [part.denoiser for part in job.ranges])
    with one_thread() as beside:
        reading = beside.submit(_read_text, bundle, check, early)
        try:
            on_open = None if early is None else early.take
            opened = open_engines(bundle, check=check, on_demand=on_demand, on_open=on_open, **opening)
        finally:
            if early is not None:
                early.end()
    try:
        tokenizers, encoders = reading.result()
        return opened, encoders or PromptEncoders(bundle.manifest, opened.engines, tokenizers)
    except Exception:
        opened.close()
        raise


def _read_text(
    bundle: Bundle, check: Check, early: EarlyText | None
) -> tuple[dict[str, PromptTokenizer], PromptEncoders | None]:
    """Read the tokenizers, import what every first picture needs, and encode what is drawn first."""
    import numpy.random  # noqa: F401 - its noise

    tokenizers = read_tokenizers(bundle, check=check)
    return tokenizers, None if early is None else early.encode(tokenizers)


def needed(bundle: Bundle) -> tuple[str, ...]:
    """Return the components that drawing from text takes; an image's encoder is loaded when the first image comes."""
    return bundle.manifest.of_role("text_encoder", "denoiser", "controlnet", *DECODERS.values())
