"""Runs in optimum's own environment: opens graphs with its pipeline, or exports a checkpoint with it.

python optimum_peer.py draw ONNX_DIRECTORY PICTURE.npy
python optimum_peer.py export CHECKPOINT ONNX_DIRECTORY
"""

from __future__ import annotations

import sys


def draw(directory: str, file: str) -> None:
    """Draw the picture that the test draws with diffusers."""
    import numpy as np
    import torch
    from diffusers import DDIMScheduler
    from optimum.onnxruntime import ORTStableDiffusionPipeline  # type: ignore[import-not-found]

    pipe = ORTStableDiffusionPipeline.from_pretrained(directory, provider="CPUExecutionProvider")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    picture = pipe(
        "a red circle",
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
        height=32,
        width=48,
    ).images[0]
    np.save(file, picture)


def export(checkpoint: str, directory: str) -> None:
    """Export a checkpoint as optimum's own command does."""
    from optimum.exporters.onnx import main_export  # type: ignore[import-not-found]

    main_export(checkpoint, directory, task="text-to-image", do_validation=False, no_post_process=True)


if __name__ == "__main__":
    {"draw": draw, "export": export}[sys.argv[1]](*sys.argv[2:])
