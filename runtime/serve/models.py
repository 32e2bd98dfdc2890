"""The models of a service: loaded bundles by name, each with its batcher."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import msgspec

from latentrt.engines.errors import DrainingError, RequestError
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.serve.web_errors import WebError

if TYPE_CHECKING:
    from latentrt.runtime.batching.batcher import Batcher
    from latentrt.runtime.pipeline import Pipeline


class Model(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A bundle that is served. created: when it was loaded, in seconds since 1970"""

    name: str
    pipe: Pipeline
    batcher: Batcher
    created: int

    def close(self) -> None:
        """Cancel what is not drawn yet, and close the bundle."""
        self.batcher.close()
        self.pipe.close()


class Models:
    """The models of a service, by their names and their aliases. Close it, or use `with`.

    bundles: paths by name; loading: further arguments of `Pipeline.load`
    """

    def __init__(
        self,
        bundles: Mapping[str, str | os.PathLike[str]],
        options: ServeOptions | None = None,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = options or ServeOptions()
        self._loading = dict(loading or {})
        for alias, name in self.options.aliases.items():
            if name not in bundles:
                raise RequestError(f"alias: '{alias}' stands for '{name}'; there are: {', '.join(sorted(bundles))}")
        self.draining = False
        self._models: dict[str, Model] = {}
        try:
            for name, path in bundles.items():
                self._models[name] = self._load(name, path)
        except BaseException:
            self.close()
            raise

    def _load(self, name: str, path: str | os.PathLike[str]) -> Model:
        from latentrt.runtime.batching.batcher import Batcher, BatcherOptions  # all that draws: with the first model
        from latentrt.runtime.pipeline import Pipeline

        pipe = Pipeline.load(path, **self._loading)
        options = BatcherOptions(slots=self.options.slots, waiting=self.options.waiting, slo=self.options.slo)
        return Model(name=name, pipe=pipe, batcher=Batcher(pipe, options), created=int(time.time()))

    @property
    def names(self) -> list[str]:
        """Return the names of all models, aliases last."""
        return [*self._models, *self.options.aliases]

    def all(self) -> list[Model]:
        """Return the models that are loaded."""
        return list(self._models.values())

    async def find(self, name: str | None) -> Model:
        """Return a model by its name or alias; None is the first. Raises WebError, 404, and DrainingError."""
        if self.draining:
            raise DrainingError("this service is about to end and takes no further requests; ask another one")
        if name is None:
            return next(iter(self._models.values()))
        model = self._models.get(self.options.aliases.get(name, name))
        if model is None:
            raise WebError(
                f"model: there is no '{name}'; there are: {', '.join(self.names)}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return model

    def drain(self) -> bool:
        """Take no further requests, and wait `drain_s` at the most for the others; return if that was all."""
        self.draining = True
        until = time.monotonic() + self.options.drain_s
        return all(model.batcher.drain(max(0.0, until - time.monotonic())) for model in self.all())

    def close(self) -> None:
        """Cancel what is not drawn yet, and close every bundle."""
        for model in self._models.values():
            model.close()
        self._models.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
