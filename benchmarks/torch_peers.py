"""What torch alone reaches on the same shapes: a denoising loop, eager or compiled, and diffusers' pipeline.

Weights are random, of torch's own making: speed does not depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_probes import kernel_times
from torch_networks import make_denoiser, sizes_of

from latentrt.runtime.bench.cold import measured
from latentrt.runtime.bench.rounds import warm_up

GUIDANCE = 7.5
PROMPT = "a large red circle on a striped blue background"


def recorded(module: Any, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """Return a module that replays a CUDA graph of itself, recorded for inputs of these shapes."""
    fixed = tuple(None if each is None else each.clone() for each in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(*fixed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(*fixed)

    def replay(*given: Any) -> Any:
        for place, each in zip(fixed, given, strict=True):
            if place is not None:
                place.copy_(each)
        graph.replay()
        return output

    return replay


# `reduce-overhead` is torch's name for CUDA graphs.
COMPILERS: dict[str, Callable[[Any, tuple[Any, ...]], Any]] = {
    "eager": lambda module, _: module,
    "recorded": recorded,
    "compiled": lambda module, _: torch.compile(module, mode="reduce-overhead", fullgraph=True),
}


def loop_seconds(
    shape: str, how: str, *, side: int, guided: bool, steps: int, device: str, most_seconds: float
) -> Iterator[dict[str, Any]]:
    """Time a denoising loop around a denoiser in torch. Yields the figures so far: after warming up, and at the end.

    Euler with classifier-free guidance as two rows, in float16 on a GPU and float32 on a CPU, channels last. The
    clock runs from the first step to the finished latents, with one wait at the end. The last figures have the
    kernels of one pass, where there is a GPU.
    """
    with torch.device(device), torch.inference_mode():
        draw, evaluate = _loop(shape, how, side=side, guided=guided, steps=steps, device=device)
        for figures in _timed(draw, steps, device, most_seconds):
            yield figures
        if device == "cuda" and how == "eager":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                evaluate()
                wait(device)
            yield {**figures, "pass": kernel_times(profiler)}


def _loop(
    shape: str, how: str, *, side: int, guided: bool, steps: int, device: str
) -> tuple[Callable[[], float], Callable[[], Any]]:
    """Return what draws a picture's latents and tells the seconds, and what runs the denoiser once."""
    dtype, sizes, rows = _dtype(device), sizes_of(shape), 2 if guided else 1
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # the fastest of its convolutions, found while warming up
    denoiser = make_denoiser(shape).to(dtype).eval().to(memory_format=torch.channels_last)
    text = torch.randn(rows, sizes.tokens, sizes.width, dtype=dtype)
    pooled = torch.randn(rows, sizes.pooled, dtype=dtype) if sizes.pooled else None
    sigmas = torch.linspace(14.6, 0.0, steps + 1).tolist()
    times = torch.linspace(999, 1, steps).tolist()
    taken = torch.randn(rows, sizes.channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    run = COMPILERS[how](denoiser, (taken, torch.full((rows,), 1.0), text, pooled))

    def draw() -> float:
        x = torch.randn(1, sizes.channels, side, side, dtype=torch.float32) * sigmas[0]
        wait(device)
        start = time.perf_counter()
        for sigma, following, at in zip(sigmas[:-1], sigmas[1:], times, strict=True):
            taken = (x / (sigma**2 + 1) ** 0.5).to(dtype).expand(rows, -1, -1, -1)
            taken = taken.contiguous(memory_format=torch.channels_last)
            if how == "compiled":
                torch.compiler.cudagraph_mark_step_begin()
            output = run(taken, torch.full((rows,), at), text, pooled).float()
            x = x + (following - sigma) * (output[:1] + GUIDANCE * (output[1:] - output[:1]) if guided else output)
        wait(device)
        return time.perf_counter() - start

    return draw, lambda: run(taken, torch.full((rows,), 1.0), text, pooled)


def _dtype(device: str) -> torch.dtype:
    if device == "cuda":
        return torch.float16
    torch.set_num_threads(1)  # a rehearsal: its times mean nothing, and waiting threads would slow other work
    return torch.float32


def wait(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(draw: Callable[[], float], steps: int, device: str, most_seconds: float) -> Iterator[dict[str, Any]]:
    start = time.perf_counter()
    first = draw()
    warmup = warm_up(draw, most_seconds=most_seconds / 2)
    figures = {"first_s": first, "steady": warmup.steady, "steps": steps}
    yield {**figures, "step_s": _summary([seconds / steps for seconds in warmup.seconds])}
    samples: list[float] = []
    while len(samples) < 30 and (len(samples) < 3 or time.perf_counter() - start < most_seconds):
        samples.append(draw() / steps)
    memory = torch.cuda.max_memory_reserved() if device == "cuda" else None
    yield {**figures, "step_s": _summary(samples), "device_bytes": memory}


def _summary(samples: list[float]) -> dict[str, Any]:
    whole = measured(samples)
    summary = {name: getattr(whole.summary, name) for name in ("count", "p50", "p95", "median_low", "median_high")}
    return {**summary, "samples": samples}


def diffusers_seconds(
    shape: str, how: str, *, size: int, guided: bool, steps: int, device: str, most_seconds: float
) -> Iterator[dict[str, Any]]:
    """Time diffusers' own pipeline with random weights, from prompt to picture. Yields the figures so far."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from random_checkpoint import DEMO, make_networks
    from transformers import CLIPTokenizer

    dtype = _dtype(device)
    torch.manual_seed(0)
    with torch.device(device):
        text_encoder, unet, vae = (network.to(dtype).eval() for network in make_networks(shape))
    assert isinstance(unet, UNet2DConditionModel) and isinstance(vae, AutoencoderKL)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(DEMO / "tokenizer"),
        unet=unet.to(memory_format=torch.channels_last),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.unet, pipe.vae.decoder = COMPILERS[how](pipe.unet, ()), COMPILERS[how](pipe.vae.decoder, ())
    pipe.set_progress_bar_config(disable=True)

    def draw() -> float:
        wait(device)
        start = time.perf_counter()
        pipe(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE if guided else 0.0,
            width=size,
            height=size,
            generator=torch.Generator(device).manual_seed(0),
            output_type="np",
        )
        wait(device)
        return time.perf_counter() - start

    for figures in _timed(draw, 1, device, most_seconds):
        yield {**{key: value for key, value in figures.items() if key != "step_s"}, "picture_s": figures["step_s"]}


def ceilings(device: str, *, size: int = 8192, copy_bytes: int = 4 << 30) -> Iterator[dict[str, float]]:
    """Measure what the device reaches: products of random matrices by kind of number, and copies. Yields what is known.

    In 8 bits where torch has them for the device, with sums in float32 or int32.

    Copies count the bytes that are read and those that are written.
    """
    found: dict[str, float] = {}
    with torch.device(device), torch.inference_mode():
        for kind in (torch.float16, torch.bfloat16, torch.float32):
            a, b = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
            torch.backends.cuda.matmul.allow_tf32 = True
            name = {torch.float16: "tflops", torch.bfloat16: "bf16_tflops", torch.float32: "tf32_tflops"}[kind]
            found[name] = 2 * size**3 / _best(partial(torch.matmul, a, b), device) / 1e12
            yield found
        source = torch.zeros(copy_bytes, dtype=torch.uint8)
        target = torch.empty_like(source)
        found["bytes_per_s"] = 2 * copy_bytes / _best(lambda: target.copy_(source), device)
        yield found
        for name, product in _eight_bit(size).items():
            try:
                found[name] = 2 * size**3 / _best(product, device) / 1e12
            except (RuntimeError, NotImplementedError) as error:  # a device without such numbers
                found[f"{name}_missing"] = str(error).splitlines()[0]
            yield found


def _eight_bit(size: int) -> dict[str, Callable[[], Any]]:
    """Return products of random matrices in 8 bits, by what is measured."""
    a, b = (torch.randn(size, size) for _ in range(2))
    small = [matrix.to(torch.float8_e4m3fn) for matrix in (a, b)]
    whole = [(32 * matrix).clamp(-127, 127).to(torch.int8) for matrix in (a, b)]
    one = torch.ones(())

    def fp8() -> Any:
        return torch._scaled_mm(small[0], small[1].t(), scale_a=one, scale_b=one, out_dtype=torch.float16)

    return {"fp8_tflops": fp8, "int8_tops": lambda: torch._int_mm(whole[0], whole[1].t())}


def _best(work: Callable[[], Any], device: str) -> float:
    """Return the least seconds that some work took: what a device reaches, whatever its clock did in between."""
    seconds = []
    for _ in range(20 if device == "cuda" else 5):
        wait(device)
        start = time.perf_counter()
        for _ in range(5):
            work()
        wait(device)
        seconds.append((time.perf_counter() - start) / 5)
    return min(seconds)
