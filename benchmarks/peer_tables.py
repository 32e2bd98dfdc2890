"""The tables of peers.py: environments, peers and models, and why a peer is not in a comparison."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"  # named first: from there the resolver keeps the build for CPUs


class PeerError(Exception):
    """Why a peer is not in the comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What pip installs into one environment, in these calls, one after another, from the repository's root.

    imports: what a user imports
    compiled: what has no wheel, so that one is built, once
    fresh: what is installed again each time, without what it needs: our own code changes
    """

    installs: tuple[tuple[str, ...], ...]
    imports: str = ""
    compiled: str | None = None
    fresh: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to draw.

    precision: what it computes in, where it is not float32 throughout
    needs: what is made of the checkpoint for it, once: of `CONVERSIONS`
    draws: the environment in which its picture is drawn from torch's noise, where its own lacks torch
    """

    title: str
    environment: str
    precision: str = "fp32"
    needs: tuple[str, ...] = ()
    draws: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is drawn of one of the shapes of random_checkpoint.py, if nothing else is asked for.

    guidance: 1 is none
    published: whether the checkpoint gets what stable-diffusion.cpp takes for granted: CLIP's published vocabulary,
        and first steps with as much noise as the schedule ends with ("trailing")
    tiny: whether a tiny decoder of TAESD's size draws the pixels
    together: how many peers may be in memory beside ours; None for all
    """

    steps: int = 8
    guidance: float = 5.0
    published: bool = False
    tiny: bool = False
    together: int | None = None


def _onnxruntime() -> str:
    """Return the pinned ONNX Runtime: engines are kept for the version they were built with."""
    return f"onnxruntime=={importlib.metadata.version('onnxruntime')}"


GENAI, SDCPP = "openvino-genai==2026.4.1.0", "stable-diffusion-cpp-python==0.4.7"
ENVIRONMENTS = {
    "latentrt": Environment(
        installs=((".", _onnxruntime()),), imports="import latentrt.runtime.pipeline, onnxruntime", fresh="."
    ),
    "diffusers": Environment(
        installs=((TORCH,), ("diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0")),
        imports="from diffusers import StableDiffusionPipeline",
    ),
    # Pinned, or pip walks back through versions for minutes.
    "optimum": Environment(
        installs=(
            (TORCH,),
            (
                "transformers==4.57.6",
                "diffusers==0.39.0",
                "huggingface_hub==0.36.2",
                "optimum-onnx==0.1.0",
                _onnxruntime(),
            ),
        ),
        imports="from optimum.onnxruntime import ORTStableDiffusionPipeline",
    ),
    "openvino": Environment(installs=((GENAI,),), imports="import openvino_genai"),
    "openvino-convert": Environment(installs=((TORCH,), ("optimum-intel[openvino]==2.2.0", "diffusers", GENAI))),
    "sdcpp": Environment(installs=((SDCPP,),), imports="import stable_diffusion_cpp", compiled=SDCPP),
}
PEERS = {
    "latentrt": Peer(title="latentrt", environment="latentrt"),
    "plain": Peer(title="ONNX Runtime, plain loop", environment="latentrt"),
    "diffusers": Peer(title="diffusers, eager", environment="diffusers"),
    "diffusers-compiled": Peer(title="diffusers, torch.compile", environment="diffusers"),
    "optimum": Peer(title="optimum-onnx", environment="optimum"),
    "openvino": Peer(title="OpenVINO GenAI", environment="openvino", needs=("openvino",), draws="openvino-convert"),
    "openvino-int8": Peer(
        title="OpenVINO GenAI, int8 weights",
        environment="openvino",
        precision="int8 weights",
        needs=("openvino", "openvino-int8"),
        draws="openvino-convert",
    ),
    "sdcpp": Peer(title="stable-diffusion.cpp", environment="sdcpp", precision="fp32, convolutions fp16"),
    "sdcpp-q8": Peer(
        title="stable-diffusion.cpp, q8_0", environment="sdcpp", precision="8-bit linear, convolutions fp16"
    ),
}
MODELS = {
    "sd15": Model(published=True, together=2),
    "turbo": Model(published=True, together=2, steps=1, guidance=1.0, tiny=True),
}
