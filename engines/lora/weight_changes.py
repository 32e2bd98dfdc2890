"""Weights that are changed while engines are open: always the base's weights and what is added to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from latentrt.engines.bundle.files import Bundle, typed
from latentrt.engines.bundle.manifest import EngineRecord
from latentrt.engines.bundle.weight_map import BuiltWeights, arrange, built_record, read_weights, restore
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.spec import Array

Delta = Callable[[Array], Array]
"""What is added to a weight, computed from the base's own when it is asked for: float32, of the weight's shape."""


class Changes(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What is added to a network's weights, in the order of the sum.

    key: the same for the same changes, and never for others
    """

    key: str
    deltas: Mapping[str, Sequence[Delta]]


NOTHING: Mapping[str, Changes] = {}


def keys_of(changes: Mapping[str, Changes]) -> dict[str, str]:
    """Return the key of each component's changes."""
    return {component: change.key for component, change in changes.items()}


class Adaptable(msgspec.Struct, frozen=True, kw_only=True):
    """The weights of the engines in one directory, read when the first one is to be changed.

    files: what the records' files are relative to
    command: what builds the engines again
    """

    record: EngineRecord
    directory: Path
    files: Path
    command: str
    _known: dict[str, BuiltWeights] = msgspec.field(default_factory=dict)

    def weights(self, component: str) -> BuiltWeights:
        """Return where a component's weights lie. Raises EngineError if that was not recorded when it was built."""
        if component not in self._known:
            name = built_record(component)
            if name not in self.record.files:
                raise EngineError(
                    f"the engines in {self.directory} were built without a record of where {component}'s weights lie, "
                    f"so no LoRA can be added to them; run `{self.command}`"
                )
            self._known[component] = read_weights(self.directory / name, BuiltWeights)
        return self._known[component]

    def check(self, component: str, changes: Changes) -> None:
        """Raise EngineError if something cannot be changed here."""
        known = self.weights(component).weights
        if strange := sorted(set(changes.deltas) - set(known)):
            raise EngineError(
                f"{component}: {len(strange)} of the weights that change ({strange[0]}, …) cannot be told from others "
                f"in the engines of {self.directory}; add the LoRA when exporting: "
                "latentrt export CHECKPOINT BUNDLE --lora FILE"
            )

    def changed(self, component: str, name: str, deltas: Sequence[Delta]) -> tuple[str, Array]:
        """Return the name of the initializer that holds a weight, and its changed values as they are stored.

        The sum is made in float32 and rounded once. Raises RequestError if it is not finite.
        """
        place = self.weights(component).weights[name]
        unit = np.float32(2.0**place.exponent)
        weight = restore(place.read(self.files), place.layout, place.shape).astype(np.float32)
        weight *= unit
        total = weight.copy()
        for delta in deltas:
            total += delta(weight)
        with np.errstate(over="ignore"):
            total /= unit
            stored = arrange(total.astype(place.dtype, copy=False), place.layout)
        if not np.isfinite(stored).all():
            raise RequestError(
                f"loras: {component}'s {name} is outside the range of {place.dtype} with these LoRAs; "
                "give smaller scales, or other files if these are damaged"
            )
        return place.initializer, stored

    def base(self, component: str, initializer: str) -> Array | None:
        """Return an initializer's values in the base, None if they are not known."""
        known = self.weights(component)
        named = {weight.initializer: weight for weight in known.weights.values()}
        place = named.get(initializer) or known.others.get(initializer)
        return None if place is None else np.array(place.read(self.files))


def adaptable(bundle: Bundle, directory: Path, record: EngineRecord) -> Adaptable:
    """Return the weights of engines whose own files hold them."""
    command = f"latentrt build {typed(bundle.root)} --backend {record.key.backend} --force"
    return Adaptable(record=record, directory=directory, files=directory, command=command)
