"""Which of TensorRT's libraries is here, what it can do, and the key of what it builds."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Literal

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.quantisation import refusal
from latentrt.engines.cuda import gpus
from latentrt.engines.errors import EngineError, NotInstalledError
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.spec import QUANTISED, EngineKey
from latentrt.engines.tensorrt.compile import capabilities

Flavor = Literal["tensorrt", "tensorrt-rtx"]
Library = Literal["tensorrt", "tensorrt-lean", "tensorrt-rtx"]

# The modules of each library. NVIDIA's wheels hold the second; the first is that of a package around it, which for all
# but TensorRT is on PyPI as a source archive alone, and that of the wheels in TensorRT's own archive.
MODULES: dict[Library, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-lean": ("tensorrt_lean", "tensorrt_lean_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
# What runs engines, the first that is installed in the version that built them. The lean runtime (44 MB) runs those
# that were built with --lean, and is the one to prefer for them.
LEAN = "version compatible True"
RUNTIMES: dict[Flavor, tuple[tuple[Library, str | None], ...]] = {  # (library, option that the engines must have)
    "tensorrt": (("tensorrt-lean", LEAN), ("tensorrt", None)),
    "tensorrt-rtx": (("tensorrt-rtx", None),),
}
# TensorRT's parser knows the operator Attention, which our graphs have, from 10.14 on.
OLDEST: dict[Flavor, tuple[int, ...]] = {"tensorrt": (10, 14, 1), "tensorrt-rtx": (1, 4)}
# Counts up when the graphs that are compiled change though the bundle's do not: the fused stage, the pixel tail.
RECIPE = 10


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
    found = tuple(int(part) for part in re.findall(r"\d+", library.__version__)[: len(OLDEST[flavor])])
    if found < OLDEST[flavor]:
        oldest = ".".join(map(str, OLDEST[flavor]))
        raise _lacking(f"{flavor} {library.__version__} is too old, {oldest} is needed", flavor)
    return library


def version_of(library: ModuleType) -> str:
    """Return a library's own version, without the number of its packaging: `10.14.1.48` for `10.14.1.48.post1`."""
    return str(library.__version__).partition(".post")[0]


def cannot_run(flavor: Flavor, *, device: int = 0) -> EngineError | None:
    """Return the error that says why engines cannot run on a GPU, or None. Asks the driver, never the library."""
    lacking = gpus.lacks_gpu(device, f"running {flavor} engines needs an NVIDIA GPU and none answers here")
    if lacking is not None:
        return lacking
    if not runtimes(flavor):
        return _lacking(f"no {flavor} runtime is installed", flavor)
    return None


def runtimes(flavor: Flavor) -> list[tuple[ModuleType, str | None]]:
    """Import what is installed here that runs engines, each with the option that they must have, or None."""
    found = ((_installed(MODULES[name]), option) for name, option in RUNTIMES[flavor])
    return [(library, option) for library, option in found if library is not None]


def _installed(names: tuple[str, ...]) -> ModuleType | None:
    for name in names:
        # ImportError, and what is raised where shared objects are missing: `require` says which
        with contextlib.suppress(Exception):
            return importlib.import_module(name)
    return None


def runtime_of(flavor: Flavor, key: EngineKey) -> ModuleType | None:
    """Return the installed runtime that runs engines of this key, None where there is none.

    Versions must be equal. TensorRT-RTX promises nothing else; and a TensorRT plan that leaves its lean runtime out,
    as --lean does, is run by the lean runtime of the version that built it (NvInferRuntime.h, loadRuntime). One that
    brings its own would run on later versions, and would run code out of the bundle: we build none.
    """
    for library, needed in runtimes(flavor):
        if version_of(library) == key.backend_version and needed in (None, *key.options):
            return library
    return None


def mismatches(bundle: Bundle, flavor: Flavor, there: EngineKey, *, device: int = 0) -> list[str]:
    """Name what keeps engines from running on a GPU, as `field: ours here, theirs there`; empty where nothing."""
    here = _key(bundle, flavor, there.backend_version, device, options=there.options, profiles=there.profiles)
    found = here.differences(there)
    recipe = next((line for line in there.options if line.startswith("recipe ")), "recipe 0")
    if recipe != f"recipe {RECIPE}":
        found.append(f"recipe: {RECIPE} here, {recipe.removeprefix('recipe ')} there")
    if runtime_of(flavor, there) is None:
        installed = " and ".join(f"{library.__name__} {version_of(library)}" for library, _ in runtimes(flavor))
        found.append(f"backend_version: {installed or 'none'} here, {there.backend_version} there")
    return found


def cannot_build(flavor: Flavor, options: BuildOptions, *, device: int = 0) -> EngineError | None:
    """Return the error that says why engines cannot be built here, or None. TensorRT-RTX needs no GPU for it."""
    try:
        library, here = require(flavor), gpus.find_gpu(device)
    except EngineError as error:
        return error
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
        "--lean with --refittable has been tried on no GPU yet: omit one of them": options.version_compatible
        and options.refit,
        f"{flavor} {library.__version__} serves no compute capability {target}, it serves {', '.join(served)}": (
            target is not None and served and target not in served
        ),
    }
    if (words := _first(machines)) and here is None:
        return gpus.no_gpu(words)
    return EngineError(words) if (words := _first(refusals)) else graphs.unavailable()


def _first(refusals: Mapping[str, object]) -> str:
    return next((sentence for sentence, applies in refusals.items() if applies), "")


def key(bundle: Bundle, flavor: Flavor, options: BuildOptions, *, device: int = 0) -> EngineKey:
    """Return the key of the engines that these options build for a GPU. Raises EngineError."""
    precision = bundle.manifest.precision
    if options.refit and precision in QUANTISED:
        raise EngineError(f"the weights of a bundle in {precision} cannot be changed later: omit --refittable")
    return _key(
        bundle,
        flavor,
        _version(flavor, options),
        device,
        capability=options.compute_capability,
        profiles=tuple(map(str, options.profiles(bundle.manifest))),
        options=(f"recipe {RECIPE}", *options.key_lines()),
    )


def _version(flavor: Flavor, options: BuildOptions) -> str:
    """Return the builder's version; where only a runtime is installed its own, for engines that come from a store."""
    try:
        return version_of(require(flavor))
    except EngineError:
        for library, needed in runtimes(flavor):
            if needed in (None, *options.key_lines()):
                return version_of(library)
        raise


def _key(
    bundle: Bundle,
    flavor: Flavor,
    version: str,
    device: int,
    *,
    profiles: tuple[str, ...],
    options: tuple[str, ...],
    capability: str | None = None,
) -> EngineKey:
    """Return a key for a GPU at hand.

    TensorRT-RTX finishes its engines for the GPU that loads them, so its target is a compute capability; TensorRT's
    is one GPU with its driver.
    """
    gpu = gpus.find_gpu(device)
    if gpu is None and flavor == "tensorrt":
        raise gpus.no_gpu("the backend 'tensorrt' needs an NVIDIA GPU and none answers here; use --backend cpu")
    capability = capability or (gpu.compute_capability if gpu else None)
    if capability is None:
        raise gpus.no_gpu("no NVIDIA GPU answers here; say what to build for, as in --compute-capability 8.9")
    if reason := refusal(bundle.manifest.precision, flavor, capability):
        raise reason
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
