"""Which of TensorRT's libraries is here, what it can do, and the key of what it builds."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.cuda.gpus import find_gpu, no_gpu
from latentrt.engines.errors import EngineError, NotInstalledError
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.spec import EngineKey
from latentrt.engines.tensorrt.compile import capabilities

if TYPE_CHECKING:
    pass


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
# Counts up when the graphs that are compiled change though the bundle's do not: the fused stage, the pixel tail.
RECIPE = 7


def require(flavor: Flavor) -> ModuleType:
    """Import the library, or say how to install it. Raises EngineError."""
    for name in MODULES[flavor]:
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        except Exception as error:  # its shared objects are opened when it is imported
            raise _lacking(f"{name} is installed and does not load ({error})", flavor) from error
        return _recent(library, flavor)
    raise _lacking(f"{flavor} is not installed", flavor)


def _lacking(sentence: str, flavor: Flavor) -> NotInstalledError:
    return NotInstalledError(sentence, install=f"pip install 'latentrt[{flavor}]'")


def _recent(library: ModuleType, flavor: Flavor) -> ModuleType:
    found = tuple(int(part) for part in re.findall(r"\d+", library.__version__)[:2])
    if found < OLDEST[flavor]:
        oldest = ".".join(map(str, OLDEST[flavor]))
        raise _lacking(f"{flavor} {library.__version__} is too old, {oldest} is needed", flavor)
    return library


def cannot_run(flavor: Flavor) -> EngineError | None:
    """Return the error that says why engines cannot run here, or None. Asks the driver, never the library."""
    if find_gpu() is None:
        return no_gpu(f"running {flavor} engines needs an NVIDIA GPU and none answers here")
    if not runtimes(flavor):
        return _lacking(f"no {flavor} runtime is installed", flavor)
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


def cannot_build(flavor: Flavor, options: BuildOptions) -> EngineError | None:
    """Return the error that says why engines cannot be built here, or None. TensorRT-RTX needs no GPU for it."""
    try:
        library = require(flavor)
    except EngineError as error:
        return error
    here = find_gpu()
    served = capabilities(library) if flavor == "tensorrt-rtx" else []
    target = options.compute_capability or (here.compute_capability if here else None)
    machines = {
        "tensorrt searches its kernels on the GPU that it builds for, and no NVIDIA GPU answers here; "
        "build there, or use --backend tensorrt-rtx": flavor == "tensorrt",
        "no NVIDIA GPU answers here; say what to build for, as in --compute-capability 8.9": target is None,
        "tensorrt-rtx builds --refit engines only where an NVIDIA GPU answers": options.refit,
    }
    refusals = {
        "tensorrt builds for the GPU at hand: omit --compute-capability": flavor == "tensorrt"
        and options.compute_capability is not None,
        "--lean is for tensorrt: tensorrt-rtx has no lean runtime": flavor == "tensorrt-rtx"
        and options.version_compatible,
        "a timing cache changes nothing in tensorrt-rtx's engines, and asks for a GPU: omit --timing-cache; its "
        "kernels are compiled where the engines are loaded": flavor == "tensorrt-rtx"
        and options.timing_cache is not None,
        f"{flavor} {library.__version__} serves no compute capability {target}, it serves {', '.join(served)}": (
            target is not None and served and target not in served
        ),
    }
    if (words := _first(machines)) and here is None:
        return no_gpu(words)
    return EngineError(words) if (words := _first(refusals)) else graphs.unavailable()


def _first(refusals: Mapping[str, object]) -> str:
    return next((sentence for sentence, applies in refusals.items() if applies), "")


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
        raise no_gpu("the backend 'tensorrt' needs an NVIDIA GPU and none answers here; use --backend cpu")
    capability = capability or (gpu.compute_capability if gpu else None)
    if capability is None:
        raise no_gpu("no NVIDIA GPU answers here; say what to build for, as in --compute-capability 8.9")
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
