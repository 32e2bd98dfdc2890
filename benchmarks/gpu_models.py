"""What the GPU suite measures: the models, and the ways in which backends can be told to build and run them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HALF_TFLOPS = 788.0  # dense, measured on an H200 with random data: for floors where the suite did not measure its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model of the suite.

    tflop: of one pass of the denoiser for one row at `size`
    shape: its name in torch_networks.py; None for no peers
    ours: whether latentrt draws it; exported: whether the suite makes its bundle where --bundles has none
    """

    shape: str | None
    size: int
    steps: int
    guidance: float
    sampler: str
    tflop: float | None
    ours: bool = True
    exported: bool = True

    @property
    def rows(self) -> int:
        return 2 if self.guidance > 1 else 1

    def floor_s(self, tflops: float = HALF_TFLOPS) -> float | None:
        """Return the least seconds of a step: its arithmetic at the tensor cores' rate, in TFLOP/s."""
        return None if self.tflop is None else self.rows * self.tflop / tflops


# tests/test_gpu_suite.py counts the TFLOP again.
MODELS = {
    "demo": Model(shape=None, size=128, steps=20, guidance=3.0, sampler="dpmpp_2m_karras", tflop=None),
    "sd15": Model(shape="sd15", size=512, steps=20, guidance=7.5, sampler="euler", tflop=0.80327),
    "turbo": Model(shape="turbo", size=512, steps=1, guidance=0.0, sampler="euler", tflop=0.80426),
    "sdxl": Model(shape="sdxl", size=1024, steps=20, guidance=7.5, sampler="euler", tflop=6.76124, exported=False),
    "sd35": Model(shape="sd35", size=1024, steps=28, guidance=4.5, sampler="euler", tflop=11.24957, exported=False),
}
TINY = Model(shape="tiny", size=64, steps=2, guidance=7.5, sampler="euler", tflop=None, ours=False)
ALL_MODELS = {**MODELS, "tiny": TINY}


COMPILERS = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to build and open engines on a GPU.

    cuda_graphs: whether kernels are recorded and replayed; None, as by default, they are
    settings: of the CUDA provider, by ONNX Runtime's own names
    options: of `latentrt build`; without any, the default's engines are opened
    backends: it is for these
    """

    cuda_graphs: bool | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    backends: tuple[str, ...] = ("cuda",)

    def facts(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"cuda_graphs": self.cuda_graphs, "settings": dict(self.settings), "options": dict(self.options)}


# The first is what the product does when nothing is said. sdpa_kernel has a bit for each attention kernel.
WAYS: dict[str, Way] = {
    "": Way(),
    "launched": Way(cuda_graphs=False),
    "plain": Way(options={"recipe": "plain"}),
    "fused-bias": Way(settings={"fuse_conv_bias": "1"}),
    "flash": Way(settings={"sdpa_kernel": "1"}),
    "cudnn-attention": Way(settings={"sdpa_kernel": "8"}),
    "tf32-off": Way(settings={"use_tf32": "0"}),
    "heuristic": Way(settings={"cudnn_conv_algo_search": "HEURISTIC"}),
    "efficient": Way(settings={"sdpa_kernel": "2"}),
    "level-5": Way(options={"optimization_level": 5}, backends=COMPILERS),
    "separate-skips": Way(options={"separate_skips": True}, backends=COMPILERS),
    "aux-streams": Way(options={"aux_streams": 2}, backends=COMPILERS),
}
