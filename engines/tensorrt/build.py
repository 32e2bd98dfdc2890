"""TensorRT and TensorRT-RTX, whose Python APIs have one shape: what is here, what it builds for, and building it."""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast

from latentrt.engines.build_options import BuildOptions, Profile
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import EngineRecord, LatentSpec
from latentrt.engines.bundle.weight_map import GraphWeights, built_record, read_weights, write_weights
from latentrt.engines.canvas.contract import DECODER, DECODERS, DENOISERS, UNET, Canvas, CanvasShape
from latentrt.engines.cuda.device import CudaDevice, find_gpu
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.graphs.controlnet_stage import fuse_control
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.locate_weights import GraphValues, own_places
from latentrt.engines.lora.weight_changes import Adaptable, Changes
from latentrt.engines.progress import Report
from latentrt.engines.spec import DType, Engine, EngineKey, EngineSpec, TensorSpec
from latentrt.engines.tensor_names import PREFIX
from latentrt.engines.tensorrt.compile import capabilities, compile_graph
from latentrt.engines.tensorrt.engine import in_portions
from latentrt.engines.tensorrt.engines import Refits, TensorRTSession, open_tensorrt
from latentrt.engines.verify.references import unavailable as references_unavailable
from latentrt.engines.verify.references import write_references

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

Flavor = Literal["tensorrt", "tensorrt-rtx"]

MODULES: dict[Flavor, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),  # the second alone where no shell package is there
}
# What runs engines, the first that is installed in the version that built them. The lean runtime (44 MB) runs those
# that were built with --lean, and is the one to prefer for them.
LEAN = "version compatible True"
RUNTIMES: dict[Flavor, tuple[tuple[str, str | None], ...]] = {  # (module, option that the engines must have)
    "tensorrt": (("tensorrt_lean", LEAN), ("tensorrt", None)),
    "tensorrt-rtx": (("tensorrt_rtx", None), ("tensorrt_rtx_bindings", None)),
}
OLDEST: dict[Flavor, tuple[int, int]] = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 4)}
TOKENS = "input_ids"  # what text encoders take
# Counts up when the graphs that are compiled change though the bundle's do not: the fused stage, the pixel tail.
RECIPE = 6
# Rows of the input that learned words are looked up in: a handful of embeddings of the longest kind.
LEARNED_TOKENS = 64


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
    if find_gpu() is None:
        return f"running {flavor} engines needs an NVIDIA GPU and none answers here (is cuda-bindings installed?)"
    if not runtimes(flavor):
        return f"no {flavor} runtime is installed; install it with: pip install 'latentrt[{flavor}]'"
    return None


def runtimes(flavor: Flavor) -> list[ModuleType]:
    """Import what is installed here that runs engines."""
    found = []
    for name, _ in RUNTIMES[flavor]:
        try:
            found.append(importlib.import_module(name))
        except Exception:  # ImportError, and what is raised where shared objects are missing: `require` says which
            continue
    return found


def runtime_of(flavor: Flavor, key: EngineKey) -> ModuleType | None:
    """Return the installed runtime that runs engines of this key, None where there is none.

    Versions must be equal. TensorRT-RTX promises nothing else; and a TensorRT plan that leaves its lean runtime out,
    as --lean does, is run by the lean runtime of the version that built it (NvInferRuntime.h, loadRuntime). One that
    brings its own would run on later versions, and would run code out of the bundle: we build none.
    """
    options = dict(RUNTIMES[flavor])
    for library in runtimes(flavor):
        needed = options[library.__name__]
        if library.__version__ == key.backend_version and (needed is None or needed in key.options):
            return library
    return None


def mismatches(bundle: Bundle, flavor: Flavor, there: EngineKey) -> list[str]:
    """Name what keeps engines of a key from running here, as `field: ours here, theirs there`; empty where nothing."""
    here = _key(bundle, flavor, there.backend_version, options=there.options, profiles=there.profiles)
    found = here.differences(there)
    recipe = next((line for line in there.options if line.startswith("recipe ")), "recipe 0")
    if recipe != f"recipe {RECIPE}":
        found.append(f"recipe: {RECIPE} here, {recipe.removeprefix('recipe ')} there")
    if runtime_of(flavor, there) is None:
        installed = " and ".join(f"{library.__name__} {library.__version__}" for library in runtimes(flavor))
        found.append(f"backend_version: {installed or 'none'} here, {there.backend_version} there")
    return found


def cannot_build(flavor: Flavor, options: BuildOptions) -> str | None:
    """Say in one sentence why engines cannot be built here, or return None. TensorRT-RTX needs no GPU for it."""
    try:
        library = require(flavor)
    except EngineError as error:
        return str(error)
    here = find_gpu()
    served = capabilities(library) if flavor == "tensorrt-rtx" else []
    target = options.compute_capability or (here.compute_capability if here else None)
    refusals = {
        "tensorrt searches its kernels on the GPU that it builds for, and no NVIDIA GPU answers here; "
        "build there, or use --backend tensorrt-rtx": flavor == "tensorrt" and here is None,
        "tensorrt builds for the GPU at hand: leave --compute-capability away": flavor == "tensorrt"
        and options.compute_capability is not None,
        "no NVIDIA GPU answers here; say what to build for, as in --compute-capability 8.9": here is None
        and options.compute_capability is None,
        "--lean is for tensorrt: tensorrt-rtx has no lean runtime": flavor == "tensorrt-rtx"
        and options.version_compatible,
        "a timing cache changes nothing in tensorrt-rtx's engines, and asks for a GPU: leave --timing-cache away; its "
        "kernels are compiled where the engines are loaded": flavor == "tensorrt-rtx"
        and options.timing_cache is not None,
        "tensorrt-rtx builds --refit and --strip engines only where an NVIDIA GPU answers": here is None
        and (options.refit or options.strip),
        f"{flavor} {library.__version__} serves no compute capability {target}, it serves {', '.join(served)}": (
            target is not None and served and target not in served
        ),
    }
    found = next((sentence for sentence, applies in refusals.items() if applies), None)
    return found or graphs.unavailable() or (references_unavailable() if options.references else None)


def key(bundle: Bundle, flavor: Flavor, options: BuildOptions) -> EngineKey:
    """Return the key of the engines that these options build. Raises EngineError."""
    return _key(
        bundle,
        flavor,
        _version(flavor, options),
        capability=options.compute_capability,
        profiles=tuple(map(str, options.profiles(bundle.manifest))),
        options=(f"recipe {RECIPE}", *options.key_lines()),
    )


def _version(flavor: Flavor, options: BuildOptions) -> str:
    """Return the builder's version; where only a runtime is installed its own, for engines that come from a store."""
    try:
        return str(require(flavor).__version__)
    except EngineError:
        needed = dict(RUNTIMES[flavor])
        for library in runtimes(flavor):
            if needed[library.__name__] in (None, *options.key_lines()):
                return str(library.__version__)
        raise


def _key(
    bundle: Bundle,
    flavor: Flavor,
    version: str,
    *,
    profiles: tuple[str, ...],
    options: tuple[str, ...],
    capability: str | None = None,
) -> EngineKey:
    """Return a key for the GPU at hand.

    TensorRT-RTX finishes its engines for the GPU that loads them, so its target is a compute capability; TensorRT's
    is one GPU with its driver.
    """
    gpu = find_gpu()
    if gpu is None and flavor == "tensorrt":
        raise EngineError("the backend 'tensorrt' needs an NVIDIA GPU and none answers here; use --backend cpu")
    capability = capability or (gpu.compute_capability if gpu else None)
    if capability is None:
        raise EngineError("no NVIDIA GPU answers here; say what to build for, as in --compute-capability 8.9")
    own = gpu if flavor == "tensorrt" else None
    return EngineKey(
        backend=flavor,
        backend_version=version,
        device=own.name if own else f"compute capability {capability}",
        compute_capability=capability,
        sm_count=own.sm_count if own else None,
        driver_major=own.driver_major if own else None,
        precision=bundle.manifest.precision,
        graphs=bundle.manifest.graphs_digest(latents=True),
        profiles=profiles,
        options=options,
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
    for component, (_, spec) in built.items() if options.references else ():
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
    if options.refit:
        _note_weights(bundle, component, directory)
    model = _edit(graphs.load_graph(files[0]), component, options, bundle.manifest.latents)
    spec = spec_of(component, model, options.profiles(bundle.manifest), factor=bundle.manifest.latents.factor)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".edit-") as beside:
        edited = Path(beside) / "model.onnx"
        edited.write_bytes(model.SerializeToString())
        for data in files[1:]:
            graphs.link_data(data, edited.parent)
        plan = compile_graph(library, edited, spec, options, what=f"build {component} ({flavor})", report=report)
    output = directory / f"{component}.engine"
    output.write_bytes(plan)
    return output.name, spec


def _note_weights(bundle: Bundle, component: str, directory: Path) -> None:
    """Write down where the weights of a component lie in the bundle, for when they are changed."""
    spec = bundle.manifest.components[component]
    if spec.weights is not None:
        known = read_weights(bundle.path(spec.weights), GraphWeights)
        graph = bundle.path(spec.graph)
        values = GraphValues(graphs.load_graph(graph), graph)
        folder = PurePosixPath(spec.graph).parent.as_posix()
        write_weights(directory / built_record(component), own_places(known, values, folder))


def _edit(model: ModelProto, component: str, options: BuildOptions, latents: LatentSpec) -> ModelProto:
    if component in DENOISERS:
        return fuse_stage(model, state_rows=options.state_rows)
    if component.startswith(PREFIX):
        return fuse_control(model, state_rows=options.state_rows)
    if component in DECODERS:
        graphs.append_pixel_tail(model)
        graphs.prepend_state_head(model, options.state_rows, latents)
    graphs.append_embedding_input(model, rows=LEARNED_TOKENS)
    return model


def spec_of(component: str, model: ModelProto, profiles: Iterable[Profile], *, factor: int) -> EngineSpec:
    """Return what the engine of a graph takes and gives, with the sizes of its axes in each profile.

    factor: how many pixels an element of the latents is wide
    Raises EngineError where the graph names an axis that no profile has a size for.
    """
    inputs = tuple(_tensor(info) for info in model.graph.input)
    named = {axis for tensor in inputs for axis in tensor.shape if isinstance(axis, str)}
    found: list[Mapping[str, int]] = []
    for profile in profiles:
        axes = profile.axes(factor)
        if TOKENS in {tensor.name for tensor in inputs}:  # a long prompt is several rows of the text encoder
            axes["batch"] = profile.rows * max(1, profile.tokens // int(inputs[0].shape[1]))
        if unknown := named - set(axes):
            raise EngineError(
                f"the graph of {component} has axes named {', '.join(sorted(unknown))}, expected some of "
                f"{', '.join(axes)}; export the checkpoint again"
            )
        sizes = {name: size for name, size in axes.items() if name in named}
        if sizes not in found:  # the VAE does not see guidance, nor the text encoder a size
            found.append(sizes)
    outputs = tuple(_tensor(info) for info in model.graph.output)
    return EngineSpec(component=component, inputs=inputs, outputs=outputs, profiles=tuple(found))


def _tensor(info: ValueInfoProto) -> TensorSpec:
    from onnx import helper

    tensor = info.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return TensorSpec(name=info.name, dtype=cast(DType, dtype), shape=shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDevice:
    """Engines that share one device's stream and scratch memory. It implements `backends.Opened`."""

    engines: dict[str, Engine]
    session: TensorRTSession
    refits: Refits

    def adapt(self, changes: Mapping[str, Changes]) -> None:
        """Change the weights of components, from the base's always. Raises EngineError."""
        self.refits.adapt(changes, tuple(self.engines))

    def canvas(
        self, shape: CanvasShape, *, state_rows: int, denoiser: str = UNET, decoder: str | None = DECODER
    ) -> Canvas:
        """Return the canvas of a shape and a denoiser: the same one every time, blank. Raises EngineError."""
        return self.session.canvas(shape, denoiser=denoiser, decoder=decoder)

    def close(self) -> None:
        """Wait for the device and free everything."""
        self.session.close()


def open_engines(
    bundle: Bundle,
    directory: Path,
    record: EngineRecord,
    components: tuple[str, ...],
    flavor: Flavor,
    *,
    graphs: bool = True,
) -> OnDevice:
    """Open engines on the first GPU; graphs: whether passes are recorded. Raises EngineError and BundleError."""
    reason = cannot_run(flavor)
    library = None if reason else runtime_of(flavor, record.key)
    if library is None:
        words = reason or "; ".join(mismatches(bundle, flavor, record.key))
        raise EngineError(f"the engines in {directory} cannot be opened here: {words}")
    if "strip True" in record.key.options:
        raise EngineError(
            f"the engines in {directory} were built with --strip, and this version of latentrt does not put weights "
            "into engines; build them without it"
        )
    factor = bundle.manifest.latents.factor
    session = open_tensorrt(
        library, directory, record, CudaDevice(), factor=factor, components=components, graphs=graphs
    )
    command = f"latentrt build {bundle.root} --backend {flavor} --refittable"
    weights = Adaptable(record=record, directory=directory, files=bundle.root, command=command)
    engines = {name: in_portions(session.engine(name)) for name in components}
    return OnDevice(engines=engines, session=session, refits=Refits(session, weights))
