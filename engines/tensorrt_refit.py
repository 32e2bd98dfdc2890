"""Weights put into compiled engines that were built for it: all that one choice of changes asks for, in one refit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from latentrt.engines.adapting import Adaptable, Changes
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensorrt_compile import _given
from latentrt.engines.tensorrt_run import Program, Told, logger_of
from latentrt.engines.tensorrt_session import TensorRTSession

REFITTABLE = "refit True"  # as an engine's key says it
UNKNOWN = "unknown"  # of weights where a refit went wrong: some may have been exchanged


def refit(program: Program, weights: Mapping[str, Array], base: Callable[[str], Array | None], stream: int) -> None:
    """Put weights into an engine, by the names of initializers, and queue the exchange.

    base: gives the values of what else must be supplied because the compiler has put it together with these
    Raises EngineError with the library's words; then some of the weights may have been exchanged and some not.
    """
    name, told = program.spec.component, Told(logger_of(program.library))
    refitter = _given(
        program.library.Refitter(program.engine, logger_of(program.library)), f"{name}: no refitter", told
    )
    kept = dict(weights)  # the library reads them until the refit is in the queue
    for initializer, values in weights.items():
        _set(refitter, initializer, values, name, told)
    for initializer in refitter.get_missing_weights():
        own = base(initializer) if initializer else None
        if own is None:
            raise EngineError(
                f"{name}: its compiler has put '{initializer}' together with a weight that changes, and its own values "
                "are not known; add the LoRA when exporting: latentrt export --lora"
            )
        kept[initializer] = own
        _set(refitter, initializer, own, name, told)
    if not refitter.refit_cuda_engine_async(stream):
        _given(None, f"{name}: its weights could not be exchanged", told)


def _set(refitter: Any, initializer: str, values: Array, name: str, told: Told) -> None:
    if not refitter.set_named_weights(initializer, values):
        _given(None, f"{name}: the weights of {initializer} were refused", told)


class Refits:
    """What the engines of a session have been changed to. They are changed in place, from the base's weights always."""

    def __init__(self, session: TensorRTSession, weights: Adaptable) -> None:
        self._session, self._weights = session, weights
        self._now: dict[str, Changes] = {}

    def adapt(self, changes: Mapping[str, Changes], components: tuple[str, ...]) -> None:
        """Change the weights of some components, and bring the others' back. Raises EngineError."""
        mine = {component: changes[component] for component in components if component in changes}
        if mine and REFITTABLE not in self._weights.record.key.options:
            raise EngineError(
                f"the engines in {self._weights.directory} were built without --refittable, so no LoRA can be added to "
                f"them; run `{self._weights.command}`"
            )
        for component, change in mine.items():
            self._weights.check(component, change)
        for component in {**self._now, **mine}:
            before, after = self._now.get(component), mine.get(component)
            if (before and before.key) != (after and after.key):
                self._exchange(component, before, after)

    def _exchange(self, component: str, before: Changes | None, after: Changes | None) -> None:
        """Refit what changes now, and what was changed before to the base's."""
        old, new = (change.deltas if change else {} for change in (before, after))
        names = [*new, *(name for name in old if name not in new)]
        self._now[component] = Changes(key=UNKNOWN, deltas=dict.fromkeys(names, ()))
        arrays = dict(self._weights.changed(component, name, new.get(name, ())) for name in names)
        self._session.refit(component, lambda program, stream: refit(program, arrays, self._base(component), stream))
        if after is None:
            del self._now[component]
        else:
            self._now[component] = after

    def _base(self, component: str) -> Callable[[str], Array | None]:
        return lambda initializer: self._weights.base(component, initializer)
