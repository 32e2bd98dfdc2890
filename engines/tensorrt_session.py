"""The engines of one target, opened on one device: canvases to draw on, and engines for host arrays."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

from latentrt.engines.canvas import DECODER, DECODERS, UNET, CanvasShape
from latentrt.engines.device import Device
from latentrt.engines.errors import EngineError
from latentrt.engines.manifest import EngineRecord
from latentrt.engines.residuals import PREFIX
from latentrt.engines.spec import EngineSpec
from latentrt.engines.tensorrt_canvas import SLOTS, Programs, TensorRTCanvas
from latentrt.engines.tensorrt_engine import TensorRTEngine
from latentrt.engines.tensorrt_profiles import Origin
from latentrt.engines.tensorrt_run import Place, Program, Scratch, open_programs
from latentrt.engines.work_queue import WorkQueue

# Canvases that are kept: each holds its contexts, buffers and graphs.
KEPT_CANVASES = 4


def open_tensorrt(
    library: ModuleType,
    directory: Path,
    record: EngineRecord,
    device: Device,
    *,
    factor: int,
    components: Sequence[str] | None = None,
    graphs: bool = True,
    canvases: int = KEPT_CANVASES,
    slots: int = SLOTS,
) -> TensorRTSession:
    """Open the compiled engines in `directory`, read from all files at once.

    library: tensorrt, tensorrt_lean, tensorrt_dispatch or tensorrt_rtx, of the version that the record's key names
    directory, record: what `find_engines` returns; files are not hashed here
    device: a `CudaDevice`, which is proof that a driver answers
    factor: how many pixels an element of the latents is wide, as the manifest says
    components: the ones to open, None for all
    graphs: whether passes are recorded as CUDA graphs
    canvases: how many shapes are kept ready; the one that was used longest ago makes room
    slots: how many stages a canvas can have on their way to the device; see `tensorrt_canvas.SLOTS`
    Raises EngineError with the library's own words, BundleError where a file cannot be read.
    """
    origin = Origin(bundle=directory.parent.parent, backend=record.key.backend, factor=factor)
    names = tuple(record.entries) if components is None else tuple(components)
    plans = {name: (directory / record.entries[name], record.specs[name]) for name in names}
    return TensorRTSession(library, plans, device, origin, graphs=graphs, canvases=canvases, slots=slots)


class TensorRTSession:
    """Opened engines with the stream that all of them run in and the scratch memory that they share.

    What it hands out is closed with it. Threads may share it: work of one waits until the other's is in the queue.
    """

    def __init__(
        self,
        library: ModuleType,
        plans: Mapping[str, tuple[Path, EngineSpec]],
        device: Device,
        origin: Origin,
        *,
        graphs: bool = True,
        canvases: int = KEPT_CANVASES,
        slots: int = SLOTS,
    ) -> None:
        if min(canvases, slots) < 1:
            raise EngineError(f"canvases and slots: found {canvases} and {slots}, expected 1 or more")
        start = time.perf_counter()
        self._origin, self._kept, self._slots = origin, canvases, slots
        self._programs: dict[str, Program] = open_programs(library, plans)
        queue = WorkQueue(device)
        self._place = Place(queue=queue, scratch=Scratch(queue), graphs=graphs)
        self._canvases: OrderedDict[tuple[CanvasShape, str], TensorRTCanvas] = OrderedDict()
        self._engines: list[TensorRTEngine] = []
        self._closed = False
        self.load_s = time.perf_counter() - start

    def canvas(self, shape: CanvasShape, *, denoiser: str = UNET, decoder: str | None = DECODER) -> TensorRTCanvas:
        """Return a blank canvas for a shape: the same one every time, wiped, while it is kept.

        denoiser: the network that its stages run
        decoder: what its pixels come from; None where they come from elsewhere: it then takes no memory for any
        Raises EngineError where the engines are not compiled for it, with the command that builds them, and where
        the device has no room.
        """
        with self._place.queue.lock:
            self._check_open()
            key = (shape, denoiser)
            if key not in self._canvases:
                while len(self._canvases) >= self._kept:
                    _, oldest = self._canvases.popitem(last=False)
                    oldest.close("made room for another shape; ask for it again, or keep more canvases")
                programs = self._drawing(denoiser)
                self._canvases[key] = TensorRTCanvas(self._place, programs, shape, self._origin, slots=self._slots)
            self._canvases.move_to_end(key)
            self._canvases[key].wipe()
            self._canvases[key].decode_with(decoder)
            return self._canvases[key]

    def _drawing(self, denoiser: str) -> Programs:
        if denoiser not in self._programs:
            raise EngineError(f"drawing needs {denoiser}, opened are {', '.join(self._programs)}")
        return Programs(
            unet=self._programs[denoiser],
            decoders={name: self._programs[name] for name in DECODERS if name in self._programs},
            text_encoder=self._programs.get("text_encoder"),
            controlnets={name: one for name, one in self._programs.items() if name.startswith(PREFIX)},
        )

    def engine(self, component: str) -> TensorRTEngine:
        """Return a fresh engine for host arrays. Raises EngineError where the component was not opened."""
        self._check_open()
        program = self._programs.get(component)
        if program is None:
            raise EngineError(f"there is no {component} here, opened are {', '.join(self._programs)}")
        engine = TensorRTEngine(self._place, program, self._origin)
        self._engines = [*(one for one in self._engines if not one.closed), engine]
        return engine

    def refit(self, component: str, exchange: Callable[[Program, int], None]) -> None:
        """Exchange weights of an engine: `exchange` is given it and the stream in which to queue that.

        Canvases are closed and passes are made anew: that recorded ones see new weights is promised nowhere.
        """
        with self._place.queue.lock:
            self._check_open()
            while self._canvases:
                self._canvases.popitem()[1].close("had other weights; ask for it again")
            for engine in self._engines:
                engine.forget()
            self._place.queue.drain()
            exchange(self._programs[component], self._place.queue.stream)
            self._place.queue.drain()

    def warm_up(self, shape: CanvasShape) -> dict[str, float]:
        """Make the canvas for a shape and run all of it; return the device's seconds by pass."""
        return self.canvas(shape).warm_up()

    @property
    def scratch_bytes(self) -> int:
        """Return how much device memory the engines share for what they compute on the way."""
        return self._place.scratch.size

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"the engines of '{self._origin.bundle}' are closed; open the bundle again")

    def close(self) -> None:
        """Wait for the queue and free everything: contexts and graphs, engines, scratch memory, the stream."""
        with self._place.queue.lock:
            if self._closed:
                return
            self._closed = True
            while self._canvases:
                self._canvases.popitem()[1].close()
            while self._engines:
                self._engines.pop().close()
            self._programs.clear()
            self._place.scratch.close()
            self._place.queue.drain()
            self._place.queue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
