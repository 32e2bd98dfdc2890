"""The errors that a user can fix, named for who can act on them. Any other exception is a bug in latentrt.

Four kinds: `CheckpointError`, `BundleError`, `EngineError` and `RequestError`. What a program may want to tell apart
is a subclass of one of them, and each says in `retryable` whether trying again can help.
"""

from __future__ import annotations

import copy
import re
from typing import Any, ClassVar, Self


def printable(sentence: str) -> str:
    """Return a sentence on one line: what a file or a library says in it may hold line ends and control characters."""
    if sentence.isprintable():
        return sentence
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in sentence)


class LatentrtError(Exception):
    """One sentence, on one line: what is wrong, where, and what to do. The command line prints it and exits with 2.

    retryable: whether the same call may succeed later without any change by the caller
    """

    retryable: ClassVar[bool] = False

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(sentence))

    def within(self, before: str) -> Self:
        """Return the same error, of the same kind and with the same fields, with words before its sentence."""
        found = copy.copy(self)
        found.args = (f"{before}{self}",)
        return found


def library_failed(error: BaseException) -> bool:
    """Tell whether a library failed on what it was given: with an Exception, or a panic of Rust, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _travel(error: LatentrtError) -> tuple[Any, ...]:
    """Return what pickles an error whose constructor makes its sentence: the sentence and the fields as they are."""
    return _rebuild, (type(error), error.args), error.__dict__


def _rebuild(kind: type[LatentrtError], args: tuple[Any, ...]) -> LatentrtError:
    error = kind.__new__(kind)
    error.args = args
    return error


class CheckpointError(LatentrtError):
    """The checkpoint to export is missing, incomplete, unsafe or of a kind that is not supported."""


class BundleError(LatentrtError):
    """A file of a bundle is missing, altered, truncated, from another version, or cannot be written."""


class EngineError(LatentrtError):
    """A backend is not installed, has no engine for this machine, or refused what it was given."""


class NotInstalledError(EngineError):
    """A library is missing, or too old. install: the command that installs it."""

    def __init__(self, sentence: str, *, install: str) -> None:
        self.install = install
        super().__init__(f"{sentence}; install it with: {install}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _travel(self)


class WrongMachineError(EngineError):
    """This machine cannot run it: no GPU answers, or the engines were built for another target.

    differences: what differs between here and there, as `field: ours here, theirs there`; empty if no GPU answers
    """

    def __init__(self, sentence: str, *, differences: tuple[str, ...] = ()) -> None:
        self.differences = differences
        super().__init__(sentence)


class OutOfMemoryError(EngineError, MemoryError):
    """The device, or the host where engines run on the CPU, has no memory left for this call."""

    retryable = True


class DeviceLostError(EngineError):
    """What this process has on a GPU is of no use any more, and nothing new can be put there until it is restarted.

    Either CUDA met an error in a kernel that no process recovers from, or the process is a fork of one that used CUDA.
    """


# The field that the sentence of a RequestError begins with.
FIELD = r"[a-z][a-z0-9]*(?:_[a-z]+)*(?=[:,] )"
# What ONNX Runtime's arenas and its CUDA provider, CUDA, cuDNN, cuBLAS and TensorRT say when memory runs out.
NO_ROOM = (
    r"(?i)out.?of.?memory|bad_alloc|bad allocation|failed to allocate memory|alloc_failed|could not be allocated"
    r"|smaller than requested bytes|cudaErrorMemoryAllocation"
)
SMALLER = "draw fewer or smaller pictures at once, decode in tiles, or end what else uses the memory"


# What the same say where CUDA met an error that the process cannot leave behind.
LOST = (
    r"(?i)illegal memory access|illegal instruction|misaligned address|unspecified launch failure|device-side assert"
    r"|launch timed out|uncorrectable (ECC|NVLink)|hardware stack error|invalid program counter"
)
RESTART = "the process is restarted"
FORKED = (
    "CUDA does not work in a process that was forked from one that has used it; start worker processes with "
    "'spawn', or fork before anything asks for a GPU"
)


def backend_error(sentence: str, words: str) -> EngineError:
    """Return what a library's failure is: OutOfMemoryError or DeviceLostError where its words say so.

    sentence: holds the words
    """
    if re.search(r"CUDA failure 3\b|cudaErrorInitializationError", words):
        return DeviceLostError(f"{sentence}; {FORKED}")
    if re.search(LOST, words):
        return DeviceLostError(f"{sentence}; nothing runs on this GPU until {RESTART}")
    return OutOfMemoryError(f"{sentence}; {SMALLER}") if re.search(NO_ROOM, words) else EngineError(sentence)


class ClosedError(EngineError):
    """A pipeline, engine or workspace is used after it was closed: load the bundle again."""


class NotFiniteError(EngineError):
    """Numbers of a picture have left the range of float32: the call returns no pictures.

    place: where it shows first, in words: `the text`, `the latents`, …
    stage: after how many of `stages` it shows, None if it is seen at the end alone or before the first
    pictures: which of the call's, counted from 0
    """

    def __init__(
        self,
        place: str,
        pictures: tuple[int, ...],
        *,
        stage: int | None = None,
        stages: int | None = None,
        advice: str = "",
    ) -> None:
        self.place, self.pictures, self.stage, self.stages = place, pictures, stage, stages
        which = ", ".join(str(picture + 1) for picture in pictures)
        when = f" at stage {stage} of {stages}" if stage else f" by the end of {stages} stages" if stages else ""
        super().__init__(f"picture {which}: {place} left the range of finite numbers{when}{advice}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _travel(self)


class RequestError(LatentrtError, ValueError):
    """What was asked of the runtime cannot be done: a size, a sampler, a prompt, a number of steps.

    If a field of the request is at fault, the sentence begins with its name: `size: …` or `controls, 'edges': …`.
    """

    @property
    def field(self) -> str | None:
        """Return the field that the sentence begins with, None if it names none."""
        head = re.match(FIELD, str(self))
        return head[0] if head else None


class NestedCallError(RequestError):
    """A pipeline was called from within one of its own calls on the same thread: it would wait for itself forever."""


class CancelledError(RequestError):
    """The caller cancelled the call before its pictures were finished."""


class DeadlineError(RequestError, TimeoutError):
    """A request was not finished by its deadline."""

    retryable = True


class QueueFullError(RequestError):
    """As many pictures wait as may. retry_after_s: when there is likely to be room"""

    retryable = True

    def __init__(self, sentence: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(sentence)

    def __reduce__(self) -> tuple[Any, ...]:
        return _travel(self)


class DrainingError(RequestError):
    """A batcher ends what it has begun and begins nothing new."""

    retryable = True
