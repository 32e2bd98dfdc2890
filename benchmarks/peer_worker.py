"""One peer in its own environment: loads a model, then draws whenever its parent asks. Imports nothing of ours but
what is measured.

    python peer_worker.py WAY JOB

JOB is JSON: checkpoint, bundle, cache, tiny, prompt, steps, guidance, sigmas, width, height, batch, threads. It is
asked by lines: `draw`, or `picture FILE` for the first picture of the prompt itself and torch's noise of seed 1, whose
bytes are written there. Answers are JSON lines on what was standard output; whatever a library prints goes to standard
error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

Job = dict[str, Any]


class Drawn(NamedTuple):
    """Seconds of the whole batch, None if there are steps alone; of each step; the batch's pictures, 8 bits."""

    seconds: float | None
    steps: list[float]
    pictures: Any = None


Draw = Callable[[bool], Drawn]  # asked whether the picture is wanted, rather than its time


def latentrt(job: Job) -> Draw:
    from latentrt.runtime.pipeline import Pipeline

    pipe = Pipeline.load(job["bundle"], "cpu", threads=job["threads"])
    fresh = count(1)

    def draw(picture: bool) -> Drawn:
        # texts are remembered, and the others encode theirs each time
        prompt = job["prompt"] if picture else f"{job['prompt']}, {next(fresh)}"
        start = time.perf_counter()
        result = pipe(
            prompt,
            n=job["batch"],
            steps=job["steps"],
            guidance=job["guidance"],
            sampler="euler",
            size=(job["width"], job["height"]),
            seed=1,
            decoder="tiny" if job["tiny"] else "full",
        )
        return Drawn(time.perf_counter() - start, list(result.step_seconds), result.pixels)

    return draw


def plain(job: Job) -> Draw:
    """A loop around the canonical graph as a tutorial writes it: a session, `run`, Euler in NumPy. Steps alone."""
    import numpy as np
    import onnxruntime

    manifest = json.loads((Path(job["bundle"]) / "manifest.json").read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    graph = Path(job["bundle"]) / manifest["components"]["unet"]["files"][0]
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    context = next(taken.shape[2] for taken in session.get_inputs() if taken.name == "encoder_hidden_states")
    generator, batch, factor = np.random.default_rng(0), job["batch"], manifest["latents"]["factor"]
    times = 2 if job["guidance"] > 1 else 1
    text = generator.standard_normal((times * batch, 77, context), dtype=np.float32)
    shape = (batch, manifest["latents"]["channels"], job["height"] // factor, job["width"] // factor)
    sigmas = np.append(np.geomspace(14.6, 0.03, job["steps"]), 0.0).astype(np.float32)
    timesteps = np.linspace(999.0, 1.0, job["steps"])

    def draw(_: bool) -> Drawn:
        x = generator.standard_normal(shape, dtype=np.float32) * 14.6
        marks = [time.perf_counter()]
        for sigma, following, at in zip(sigmas[:-1], sigmas[1:], timesteps, strict=True):
            rows = np.concatenate([x] * times) / np.sqrt(sigma**2 + 1)
            feed = {"sample": rows, "timestep": np.full(len(rows), at, np.float32), "encoder_hidden_states": text}
            output = session.run(None, feed)[0]
            if times == 2:
                output = output[:batch] + job["guidance"] * (output[batch:] - output[:batch])
            x = x + (following - sigma) * output
            marks.append(time.perf_counter())
        return Drawn(None, np.diff(marks).tolist())

    return draw


def diffusers_eager(job: Job) -> Draw:
    pipe = _diffusers(job)
    return _diffusers_draw(pipe, job)


def diffusers_compiled(job: Job) -> Draw:
    import torch

    pipe = _diffusers(job)
    pipe.unet = torch.compile(pipe.unet)
    pipe.vae.decode = torch.compile(pipe.vae.decode)
    return _diffusers_draw(pipe, job)


def _diffusers(job: Job) -> Any:
    import torch
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

    torch.set_num_threads(job["threads"])
    pipe = StableDiffusionPipeline.from_pretrained(
        job["checkpoint"], torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    if job["tiny"]:
        pipe.vae = AutoencoderTiny.from_pretrained(job["tiny"])
    return pipe


def _diffusers_draw(pipe: Any, job: Job) -> Draw:
    """Draw with a pipeline of diffusers' kind: its own, or optimum's."""
    import torch
    from diffusers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def draw(_: bool) -> Drawn:
        marks: list[float] = []

        def mark(*_: Any) -> dict[str, Any]:
            marks.append(time.perf_counter())
            return {}

        start = time.perf_counter()
        pictures = pipe(
            job["prompt"],
            num_images_per_prompt=job["batch"],
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance"],
            width=job["width"],
            height=job["height"],
            generator=torch.Generator().manual_seed(1),
            output_type="np",
            callback_on_step_end=mark,
        ).images
        return Drawn(time.perf_counter() - start, _between(marks), (pictures * 255).round().astype("uint8"))

    return draw


def _between(marks: list[float]) -> list[float]:
    """Return the seconds between marks; the first step, which has no mark before it, is left out."""
    return [after - before for before, after in pairwise(marks)]


def optimum(job: Job) -> Draw:
    import onnxruntime
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    kept = Path(job["cache"]) / "optimum"
    if not (kept / "model_index.json").is_file():
        ORTStableDiffusionPipeline.from_pretrained(job["checkpoint"], export=True).save_pretrained(kept)
    pipe = ORTStableDiffusionPipeline.from_pretrained(
        kept, provider="CPUExecutionProvider", session_options=options, safety_checker=None
    )
    return _diffusers_draw(pipe, job)


def openvino(job: Job) -> Draw:
    return _openvino(job, "openvino")


def openvino_int8(job: Job) -> Draw:
    return _openvino(job, "openvino-int8")


def _openvino(job: Job, folder: str) -> Draw:
    import openvino_genai

    converted = Path(job["cache"]) / folder
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": job["threads"]}
    pipe = openvino_genai.Text2ImagePipeline(converted, "CPU", **properties)
    kind = openvino_genai.Scheduler.Type.EULER_DISCRETE
    pipe.set_scheduler(openvino_genai.Scheduler.from_config(converted / "scheduler/scheduler_config.json", kind))

    def draw(picture: bool) -> Drawn:
        marks: list[float] = []

        def mark(*_: Any) -> bool:
            marks.append(time.perf_counter())
            return False

        # torch's noise takes torch
        noise = {"generator": openvino_genai.TorchGenerator(1)} if picture else {"rng_seed": 1}
        start = time.perf_counter()
        images = pipe.generate(
            job["prompt"],
            num_images_per_prompt=job["batch"],
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance"],
            width=job["width"],
            height=job["height"],
            callback=mark,
            **noise,
        )
        assert images.data.shape[0] == job["batch"]
        return Drawn(time.perf_counter() - start, _between(marks), images.data)

    return draw


def sdcpp(job: Job) -> Draw:
    return _sdcpp(job, "default")


def sdcpp_q8(job: Job) -> Draw:
    return _sdcpp(job, "q8_0")


def _sdcpp(job: Job, weights: str) -> Draw:
    from stable_diffusion_cpp import StableDiffusion

    sigmas = ",".join(f"{sigma:.8g}" for sigma in job["sigmas"]) if job["sigmas"] else None
    tiny = f"{job['tiny']}/diffusion_pytorch_model.safetensors" if job["tiny"] else ""
    model = StableDiffusion(
        model_path=job["checkpoint"],
        taesd_path=tiny,
        vae_decode_only=True,
        n_threads=job["threads"],
        wtype=weights,
        rng_type="cpu",  # torch's noise
        sampler_rng_type="cpu",
        prediction="eps",
        verbose=True,  # it says in its log, and nowhere else, why it cannot load a model
    )
    if not model._model.model:
        sys.exit("it cannot load this model")

    def draw(_: bool) -> Drawn:
        marks: list[float] = []
        start = time.perf_counter()
        images = model.generate_image(
            prompt=job["prompt"],
            batch_count=job["batch"],
            sample_steps=job["steps"],
            sigmas=sigmas,
            cfg_scale=job["guidance"],
            sample_method="euler",
            width=job["width"],
            height=job["height"],
            seed=1,
            progress_callback=lambda *_: marks.append(time.perf_counter()),
        )
        seconds = time.perf_counter() - start
        return Drawn(seconds, _between(marks), [image.convert("RGB") for image in images])

    return draw


WAYS: dict[str, Callable[[Job], Draw]] = {
    "latentrt": latentrt,
    "plain": plain,
    "diffusers": diffusers_eager,
    "diffusers-compiled": diffusers_compiled,
    "optimum": optimum,
    "openvino": openvino,
    "openvino-int8": openvino_int8,
    "sdcpp": sdcpp,
    "sdcpp-q8": sdcpp_q8,
}


def main() -> None:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints does not disturb the answers

    def answer(**facts: Any) -> None:
        channel.write(json.dumps(facts) + "\n")
        channel.flush()

    start = time.perf_counter()
    draw = WAYS[sys.argv[1]](json.loads(sys.argv[2]))
    answer(load_s=time.perf_counter() - start)
    for line in sys.stdin:
        asked, _, file = line.strip().partition(" ")
        drawn = draw(asked == "picture")
        if file:
            Path(file).write_bytes(drawn.pictures[0].tobytes())
        answer(seconds=drawn.seconds, steps=drawn.steps, peak_rss_bytes=_peak_rss())


def _peak_rss() -> int | None:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


if __name__ == "__main__":
    main()
