"""What goes into and out of a network, as rows of a table whose axes a checkpoint's dimensions fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from latentrt.engines.spec import DType, Precision, TensorSpec
from latentrt.engines.tensor_names import BLOCK, FEATURE, residual_names

Values = Literal["tokens", "text", "timesteps", "normal", "latents", "pixels", "unit", "sizes", "places", "switch"]
"""What golden inputs of a tensor look like; see golden.py."""

REAL: Mapping[Precision, DType] = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One row: dtype None means the bundle's precision. A string with braces is an expression of other axes.

    extra: an output that other exporters do not give, and without which the bundle does less
    where: a dimension, without which a checkpoint's network has no such tensor
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: DType | None = None
    values: Values = "normal"
    extra: bool = False
    where: str | None = None

    def spec(self, dimensions: Mapping[str, int], precision: Precision) -> TensorSpec:
        """Return the tensor as it is in one checkpoint's graph."""
        return TensorSpec(
            name=self.name,
            dtype=self.dtype or REAL[precision],
            shape=tuple(_axis(axis, dimensions) for axis in self.shape),
        )

    def there(self, dimensions: Mapping[str, int]) -> bool:
        """Tell whether one checkpoint's network has it: not where an axis of it is 0."""
        return 0 not in self.spec(dimensions, "fp32").shape and bool(self.where is None or dimensions.get(self.where))


def _axis(axis: int | str, dimensions: Mapping[str, int]) -> int | str:
    if isinstance(axis, int):
        return axis
    return dimensions.get(axis, axis.format_map(dimensions))


def residuals(dimensions: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Return the residuals of a checkpoint's ControlNets; none where it has no ControlNet."""
    downs, blocks = dimensions["down_residuals"], range(dimensions["block_residuals"])
    levels = (_at_level(name, dimensions) for name in (residual_names(downs) if downs else ()))
    return *levels, *(_of_patches(f"{BLOCK}{number}", dimensions) for number in blocks)


def features(dimensions: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Return the features of a checkpoint's T2I-Adapters; none where it has no adapter."""
    names = [f"{FEATURE}{number}" for number in range(dimensions["adapter_features"])]
    return tuple(_at_level(name, dimensions) for name in names)


def _at_level(name: str, dimensions: Mapping[str, int]) -> Tensor:
    """Return a tensor at a level of the UNet, whose dimensions are named after it."""
    sides = _sides(dimensions[f"{name}_divisor"])
    return Tensor(name=name, shape=("batch", dimensions[f"{name}_channels"], *sides))


def _of_patches(name: str, dimensions: Mapping[str, int]) -> Tensor:
    """Return a tensor of a transformer's patches."""
    return Tensor(name=name, shape=("batch", *_sides(dimensions["patch"]), dimensions["patch_width"]))


def _sides(divisor: int) -> tuple[str, str]:
    return f"latent_height_{divisor}", f"latent_width_{divisor}"
