"""What a bundle says of a component that computes in 8 bits in part, and what can compute it."""

from __future__ import annotations

from collections.abc import Mapping

from latentrt.engines.errors import EngineError
from latentrt.engines.spec import QUANTISED, BackendName, Document, Precision, Quantised

# The first GPUs whose matrix units take them; below, a compiler would refuse or compute in other ways.
LEAST_CAPABILITY: Mapping[Quantised, str] = {"fp8": "8.9", "int8": "7.5"}
ON_THE_CPU = "computes every 8-bit number in float32, to check what a GPU would: slower than a bundle in fp32"


class QuantisedLevel(Document, frozen=True, kw_only=True):
    """A group of nodes that went into 8 bits together.

    nodes: how many of them did; of: how many it has
    noise: see `Quantisation`, with this level and those before it
    whole: the same, with all of its nodes
    kept: the blocks of the network whose nodes stay in float16, since they lose too much
    """

    name: str
    nodes: int
    of: int
    noise: float
    whole: float
    kept: tuple[str, ...] = ()


class Quantisation(Document, frozen=True, kw_only=True):
    """A component of which the products of some nodes are those of 8-bit numbers.

    to: the kind of numbers; nodes: how many; of: how many products and attentions the graph has
    noise: what the errors of its outputs, at the stages of real prompts, put into the latents, over what the outputs
        put there: roots of sums of squares, against the graph without 8 bits in float32
    decibels: median PSNR of pictures drawn with it, against those drawn without
    prompts, steps: how many were drawn to find that; the ranges come from others of the same kind
    """

    to: Quantised
    nodes: int
    of: int
    noise: float
    decibels: float
    prompts: int
    steps: int
    levels: tuple[QuantisedLevel, ...]

    def note(self) -> str:
        """Say in one line what computes in 8 bits, and what that costs."""
        parts = ", ".join(f"{level.name} {level.nodes} of {level.of}" for level in self.levels)
        return (
            f"{self.nodes} of {self.of} nodes compute in {self.to} ({parts}): noise {self.noise:.1e} of what stages "
            f"add, pictures {self.decibels:.1f} dB from those without"
        )


def refusal(precision: Precision, backend: BackendName, capability: str | None = None) -> EngineError | None:
    """Return the error that says why a backend does not compute a bundle of a precision, or None.

    capability: of the GPU, as `8.9`; None where it is not known, or there is none
    """
    if precision not in QUANTISED:
        return None
    if backend == "cuda":
        return EngineError(
            f"the backend cuda has no kernels for {precision} and would compute it in float16, slower than a bundle in "
            "fp16: use tensorrt or tensorrt-rtx, or export the checkpoint with --precision fp16"
        )
    least = LEAST_CAPABILITY[precision]
    if capability is not None and _version(capability) < _version(least):
        return EngineError(
            f"{precision} needs a GPU of compute capability {least} or later and this is {capability}; export the "
            "checkpoint with --precision fp16"
        )
    return None


def _version(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
