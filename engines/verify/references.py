"""What engines must compute: the checkpoint's recorded pairs, and a row for each shape of engines with fixed shapes.

A golden pair has the sizes at which the checkpoint was traced, which an engine compiled for 1024x1024 does not take.
So where such engines are built, each component's canonical graph is run once for each of their sizes, in float32 on
the CPU, and the rows go into the engines' directory: `latentrt verify` compares every profile with them anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from latentrt.engines.bundle.files import Bundle, check_file
from latentrt.engines.bundle.manifest import EngineRecord
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.onnxruntime import library
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.engines.tensor_names import FRAMES
from latentrt.engines.verify.canonical_graph import open_canonical

Arrays = dict[str, Array]
Pair = tuple[Arrays, Arrays]
"""Inputs and the float32 outputs that they must give, by tensor name."""

Sizes = Mapping[str, int]
"""The size of each named axis, but for those that count rows: a reference is one row, or one window of frames."""

COUNTS = ("batch", "pictures", "rows", "steps")


def read_golden(bundle: Bundle, component: str) -> Pair:
    """Read a component's recorded inputs and fp32 outputs. Raises BundleError."""
    path = bundle.path(bundle.manifest.components[component].golden, check="hash")
    arrays = _read(path, fix="export the checkpoint again")
    return golden_pair(arrays)


def read_arrays(path: Path) -> Arrays:
    """Read a safetensors file's arrays in the order of their names. Raises OSError, SafetensorError."""
    from safetensors.numpy import load  # `load_file`'s errors of a disk have no number and no `strerror`

    arrays = load(path.read_bytes())
    return {name: arrays[name].copy() for name in sorted(arrays)}  # else they are not writable, in any order


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays as a safetensors file. Raises OSError."""
    from safetensors.numpy import save  # `save_file` has an error of its own for a full disk

    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def _read(path: Path, *, fix: str) -> Arrays:
    from safetensors import SafetensorError

    try:
        return read_arrays(path)
    except OSError as error:
        raise BundleError(f"{path} could not be read ({error.strerror}); {fix}") from None
    except SafetensorError as error:
        raise BundleError(f"{path} is not a safetensors file ({error}); {fix}") from None


def golden_pair(arrays: Mapping[str, Array]) -> Pair:
    """Return the inputs and the outputs among a golden file's arrays, without their prefixes."""
    return _side(arrays, "input."), _side(arrays, "output.")


def _side(arrays: Mapping[str, Array], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def reference_file(component: str) -> str:
    """Return the name of a component's references in a directory of engines."""
    return f"{component}.references.safetensors"


def unavailable() -> EngineError | None:
    """Return the error that says why references cannot be computed here, or None."""
    reason = library.unavailable("cpu")
    before = "what `latentrt verify` compares with is computed on the CPU (pass --no-references to go without): "
    return reason and reason.within(before)


def write_references(bundle: Bundle, spec: EngineSpec, directory: Path) -> None:
    """Write one row for each size that an engine is compiled for. Raises EngineError and BundleError.

    A row of the golden pair serves where its sizes fit. Otherwise the inputs are drawn from the golden pair's own
    values, which are tokens, timesteps and latents as the network meets them, always the same for the same sizes.
    """
    golden = read_golden(bundle, spec.component)
    shapes = [row_shapes(bundle, spec.component, sizes) for sizes in distinct_sizes(spec)]
    pairs = dict(enumerate(_fitting_row(golden, wanted) for wanted in shapes))
    missing = {number: _draw(golden[0], shapes[number]) for number, pair in pairs.items() if pair is None}
    if missing:
        run = _run(bundle, spec.component, list(missing.values()), directory)
        for number, outputs in zip(missing, run, strict=True):
            pairs[number] = (missing[number], outputs)
    arrays: Arrays = {}
    for number, pair in pairs.items():
        assert pair is not None
        for side, values in zip(("input", "output"), pair, strict=True):
            arrays |= {f"{number}.{side}.{name}": array for name, array in values.items()}
    write_arrays(directory / reference_file(spec.component), arrays)


def read_references(bundle: Bundle, component: str, directory: Path, record: EngineRecord) -> list[Pair]:
    """Return a row for each profile of a component, in the order of the profiles. Raises BundleError."""
    fix = f"run `latentrt build --force` on '{bundle.root}'"
    name, spec = reference_file(component), record.specs[component]
    if name not in record.files:
        raise BundleError(f"{directory} holds no {name}, it was built without; {fix}")
    arrays = _read(check_file(directory, name, record.files[name], check="hash"), fix=fix)
    kept = {
        tuple(distinct.items()): (_side(arrays, f"{number}.input."), _side(arrays, f"{number}.output."))
        for number, distinct in enumerate(distinct_sizes(spec))
    }
    for sizes, (inputs, outputs) in kept.items():
        if {n: a.shape for n, a in inputs.items()} != row_shapes(bundle, component, dict(sizes)) or not outputs:
            raise BundleError(f"{directory / name} does not hold the references that its record promises; {fix}")
    return [kept[tuple(_row_sizes(sizes).items())] for sizes in spec.profiles]


def distinct_sizes(spec: EngineSpec) -> list[Sizes]:
    """Return the sizes of an engine's profiles, each once, in their order."""
    return [dict(items) for items in dict.fromkeys(tuple(_row_sizes(sizes).items()) for sizes in spec.profiles)]


def _row_sizes(profile: Sizes) -> Sizes:
    return {axis: size for axis, size in profile.items() if axis not in COUNTS}


def row_shapes(bundle: Bundle, component: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input of a component's canonical graph for one row."""
    inputs: Sequence[TensorSpec] = bundle.manifest.components[component].inputs
    ones = {**dict.fromkeys(COUNTS, 1), "batch": sizes.get("frames", 1)}  # a window is computed as a whole
    return {
        tensor.name: tuple(axis if isinstance(axis, int) else {**ones, **sizes}[axis] for axis in tensor.shape)
        for tensor in inputs
    }


def _fitting_row(golden: Pair, shapes: Mapping[str, tuple[int, ...]]) -> Pair | None:
    inputs, outputs = golden
    if any(inputs[name].shape[1:] != shape[1:] for name, shape in shapes.items()) or FRAMES in shapes:
        return None
    return {name: array[:1] for name, array in inputs.items()}, {name: array[:1] for name, array in outputs.items()}


def _draw(golden: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    seed = [size for shape in shapes.values() for size in shape]
    generator = np.random.default_rng(seed)
    return {
        name: golden[name][: shape[0]] if _fits(golden[name], shape) else generator.choice(golden[name].ravel(), shape)
        for name, shape in shapes.items()
    }


def _fits(golden: Array, shape: tuple[int, ...]) -> bool:
    return golden.shape[1:] == shape[1:] and len(golden) >= shape[0]


def _run(bundle: Bundle, component: str, inputs: Sequence[Arrays], directory: Path) -> Iterator[Arrays]:
    """Run the canonical graph in float32, whatever it is stored in. directory: for files that are removed again."""
    with open_canonical(bundle, component, directory) as engine:
        for arrays in inputs:
            yield {name: np.array(output, dtype=np.float32) for name, output in engine(arrays).items()}
