"""What the tensors of a LoRA file mean for one weight: each kind of change as a row of a table.

    LoRA        up @ down; LoCon: convolutions, with a core between the two    arXiv:2106.09685
    LoHa        (a1 @ b1) * (a2 @ b2), element by element                      arXiv:2108.06098
    LoKr        a1 ⊗ a2, Kronecker's product; each may be a product itself     arXiv:2309.14859
    difference  the difference itself, as trainers of whole weights write it
    DoRA        any of the products, and learned magnitudes                    arXiv:2402.09353

Convolutions are matrices of their outputs by all else. Every change is a function of the base's own weight, so that the
changes of several files add up, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from latentrt.engines.lora.transformer_names import ALL, Share
from latentrt.engines.spec import Array

Role = str
Shape = tuple[int, ...]
Size = tuple[int, int]
"""Of a matrix: outputs, and everything else."""
ALPHA = "alpha"


class Matrix(msgspec.Struct, frozen=True, kw_only=True):
    """A matrix of a change: one tensor, or a product of two with a core between them where there is one.

    whole, outer, inner, core: the tensors by their roles
    turned: with a core, `outer` has its rank first
    """

    whole: Role = ""
    outer: Role = ""
    inner: Role = ""
    core: Role = ""
    turned: bool = False

    @property
    def roles(self) -> set[Role]:
        """Return the roles of all tensors that it may have."""
        return {self.whole, self.outer, self.inner, self.core} - {""}

    def absent(self, roles: set[Role]) -> list[Role]:
        """Return what it lacks."""
        needed = [role for role in (self.inner, self.outer) if role]
        return [] if self.whole in roles else [role for role in needed or [self.whole] if role not in roles]

    def rank(self, shapes: Mapping[Role, Shape]) -> int | None:
        """Return its rank, None if it is one tensor."""
        return None if self.whole in shapes else shapes[self.inner][0]

    def size(self, shapes: Mapping[Role, Shape]) -> Size | None:
        """Return its size, None if its tensors do not fit together."""
        if self.whole in shapes:
            whole = shapes[self.whole]
            return (whole[0], math.prod(whole[1:])) if whole and self.roles & set(shapes) == {self.whole} else None
        outer, inner, core = shapes[self.outer], shapes[self.inner], shapes.get(self.core)
        if min(len(outer), len(inner)) < 2 or math.prod(outer[2:]) != 1 or (core is not None and len(core) < 2):
            return None
        outputs, rank = outer[1::-1] if core is not None and self.turned else outer[:2]
        ranks = {rank, inner[0], *(core[:2] if core else ())}
        if len(ranks) != 1 or rank == 0:
            return None
        return outputs, math.prod(inner[1:]) * math.prod(core[2:] if core else ())

    def value(self, tensors: Mapping[Role, Array]) -> Array:
        """Return its values, (outputs, everything else)."""
        if self.whole in tensors:
            whole = tensors[self.whole]
            return whole.reshape(len(whole), -1)
        outer, inner = (tensors[role].reshape(len(tensors[role]), -1) for role in (self.outer, self.inner))
        if self.core not in tensors:
            return np.asarray(outer @ inner)
        middle = np.einsum("rs...,si->ri...", tensors[self.core], inner)
        return np.asarray((outer.T if self.turned else outer) @ middle.reshape(len(middle), -1))


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of change: its matrices, and how they are joined.

    scaled: whether alpha / rank scales it, and learned magnitudes may follow
    """

    name: str
    matrices: tuple[Matrix, ...]
    join: Callable[[Array, Array], Array] = np.multiply
    join_sizes: Callable[[Size, Size], Size | None] = lambda one, other: one if one == other else None
    scaled: bool = True

    @property
    def own(self) -> set[Role]:
        """Return the roles that only this kind has."""
        return {role for matrix in self.matrices for role in matrix.roles}

    def strangers(self, roles: set[Role]) -> set[Role]:
        """Return what has no meaning in it."""
        return roles - self.own - ({ALPHA, *MAGNITUDES} if self.scaled else set())

    def absent(self, roles: set[Role]) -> list[Role]:
        """Return what it lacks."""
        return [role for matrix in self.matrices for role in matrix.absent(roles)]

    def rank(self, shapes: Mapping[Role, Shape]) -> int | None:
        """Return by what alpha is divided, None if it is not used: no matrix is a product."""
        return next((rank for matrix in self.matrices if (rank := matrix.rank(shapes))), None)

    def fits(self, shapes: Mapping[Role, Shape], weight: Shape) -> bool:
        """Tell whether tensors of these shapes change a weight."""
        first, *others = (matrix.size(shapes) for matrix in self.matrices)
        for other in others:
            first = self.join_sizes(first, other) if first and other else None
        ranks = {matrix.rank(shapes) for matrix in self.matrices} - {None} if first else set()
        spread = all(MAGNITUDES[role].along(shapes[role], weight) is not None for role in set(MAGNITUDES) & set(shapes))
        return first == (weight[0], math.prod(weight[1:])) and len(ranks) <= 1 and spread

    def value(self, tensors: Mapping[Role, Array]) -> Array:
        """Return what it adds, as a matrix and not scaled."""
        first, *others = (matrix.value(tensors) for matrix in self.matrices)
        for other in others:
            first = self.join(first, other)
        return first


DIFFERENCES: tuple[Role, ...] = ("diff", "diff_b", "w_norm", "b_norm")
KINDS: tuple[Kind, ...] = (
    Kind(name="LoRA", matrices=(Matrix(outer="lora_up", inner="lora_down", core="lora_mid"),)),
    Kind(
        name="LoHa",
        matrices=(
            Matrix(outer="hada_w1_a", inner="hada_w1_b", core="hada_t1", turned=True),
            Matrix(outer="hada_w2_a", inner="hada_w2_b", core="hada_t2", turned=True),
        ),
    ),
    Kind(
        name="LoKr",
        matrices=(
            Matrix(whole="lokr_w1", outer="lokr_w1_a", inner="lokr_w1_b"),
            Matrix(whole="lokr_w2", outer="lokr_w2_a", inner="lokr_w2_b", core="lokr_t2", turned=True),
        ),
        join=np.kron,
        join_sizes=lambda one, other: (one[0] * other[0], one[1] * other[1]),
    ),
    *(Kind(name="difference", matrices=(Matrix(whole=role),), scaled=False) for role in DIFFERENCES),
)
DORA = "DoRA"
KIND_OF: Mapping[Role, Kind] = {role: kind for kind in KINDS for role in kind.own}


class Magnitude(msgspec.Struct, frozen=True, kw_only=True):
    """How learned magnitudes follow a product: m * (W + D) / |W + D|, the norm of each output or of each input.

    along: gives the axis that magnitudes of a shape belong to in a weight of another, None if they fit none
    inside: whether the strength is that of D, as in PEFT; else the sum is between W and the result, as in LyCORIS'
        trainers, ComfyUI and the web UI. At a strength of 1 both are the same.
    """

    along: Callable[[Shape, Shape], int | None]
    inside: bool

    def added(self, weight: Array, delta: Array, magnitudes: Array, *, strength: float) -> Array:
        """Return what is added to a weight, float32."""
        axis = self.along(magnitudes.shape, weight.shape)
        assert axis is not None
        inner, outer = (strength, 1.0) if self.inside else (1.0, strength)
        merged = weight + np.float32(inner) * delta
        rest = tuple(other for other in range(weight.ndim) if other != axis)
        norms = np.sqrt(np.square(merged).sum(axis=rest, keepdims=True)) + np.finfo(np.float32).eps
        merged *= magnitudes.reshape(norms.shape) / norms
        merged -= weight
        merged *= np.float32(outer)
        return np.asarray(merged)


def _outputs(shape: Shape, weight: Shape) -> int | None:
    return 0 if math.prod(shape) == weight[0] else None


def _outputs_or_inputs(shape: Shape, weight: Shape) -> int | None:
    """Older trainers keep the norms of the inputs, (1, inputs, …), and newer ones those of the outputs."""
    by_axis = {(weight[0], *(1 for _ in weight[1:])): 0, (1, *weight[1:2], *(1 for _ in weight[2:])): 1}
    return 0 if shape == weight[:1] else by_axis.get(shape)


MAGNITUDES: Mapping[Role, Magnitude] = {
    "dora_scale": Magnitude(along=_outputs_or_inputs, inside=False),
    "lora_magnitude_vector": Magnitude(along=_outputs, inside=True),
}


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to one weight. tensors: float32, by their roles; share: the rows of it that the weight has"""

    kind: Kind
    tensors: Mapping[Role, Array]
    scale: float = 1.0
    share: Share = ALL

    def added(self, weight: Array, *, strength: float) -> Array:
        """Return what is added to the base's weight, float32 and of its shape."""
        role = next((role for role in MAGNITUDES if role in self.tensors), None)
        scale = self.scale if role else strength * self.scale
        delta = self.share.of(self.kind.value(self.tensors)).reshape(weight.shape) * np.float32(scale)
        if role is None:
            return np.asarray(delta)
        magnitudes = self.tensors[role]
        if magnitudes.shape[0] != 1:  # of the outputs
            magnitudes = self.share.of(magnitudes)
        return MAGNITUDES[role].added(weight, delta, magnitudes, strength=strength)
