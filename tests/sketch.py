"""A network that is a formula, so that much can be tried: tanh(sample / 2 + sin(timestep / 10) + mean of the text).

One that can skip layers takes half of what is added to the sample where it does. As canonical engines, as the graphs
that are compiled, and on each kind of workspace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.compare import to_pixels
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import append_pixel_tail, prepend_state_head
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.engines.onnxruntime.workspace import OnnxRuntimeWorkspace
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.engines.tensor_names import SKIP_LAYERS
from latentrt.engines.tensorrt.engines import TensorRTSession, open_tensorrt
from latentrt.engines.workspace.contract import WorkspaceShape, sums_of_squares
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace
from tests.graphs import model_of
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library, write_plan
from tests.studio import DRAWN, Sizes, record_of, session_of, spec_of

SIZE, TOKENS, WIDTH = (3, 2, 3), 4, 2  # latents; the text of a row
CONTEXT = 2  # tokens of one text: a row is two
TEXTS = (1, 3)  # numbers of texts that are compiled
SPACE = LatentSpec(channels=3, factor=1, scaling_factor=0.5)


def shape_for(pictures: int) -> WorkspaceShape:
    return WorkspaceShape(pictures=pictures, tokens=TOKENS, width=SIZE[2], height=SIZE[1])


def unet_graph(*, skips: bool = False) -> Any:
    latents = ["batch", 3, "latent_height", "latent_width"]
    constants = {"axes": np.array([1, 2]), "spread": np.array([-1, 1, 1, 1])}
    numbers = {"half": np.float32(2), "tenth": np.float32(10), "one": np.float32(1)}
    skipping = [
        helper.make_node("Div", [SKIP_LAYERS, "half"], ["less"]),
        helper.make_node("Sub", ["one", "less"], ["share"]),
        helper.make_node("Mul", ["whole", "share"], ["shift"]),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["timestep", "tenth"], ["turns"]),
        helper.make_node("Sin", ["turns"], ["time"]),  # nowhere near the limits of tanh, where all is rounding
        helper.make_node("Add", ["mean", "time"], ["whole"]),
        *(skipping if skips else [helper.make_node("Identity", ["whole"], ["shift"])]),
        helper.make_node("Reshape", ["shift", "spread"], ["shifts"]),
        helper.make_node("Div", ["sample", "half"], ["halves"]),
        helper.make_node("Add", ["halves", "shifts"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["out_sample"]),
    ]
    inputs = {"sample": latents, "timestep": ["batch"], "encoder_hidden_states": ["batch", "tokens", WIDTH]}
    inputs |= {SKIP_LAYERS: ["batch"]} if skips else {}
    return model_of(nodes, inputs, {"out_sample": latents}, constants | numbers)


def vae_graph(state_rows: int) -> Any:
    latents = ["batch", 3, "latent_height", "latent_width"]
    nodes = [helper.make_node("Identity", ["latent_sample"], ["sample"])]
    model = model_of(nodes, {"latent_sample": latents}, {"sample": latents}, {})
    append_pixel_tail(model)
    prepend_state_head(model, state_rows, SPACE)
    return model


def text_graph() -> Any:
    """Each token is its number over ten, and its negative, moved by what is the same for all texts."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "last"], ["column"]),
        helper.make_node("Mul", ["column", "signs"], ["apart"]),
        helper.make_node("Add", ["apart", "shift"], ["last_hidden_state"]),
    ]
    constants = {"last": np.array([2]), "signs": np.array([0.1, -0.1], dtype=np.float32)}
    inputs, outputs = (
        {"input_ids": ["batch", CONTEXT], "shift": [1, WIDTH]},
        {"last_hidden_state": ["batch", CONTEXT, WIDTH]},
    )
    return model_of(nodes, inputs, outputs, constants, types={"input_ids": TensorProto.INT64})


def text(inputs: Any) -> dict[str, Array]:
    apart = inputs["input_ids"][..., None].astype(np.float32) * np.float32([0.1, -0.1])
    return {"last_hidden_state": apart + inputs["shift"]}


def unet(inputs: Any) -> dict[str, Array]:
    shift = inputs["encoder_hidden_states"].mean(axis=(1, 2)) + np.sin(inputs["timestep"] / 10)
    return {"out_sample": np.tanh(inputs["sample"] / 2 + shift.reshape(-1, 1, 1, 1))}


def skipping_unet(inputs: Any) -> dict[str, Array]:
    shift = inputs["encoder_hidden_states"].mean(axis=(1, 2)) + np.sin(inputs["timestep"] / 10)
    shift = shift * (1 - inputs[SKIP_LAYERS] / 2)
    return {"out_sample": np.tanh(inputs["sample"] / 2 + shift.reshape(-1, 1, 1, 1))}


def takes(*names: str) -> SimpleNamespace:
    return SimpleNamespace(inputs=[SimpleNamespace(name=name) for name in names])


text.spec = takes("input_ids", "shift")  # type: ignore[attr-defined]
unet.spec = takes("sample", "timestep", "encoder_hidden_states")  # type: ignore[attr-defined]
skipping_unet.spec = takes("sample", "timestep", "encoder_hidden_states", SKIP_LAYERS)  # type: ignore[attr-defined]


def vae(inputs: Any) -> dict[str, Array]:
    sums = sums_of_squares(inputs["latent_sample"])
    return {"pixels": to_pixels(inputs["latent_sample"]), "squares": np.stack([sums, sums], axis=1)}


# What a workspace asks of an engine beside calling it.
vae.spec = EngineSpec(  # type: ignore[attr-defined]
    component="vae_decoder", inputs=(TensorSpec(name="latent_sample", dtype="float32", shape=()),), outputs=()
)


def numpy_workspace(pictures: int, state_rows: int, *, skips: bool = False) -> NumpyWorkspace:
    engines: Any = {"unet": skipping_unet if skips else unet, "vae_decoder": vae, "text_encoder": text}
    return NumpyWorkspace(engines, SPACE, shape_for(pictures), state_rows=state_rows, **DRAWN)


def graphs(state_rows: int, *, skips: bool) -> dict[str, Any]:
    """What is compiled."""
    return {
        "unet": fuse_stage(unet_graph(skips=skips), state_rows=state_rows),
        "vae_decoder": vae_graph(state_rows),
        "text_encoder": text_graph(),
    }


def bound_workspace(pictures: int, state_rows: int, *, skips: bool = False) -> OnnxRuntimeWorkspace:
    """A workspace on ONNX Runtime's bound buffers."""
    engines = {
        name: OnnxRuntimeEngine(session_of(model), spec_of(model, name, []))
        for name, model in graphs(state_rows, skips=skips).items()
    }
    workspace = OnnxRuntimeWorkspace(engines, SPACE, shape_for(pictures), device="cpu", denoiser="unet")
    workspace.reset(decoder="vae_decoder")
    return workspace


@contextmanager
def compiled(
    directory: Path, state_rows: int, rows: Mapping[int, Sequence[int]], *, skips: bool = False
) -> Iterator[dict[bool, TensorRTSession]]:
    """Sessions of the stand-in with graphs and without, each with fewer slots than most plans have stages.

    rows: the numbers of model rows that are compiled for each number of pictures
    """
    directory.mkdir(parents=True)
    latents = {"latent_height": SIZE[1], "latent_width": SIZE[2]}
    profiles: dict[str, list[Sizes]] = {
        "unet": [{"pictures": p, "rows": m, "tokens": TOKENS, **latents} for p, counts in rows.items() for m in counts],
        "vae_decoder": [{"pictures": p, **latents} for p in rows],
        "text_encoder": [{"batch": texts} for texts in TEXTS],
    }
    models = graphs(state_rows, skips=skips)
    record = record_of({name: spec_of(model, name, profiles[name]) for name, model in models.items()})
    for name, model in models.items():
        write_plan(directory / f"{name}.engine", model, record.specs[name])
    device = HostDevice()
    opened = {
        graphs: open_tensorrt(make_library(device), directory, record, device, factor=1, graphs=graphs, slots=2)
        for graphs in (True, False)
    }
    yield opened
    for session in opened.values():
        session.close()
    assert device.leftovers() == {}
