"""The contract of an engine: a named function of named arrays, and the key that names what it was built for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias, get_args

import msgspec
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Array = np.ndarray[Any, np.dtype[Any]]
Inputs: TypeAlias = "Mapping[str, npt.ArrayLike]"

DType = Literal["float16", "float32", "int32", "int64", "uint8", "bool"]
Precision = Literal["fp32", "fp16", "fp8", "int8"]
Quantised = Literal["fp8", "int8"]
QUANTISED: tuple[Quantised, ...] = get_args(Quantised)
BackendName = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is written as JSON and read back: of named and typed fields, of which no unknown one is taken."""


class TensorSpec(Document, frozen=True, kw_only=True):
    """One input or output: a fixed axis is a number, a dynamic one has a name (`batch`, `height`, …)."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def accepts(self, array: Array) -> bool:
        """Tell whether an array of this dtype and rank fits every fixed axis."""
        return (
            array.dtype == np.dtype(self.dtype)
            and array.ndim == len(self.shape)
            and all(isinstance(axis, str) or axis == n for axis, n in zip(self.shape, array.shape, strict=True))
        )

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


class EngineSpec(Document, frozen=True, kw_only=True):
    """What an engine takes and gives.

    profiles: where an engine is compiled for fixed shapes, the size of every named axis, a profile at a time and in
    the engine's own order of profiles; empty if any size will do
    """

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Mapping[str, int], ...] = ()

    def arrays(self, inputs: Inputs) -> dict[str, Array]:
        """Return contiguous arrays of the types of the inputs. Raises EngineError on other names or shapes."""
        from latentrt.engines.errors import EngineError  # this module is at the end of every chain of imports

        names = [tensor.name for tensor in self.inputs]
        if set(inputs) != set(names):
            raise EngineError(f"{self.component} takes {', '.join(names)}, found {', '.join(sorted(inputs))}")
        arrays = {tensor.name: np.ascontiguousarray(inputs[tensor.name], dtype=tensor.dtype) for tensor in self.inputs}
        for tensor in self.inputs:
            if not tensor.accepts(arrays[tensor.name]):
                raise EngineError(f"{self.component} takes {tensor}, found shape {arrays[tensor.name].shape}")
        return arrays


class Engine(Protocol):
    """A constructed engine is ready; `with` closes it.

    The arrays that a call returns belong to the engine and hold until its next call: copy what must outlive it.
    One engine serves one thread at a time.
    """

    @property
    def spec(self) -> EngineSpec: ...

    def __call__(self, inputs: Inputs) -> dict[str, Array]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Closing:
    """What `with` closes."""

    def close(self) -> None:
        """Free what it holds. Closing twice is closing once."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EngineView(Closing):
    """What engines around an engine share: the spec is the inner one's own, and closing closes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def spec(self) -> EngineSpec:
        """Return what the inner engine takes and gives."""
        return self._engine.spec

    def close(self) -> None:
        """Close the inner engine."""
        self._engine.close()


class EngineKey(Document, frozen=True, kw_only=True):
    """What an engine was built for. An engine is used only where its whole key matches.

    `device` is the GPU's name or the CPU's instruction set; the fields that only a GPU has are None on a CPU.
    `graphs` is the SHA-256 over the canonical graphs that were compiled.
    """

    backend: BackendName
    backend_version: str
    device: str
    precision: Precision
    graphs: str
    profiles: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    compute_capability: str | None = None
    sm_count: int | None = None
    driver_major: int | None = None

    @property
    def digest(self) -> str:
        """Return 12 hexadecimal digits that differ when any field does."""
        import hashlib  # with OpenSSL, for what opens a bundle

        text = json.dumps(msgspec.structs.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def directory(self) -> str:
        """Return the name of the directory for this key below `engines/`."""
        slug = re.sub(r"[^a-z0-9]+", "-", f"{self.backend} {self.device} {self.precision}".lower()).strip("-")
        return f"{slug}-{self.digest}"

    @property
    def target(self) -> EngineKey:
        """Return this key without what was chosen when building: shapes and options. It names where engines run."""
        return msgspec.structs.replace(self, profiles=(), options=())

    def differences(self, other: EngineKey) -> list[str]:
        """Name each field in which another key differs, as `field: ours here, theirs there`."""
        mine, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        return [f"{name}: {mine[name]} here, {theirs[name]} there" for name in mine if mine[name] != theirs[name]]
