"""TensorRT and TensorRT-RTX, whose Python APIs have one shape: what is here, what it builds for, and building it."""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast

from latentrt.engines import graphs
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import EngineError
from latentrt.engines.gpu import find_gpu
from latentrt.engines.manifest import LatentSpec
from latentrt.engines.options import BuildOptions
from latentrt.engines.progress import Report
from latentrt.engines.references import write_references
from latentrt.engines.spec import DType, Engine, EngineKey, EngineSpec, TensorSpec
from latentrt.engines.stage import fuse_stage
from latentrt.engines.tensorrt_compile import compile_graph

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

Flavor = Literal["tensorrt", "tensorrt-rtx"]

MODULES: dict[Flavor, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),  # the second alone where no shell package is there
}
OLDEST: dict[Flavor, tuple[int, int]] = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 4)}
# Counts up when the graphs that are compiled change though the bundle's do not: the fused stage, the pixel tail.
RECIPE = 3


def require(flavor: Flavor) -> ModuleType:
    """Import the library, or say how to install it. Raises EngineError."""
    install = f"install it with: pip install 'latentrt[{flavor}]'"
    for name in MODULES[flavor]:
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        except Exception as error:  # its shared objects are opened when it is imported
            raise EngineError(f"{name} is installed and does not load ({error}); {install}") from error
        return _recent(library, flavor, install)
    raise EngineError(f"{flavor} is not installed; {install}")


def _recent(library: ModuleType, flavor: Flavor, install: str) -> ModuleType:
    found = tuple(int(part) for part in re.findall(r"\d+", library.__version__)[:2])
    if found < OLDEST[flavor]:
        oldest = ".".join(map(str, OLDEST[flavor]))
        raise EngineError(f"{flavor} {library.__version__} is too old, {oldest} is needed; {install}")
    return library


def cannot_run(flavor: Flavor) -> str | None:
    """Say in one sentence why engines cannot run here, or return None. Asks the driver, never the library."""
    gpu = find_gpu()
    if gpu is None:
        return f"running {flavor} engines needs an NVIDIA GPU and none answers here (is cuda-bindings installed?)"
    return f"this version of latentrt builds {flavor} engines and does not run them yet; use --backend cuda"


def cannot_build(flavor: Flavor, options: BuildOptions) -> str | None:
    """Say in one sentence why engines cannot be built here, or return None. TensorRT-RTX needs no GPU for it."""
    try:
        require(flavor)
    except EngineError as error:
        return str(error)
    here = find_gpu()
    refusals = {
        "tensorrt searches its kernels on the GPU that it builds for, and no NVIDIA GPU answers here; "
        "build there, or use --backend tensorrt-rtx": flavor == "tensorrt" and here is None,
        "tensorrt builds for the GPU at hand: leave --compute-capability away": flavor == "tensorrt"
        and options.compute_capability is not None,
        "no NVIDIA GPU answers here; say what to build for, as in --compute-capability 8.9": here is None
        and options.compute_capability is None,
        "--lean is for tensorrt: tensorrt-rtx has no lean runtime": flavor == "tensorrt-rtx"
        and options.version_compatible,
        "tensorrt-rtx builds --refit and --strip engines only where an NVIDIA GPU answers": here is None
        and (options.refit or options.strip),
    }
    return next((sentence for sentence, applies in refusals.items() if applies), None)


def key(bundle: Bundle, flavor: Flavor, options: BuildOptions) -> EngineKey:
    """Return the key of the engines that these options build. Raises EngineError.

    TensorRT-RTX finishes its engines for the GPU at hand when they are loaded, so its target is a compute
    capability; TensorRT's is one GPU with its driver.
    """
    gpu = find_gpu()
    common = {
        "backend": flavor,
        "backend_version": require(flavor).__version__,
        "precision": bundle.manifest.precision,
        "graphs": bundle.manifest.graphs_digest(),
        "profiles": tuple(map(str, options.profiles(bundle.manifest))),
        "options": (f"recipe {RECIPE}", *options.key_lines()),
    }
    if flavor == "tensorrt-rtx":
        capability = options.compute_capability or (gpu.compute_capability if gpu else None)
        if capability is None:
            raise EngineError("no NVIDIA GPU answers here; say what to build for, as in --compute-capability 8.9")
        return EngineKey(device=f"compute capability {capability}", compute_capability=capability, **common)
    if gpu is None:
        raise EngineError("the backend 'tensorrt' needs an NVIDIA GPU and none answers here; use --backend cpu")
    return EngineKey(
        device=gpu.name,
        compute_capability=gpu.compute_capability,
        sm_count=gpu.sm_count,
        driver_major=gpu.driver_major,
        **common,
    )


def build(
    bundle: Bundle, directory: Path, flavor: Flavor, options: BuildOptions, report: Report
) -> Mapping[str, tuple[str, EngineSpec]]:
    """Compile every component into `directory`, the UNet as the fused denoise stage, the VAE's decoder from the state.

    What each must compute at its sizes is written beside it. Returns {component: (main file, spec)}.
    Raises EngineError with the library's own words, and KeyboardInterrupt after the compiler has stopped.
    """
    library = require(flavor)
    built = {}
    for component in bundle.manifest.components:
        what = f"build {component} ({flavor})"
        report(what, 0, 1)
        built[component] = _build_one(library, bundle, component, directory, flavor, options, report)
        report(what, 1, 1)
    for component, (_, spec) in built.items():
        what = f"references of {component} (cpu)"
        report(what, 0, 1)
        write_references(bundle, spec, directory)
        report(what, 1, 1)
    return built


def _build_one(
    library: ModuleType,
    bundle: Bundle,
    component: str,
    directory: Path,
    flavor: Flavor,
    options: BuildOptions,
    report: Report,
) -> tuple[str, EngineSpec]:
    files = [bundle.path(name) for name in bundle.manifest.components[component].files]
    model = _edit(graphs.load_graph(files[0]), component, options, bundle.manifest.latents)
    spec = _spec(bundle, component, model, options)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".edit-") as beside:
        edited = Path(beside) / "model.onnx"
        edited.write_bytes(model.SerializeToString())
        for data in files[1:]:
            graphs.link_data(data, edited.parent)
        plan = compile_graph(library, edited, spec, options, what=f"build {component} ({flavor})", report=report)
    output = directory / f"{component}.engine"
    output.write_bytes(plan)
    return output.name, spec


def _edit(model: ModelProto, component: str, options: BuildOptions, latents: LatentSpec) -> ModelProto:
    if component == "unet":
        return fuse_stage(model, state_rows=options.state_rows)
    if component == "vae_decoder":
        graphs.prepend_state_head(model, options.state_rows, latents)
        graphs.append_pixel_tail(model)
    return model


def _spec(bundle: Bundle, component: str, model: ModelProto, options: BuildOptions) -> EngineSpec:
    inputs = tuple(_tensor(info) for info in model.graph.input)
    named = {axis for tensor in inputs for axis in tensor.shape if isinstance(axis, str)}
    profiles: list[Mapping[str, int]] = []
    for profile in options.profiles(bundle.manifest):
        axes = profile.axes(component, bundle.manifest.latents.factor)
        if unknown := named - set(axes):
            raise EngineError(
                f"the graph of {component} has axes named {', '.join(sorted(unknown))}, expected some of "
                f"{', '.join(axes)}; export the checkpoint again"
            )
        sizes = {name: size for name, size in axes.items() if name in named}
        if sizes not in profiles:  # the VAE does not see guidance, nor the text encoder a size
            profiles.append(sizes)
    outputs = tuple(_tensor(info) for info in model.graph.output)
    return EngineSpec(component=component, inputs=inputs, outputs=outputs, profiles=tuple(profiles))


def _tensor(info: ValueInfoProto) -> TensorSpec:
    from onnx import helper

    tensor = info.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return TensorSpec(name=info.name, dtype=cast(DType, dtype), shape=shape)


def load(file: Path, spec: EngineSpec, flavor: Flavor) -> Engine:
    """Refuse to open a compiled engine, and say what is missing. Raises EngineError, always for now."""
    raise EngineError(f"{file} cannot be opened here: {cannot_run(flavor)}")
