"""latentrt: the deployment runtime for Stable Diffusion.

`latentrt.export` turns a checkpoint into a bundle (needs torch), `latentrt.engines` builds and runs what is
in the bundle on one kind of device, `latentrt.runtime` draws pictures from it (NumPy, no torch).

What a program needs is here, and each name is imported when it is first used: `import latentrt` alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentrt import errors
    from latentrt.runtime.batching.batcher import Batcher, BatcherOptions
    from latentrt.runtime.calls import Cancellation, Stream
    from latentrt.runtime.draw.step import Step
    from latentrt.runtime.pipeline import Pipeline
    from latentrt.runtime.request import Control, ImagePrompt, KeyFrame, Lora, Request
    from latentrt.runtime.result import Result

__version__ = "0.1.0"

__all__ = [
    "Batcher",
    "BatcherOptions",
    "Cancellation",
    "Control",
    "ImagePrompt",
    "KeyFrame",
    "Lora",
    "Pipeline",
    "Request",
    "Result",
    "Step",
    "Stream",
    "__version__",
    "errors",
]

HOMES = {
    "Batcher": "latentrt.runtime.batching.batcher",
    "BatcherOptions": "latentrt.runtime.batching.batcher",
    "Cancellation": "latentrt.runtime.calls",
    "Control": "latentrt.runtime.request",
    "ImagePrompt": "latentrt.runtime.request",
    "KeyFrame": "latentrt.runtime.request",
    "Lora": "latentrt.runtime.request",
    "Pipeline": "latentrt.runtime.pipeline",
    "Request": "latentrt.runtime.request",
    "Result": "latentrt.runtime.result",
    "Step": "latentrt.runtime.draw.step",
    "Stream": "latentrt.runtime.calls",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "errors":
        return importlib.import_module("latentrt.errors")
    if name not in HOMES:
        raise AttributeError(f"module 'latentrt' has no attribute '{name}'")
    found = globals()[name] = getattr(importlib.import_module(HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
