"""What engines of ONNX Runtime are for: their keys, and what keeps them from running elsewhere."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import msgspec

from latentrt.engines.build_options import BuildOptions, Recipe
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.quantisation import refusal
from latentrt.engines.cuda import gpus
from latentrt.engines.onnxruntime.library import Provider, require
from latentrt.engines.spec import QUANTISED, EngineKey

# On a GPU the sampler's state stays there: the UNet is built as the fused denoise stage, and the VAE reads the state.
FUSED: frozenset[Provider] = frozenset({"cuda"})
# Counts up when what is built of a bundle changes though the bundle does not.
RECIPES: Mapping[Provider, int] = {"cpu": 4, "cuda": 7}
DEFAULT_RECIPE: Recipe = "nhwc"
DEFAULTS = BuildOptions()
INSTRUCTION_SETS = ("avx512f", "avx2", "avx", "asimd")


def key(bundle: Bundle, provider: Provider, options: BuildOptions = DEFAULTS, *, device: int = 0) -> EngineKey:
    """Return the key of the engines that this machine would build for a bundle, on one of its GPUs."""
    chosen = () if provider == "cpu" else (f"kernels {options.recipe or DEFAULT_RECIPE}",)
    rounded = () if options.tf32 is None else (f"{TF32} {options.tf32}",)
    common = {
        "backend": provider,
        "backend_version": require().__version__,
        "graphs": bundle.manifest.graphs_digest(latents=provider in FUSED),
        "options": (f"recipe {RECIPES[provider]}", *chosen, *rounded),
    }
    precision = bundle.manifest.precision
    if reason := refusal(precision, provider):
        raise reason
    if provider == "cpu":
        return EngineKey(device=instruction_set(), precision=precision if precision in QUANTISED else "fp32", **common)
    gpu = gpus.find_gpu(device)
    if gpu is None:
        raise gpus.no_gpu("the backend 'cuda' needs an NVIDIA GPU and none answers here; use --backend cpu")
    return EngineKey(
        device=gpu.name,
        compute_capability=gpu.compute_capability,
        sm_count=gpu.sm_count,
        driver_major=gpu.driver_major,
        precision=precision,
        **common,
    )


TF32 = "tf32"  # as an engine's key says it


def tf32_of(key: EngineKey) -> bool | None:
    """Return what engines were built with, None for what suits each component."""
    return {f"{TF32} True": True, f"{TF32} False": False}.get(key.options[-1])


def mismatches(bundle: Bundle, provider: Provider, there: EngineKey, *, device: int = 0) -> list[str]:
    """Name what keeps engines of a key from running here: not what they were written for, which any machine runs."""
    here = key(bundle, provider, device=device)
    same = here.options[0] in there.options
    return (msgspec.structs.replace(here, options=there.options) if same else here).differences(there)


def instruction_set() -> str:
    """Return the machine and its widest vector instructions, e.g. `x86_64 avx512f`: graphs are laid out for them."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = set()
    widest = next((name for name in INSTRUCTION_SETS if name in flags), "baseline")
    return f"{platform.machine()} {widest}"
