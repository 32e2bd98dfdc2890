"""The engines of a bundle, opened for this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from latentrt.engines.adapting import NOTHING, Changes, keys_of
from latentrt.engines.backends import BACKENDS, Opened, Opening
from latentrt.engines.bundle import Bundle, Check, check_file
from latentrt.engines.canvas import DECODER, UNET, Canvas, CanvasShape
from latentrt.engines.choosing import Choice, choose, find_engines, fits
from latentrt.engines.manifest import EngineRecord, LatentSpec
from latentrt.engines.spec import Engine, EngineKey

_log = logging.getLogger(__name__)


class OpenEngines:
    """The engines of a bundle, ready to run, by component.

    engines: those that were opened; what `load` opens is not added
    choice: the backend and why it was chosen
    key: of the engines that were opened first
    load_s: how long it took to find, check and open them
    """

    def __init__(
        self,
        bundle: Bundle,
        choice: Choice,
        *,
        components: tuple[str, ...] | None,
        needs: CanvasShape | None,
        threads: int | None,
        cuda_graphs: bool | None,
        check: Check,
    ) -> None:
        start = time.perf_counter()
        self.choice = choice
        self._bundle, self._check = bundle, check
        self._threads, self._cuda_graphs = threads, cuda_graphs
        directory, record = find_engines(bundle, choice.backend, needs=needs)
        self._components = components or tuple(record.entries)
        self._first = (directory, record)
        self._opened: dict[Path, tuple[EngineRecord, Opened]] = {}
        self._further: list[Opened] = []
        self._changes: Mapping[str, Changes] | None = NOTHING  # None: some may be changed and some not
        self.engines = self._open(directory, record).engines
        self.key: EngineKey = record.key
        self.load_s = time.perf_counter() - start

    def _open(self, directory: Path, record: EngineRecord) -> Opened:
        if directory not in self._opened:
            opened = self._open_components(directory, record, self._components)
            self._opened[directory] = (record, opened)
            opened.adapt(self._changes or NOTHING)
        return self._opened[directory][1]

    def _open_components(self, directory: Path, record: EngineRecord, components: tuple[str, ...]) -> Opened:
        for name, file in record.files.items():
            check_file(directory, name, file, check=self._check)
        _log.info("opening %s: %s (%s)", directory, ", ".join(components), self.choice.reason)
        opening = Opening(
            bundle=self._bundle,
            directory=directory,
            record=record,
            components=components,
            threads=self._threads,
            cuda_graphs=self._cuda_graphs,
        )
        return BACKENDS[self.choice.backend].open(opening)

    def load(self, component: str) -> Engine:
        """Open one more component. Raises EngineError and BundleError."""
        self._further.append(self._open_components(*self._first, (component,)))
        return self._further[-1].engines[component]

    def adapt(self, changes: Mapping[str, Changes]) -> bool:
        """Change the weights of components, always from the base's; tell whether there was anything to do.

        What is not named is as in the base again. What drew before must be asked for again with `canvas`.
        Raises EngineError; then no weights are changed at all.
        """
        if self._changes is not None and keys_of(changes) == keys_of(self._changes):
            return False
        self._changes = None  # until it is known that everything went well
        try:
            self._adapt_all(changes)
        except Exception:
            self._adapt_all(NOTHING)
            self._changes = NOTHING
            raise
        self._changes = changes
        return True

    def _adapt_all(self, changes: Mapping[str, Changes]) -> None:
        for _, opened in self._opened.values():
            opened.adapt(changes)

    def canvas(
        self,
        space: LatentSpec,
        shape: CanvasShape,
        *,
        state_rows: int,
        denoiser: str = UNET,
        decoder: str | None = DECODER,
    ) -> Canvas:
        """Return what a batch of this shape is drawn on, with one of the bundle's denoisers and decoders.

        decoder: None where the pixels come from elsewhere

        Where the bundle holds engines of several shapes, those that fit are opened when they are first needed, and
        stay open. Raises EngineError where none fits.
        """
        fitting = self._fitting(shape)
        return fitting.canvas(shape, state_rows=state_rows, denoiser=denoiser, decoder=decoder)

    def engine(self, component: str, shape: CanvasShape) -> Engine:
        """Return the engine of an opened component that takes pictures of this shape. Raises EngineError."""
        return self._fitting(shape).engines[component]

    def _fitting(self, shape: CanvasShape) -> Opened:
        for record, opened in self._opened.values():
            if fits(record, shape, self._bundle):
                return opened
        return self._open(*find_engines(self._bundle, self.choice.backend, needs=shape))

    def close(self) -> None:
        """Close every engine."""
        for _, opened in self._opened.values():
            opened.close()
        for opened in self._further:
            opened.close()
        self._opened.clear()
        self._further.clear()


def open_engines(
    bundle: Bundle,
    backend: str = "auto",
    *,
    components: tuple[str, ...] | None = None,
    needs: CanvasShape | None = None,
    threads: int | None = None,
    cuda_graphs: bool | None = None,
    check: Check = "hash",
    build: bool = False,
) -> OpenEngines:
    """Open the engines of a bundle for this machine, all of them or the named components.

    backend: `auto` or a backend's name; see `choose`
    needs: the shape that shall be drawn first; None for any, the bundle's own size by preference
    threads: how many CPU threads a run may use, None for the backend's own choice
    cuda_graphs: whether a GPU's kernels are recorded and replayed; None: TensorRT's are, ONNX Runtime's not
    check: what is compared before a file is opened: its SHA-256, or only its size
    build: build the engines where there are none for this machine; it is logged, and said in the choice's reason
    Raises EngineError and BundleError.
    """
    if build:
        from latentrt.engines.building import build_missing

        choice = build_missing(bundle, backend)
    else:
        choice = choose(backend, bundle)
    return OpenEngines(
        bundle,
        choice,
        components=components,
        needs=needs,
        threads=threads,
        cuda_graphs=cuda_graphs,
        check=check,
    )
