"""The models of a service: bundles by name, each with its batcher, as many at a time as there is memory for."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import MANIFEST, Manifest
from latentrt.engines.errors import DrainingError, LatentrtError, OutOfMemoryError, RequestError
from latentrt.runtime.batching.observer import Refused
from latentrt.runtime.serve.operation.memory import resident_bytes
from latentrt.runtime.serve.operation.notes import CURRENT
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.serve.web_errors import WebError

if TYPE_CHECKING:
    from latentrt.runtime.batching.batcher import Batcher
    from latentrt.runtime.batching.observer import Event
    from latentrt.runtime.pipeline import Pipeline

logger = logging.getLogger(__name__)


class Source(msgspec.Struct, frozen=True):
    """A batcher that tells something: of a model, the how manieth that was loaded."""

    model: str
    load: int


Watcher = Callable[[Source, "Event"], None]
"""called with what a batcher tells, on any thread"""
Outcome = Literal["loaded", "unchanged", "failed"]


class Model(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A bundle that is served. bytes: what it takes of the memory for bundles"""

    name: str
    pipe: Pipeline
    batcher: Batcher
    bytes: int

    @property
    def idle(self) -> bool:
        """Tell whether it has nothing to draw, and nothing to decode."""
        return not self.batcher.busy

    def close(self) -> None:
        """Cancel what is not drawn yet, and close the bundle."""
        self.batcher.close()
        self.pipe.close()


class Models:
    """The models of a service, by their names and their aliases. Close it, or use `with`.

    bundles: paths by name; loading: further arguments of `Pipeline.load`; embeddings: learned words for every model
    load: load them now; else whoever made it calls `load`
    With `options.memory`, those that have room are loaded at once, and the others when they are asked for: then the
    ones that were asked for longest ago make room. Raises what `Pipeline.load` raises.
    """

    def __init__(
        self,
        bundles: Mapping[str, str | os.PathLike[str]],
        options: ServeOptions | None = None,
        loading: Mapping[str, Any] | None = None,
        embeddings: Sequence[Path] = (),
        *,
        load: bool = True,
    ) -> None:
        self.options = options or ServeOptions()
        self.opening, self.draining = True, False
        self._paths, self._loading, self._embeddings = dict(bundles), dict(loading or {}), embeddings
        for alias, name in self.options.aliases.items():
            if name not in bundles:
                raise RequestError(f"alias: '{alias}' stands for '{name}'; there are: {', '.join(sorted(bundles))}")
        self._models: dict[str, Model] = {}  # the one that was asked for last is the last
        self._held: Counter[Model] = Counter()  # by how many requests
        self._awaited: Counter[str] = Counter()  # by how many that wait until it is loaded
        self._needs: dict[str, int] = {}
        self._change = threading.Condition()
        self.loads: Counter[tuple[str, str]] = Counter()  # by model and outcome
        self._loads: dict[str, Future[None]] = {}
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt-load")
        self._retiring: list[Model] = []  # that were replaced, and have pictures to draw
        self._closer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt-close")
        self._watchers: list[Watcher] = []
        if load:
            try:
                self.load()
            except BaseException:
                self.close()
                raise

    def load(self) -> None:
        """Load those that have room. Whoever asks for one meanwhile waits. Raises what `Pipeline.load` raises."""
        for name in self._paths:
            if not self.all() or self._room_for(self._need(name)) >= 0:
                self._loading_of(name).result()
        self.opening = False

    @property
    def names(self) -> list[str]:
        """Return the names of all models, aliases last."""
        return [*self._paths, *self.options.aliases]

    def made_at(self, name: str) -> int:
        """Return when a bundle was written, in seconds since 1970; it need not be loaded. Raises BundleError."""
        root = Bundle.open(self._paths[self.options.aliases.get(name, name)]).root
        return int((root / MANIFEST).stat().st_mtime)

    def all(self) -> list[Model]:
        """Return the models that are loaded."""
        with self._change:
            return list(self._models.values())

    def manifests(self) -> dict[str, Manifest]:
        """Return the manifests of all models by name, of those that are not loaded too. Raises BundleError."""
        loaded = {model.name: model.pipe.manifest for model in self.all()}
        return {name: loaded.get(name) or Bundle.open(path).manifest for name, path in self._paths.items()}

    def watch(self, watcher: Watcher) -> None:
        """Have a function told of everything that happens in the batchers."""
        self._watchers.append(watcher)

    async def find(self, name: str | None) -> Model:
        """Return a model by its name or alias, loaded if need be; None is the first of all.

        Raises WebError, 404 or 503; DrainingError; what `Pipeline.load` raises.
        """
        first = next(iter(self._paths), "none")
        known = first if name is None else self.options.aliases.get(name, name)
        if known not in self._paths:
            raise WebError(
                f"model: there is no '{known}'; there are: {', '.join(self.names)}",
                status=404,
                code="model_not_found",
                param="model",
            )
        if self.draining:
            self._told(Source(known, 0), Refused(reason="draining", pictures=1))
            raise DrainingError("this service is about to end and takes no further requests; ask another one")
        with self._awaiting(known):
            while (model := self._take(known)) is None:
                await asyncio.shield(asyncio.wrap_future(self._loading_of(known)))  # others may wait for it too
        return model

    @contextmanager
    def _awaiting(self, name: str) -> Iterator[None]:
        """Keep a model, once it is loaded, for who waits for it: else two could make room for each other for ever."""
        with self._change:
            self._awaited[name] += 1
        try:
            yield
        finally:
            with self._change:
                self._awaited[name] -= 1
                self._change.notify_all()

    def _loading_of(self, name: str) -> Future[None]:
        """Return what becomes of loading a model, which begins unless it has."""
        with self._change:
            if name not in self._loads:
                self._loads[name] = self._loader.submit(self._load_in, name)
            return self._loads[name]

    def _take(self, name: str) -> Model | None:
        """Return a model, if it is loaded, and keep it for the request that is being answered, until that is."""
        note = CURRENT.get()
        with self._change:
            model = self._models.pop(name, None)
            if model is None:
                return None
            self._models[name] = model
            if note is not None:
                self._held[model] += 1
                note.models.append(name)
                note.ends.append(partial(self._let_go, model))
        return model

    def _let_go(self, model: Model) -> None:
        with self._change:
            self._held[model] -= 1
            if not self._held[model]:
                del self._held[model]
            self._change.notify_all()

    def _load_in(self, name: str) -> None:
        """Load a model where others may have to go for it. On the loader's thread."""
        try:
            if name in self._models:
                return
            self._make_room(name)
            model = self._load(name)
            with self._change:
                self._models[name] = model
        except LatentrtError as error:
            self.loads[name, "failed"] += 1
            logger.error("'%s' was not loaded: %s", name, error)
            raise
        finally:
            with self._change:
                del self._loads[name]

    def _load(self, name: str) -> Model:
        """Open a bundle and see whether it draws. Raises what `Pipeline.load` raises, and EngineError."""
        from latentrt.runtime.batching.batcher import Batcher, BatcherOptions  # all that draws: with the first model
        from latentrt.runtime.pipeline import Pipeline
        from latentrt.runtime.serve.operation.self_test import self_test, warm_up

        options = BatcherOptions(slots=self.options.slots, waiting=self.options.waiting, slo=self.options.slo)
        before = resident_bytes()
        pipe = Pipeline.load(self._paths[name], **self._loading)
        try:
            for file in self._embeddings:
                pipe.add_embedding(file)
            if self.options.self_test:
                with Batcher(pipe, options) as unwatched:
                    self_test(pipe, unwatched)
                warm_up(pipe, options.slots)
        except BaseException:
            pipe.close()
            raise
        batcher = Batcher(pipe, options, observer=partial(self._told, Source(name, self.loads.total())))
        self.loads[name, "loaded"] += 1
        self._needs[name] = max(weights_bytes(pipe.bundle), resident_bytes() - before)
        return Model(name=name, pipe=pipe, batcher=batcher, bytes=self._needs[name])

    def _told(self, source: Source, event: Event) -> None:
        for watcher in self._watchers:
            watcher(source, event)

    def _need(self, name: str) -> int:
        """Return the bytes that a model takes: as measured when it was loaded last, or its weights'."""
        return self._needs[name] if name in self._needs else weights_bytes(Bundle.open(self._paths[name]))

    def _room_for(self, need: int) -> int:
        """Return the bytes of the budget that a model leaves over, below 0 where it has no room."""
        if self.options.memory is None:
            return 0
        return self.options.memory - sum(model.bytes for model in self.all()) - need

    def _make_room(self, name: str) -> None:
        """Close those that were asked for longest ago and have nothing to do, until there is room. Raises WebError."""
        need, until = self._need(name), time.monotonic() + self.options.room_s
        if self.options.memory is not None and need > self.options.memory:
            raise OutOfMemoryError(
                f"model: '{name}' takes {need} bytes and all models may take {self.options.memory}; raise --memory"
            )
        while True:
            with self._change:
                if self._room_for(need) >= 0:
                    return
                oldest = next((one for one in self._models.values() if self._free(one)), None)
                if oldest is not None:
                    del self._models[oldest.name]
                elif not self._change.wait(min(0.1, max(0.0, until - time.monotonic()))) and time.monotonic() > until:
                    raise WebError(
                        f"model: there is no room for '{name}' while others draw; try again",
                        status=503,
                        code="model_waits_for_memory",
                        kind="server_error",
                        headers={"retry-after": "5"},
                    )
            if oldest is not None:
                logger.info("closed '%s' to make room for '%s'", oldest.name, name)
                oldest.close()

    def _free(self, model: Model) -> bool:
        return not self._held[model] and not self._awaited[model.name] and model.idle

    def reload(self) -> dict[str, Outcome]:
        """Load every bundle that was replaced on disk beside the one that is served; return what became of each.

        A new one is served once it was tested, and the old one is closed when its last picture is drawn. One that
        cannot be loaded leaves the old one in its place, and the log says why.
        """
        return {model.name: self._loader.submit(self._reload, model).result() for model in self.all()}

    def _reload(self, old: Model) -> Outcome:
        try:
            if self._models.get(old.name) is not old:
                return "unchanged"
            if Bundle.open(self._paths[old.name]).manifest == old.pipe.manifest:
                return "unchanged"
            new = self._load(old.name)
        except LatentrtError as error:
            self.loads[old.name, "failed"] += 1
            logger.error("'%s' was not loaded again, and is served as it was: %s", old.name, error)
            return "failed"
        with self._change:
            self._models[old.name] = new
            self._retiring.append(old)
        self._closer.submit(self._retire, old)
        logger.info("'%s' was loaded again", old.name)
        return "loaded"

    def _retire(self, old: Model) -> None:
        """Close a model once nobody has it in hand."""
        with self._change:
            self._change.wait_for(lambda: self.draining or not self._held[old], self.options.drain_s)
        try:
            old.batcher.drain(self.options.drain_s)
            old.close()
        except Exception:
            logger.exception("'%s' as it was before could not be closed", old.name)
        with self._change:
            self._retiring.remove(old)

    def drain(self) -> bool:
        """Take no further requests, and wait `drain_s` at the most for the others; return if that was all."""
        until = time.monotonic() + self.options.drain_s
        self._take_no_more()
        with self._change:
            models = [*self._models.values(), *self._retiring]
        return all(model.batcher.drain(max(0.0, until - time.monotonic())) for model in models)

    def _take_no_more(self) -> None:
        with self._change:
            self.draining = True
            self._change.notify_all()  # who waits until nobody has a model in hand that was replaced

    def close(self) -> None:
        """Cancel what is not drawn yet, and close every bundle."""
        self._take_no_more()
        self._loader.shutdown(cancel_futures=True)
        with self._change:
            retiring = list(self._retiring)
        for model in retiring:
            model.batcher.close()  # nobody waits until they have drawn everything
        for model in self._models.values():
            model.close()
        self._models.clear()
        self._closer.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def weights_bytes(bundle: Bundle) -> int:
    """Return the bytes of a bundle's weights."""
    return sum(component.weights_bytes for component in bundle.manifest.components.values())
