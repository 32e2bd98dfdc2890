"""The errors of latentrt: four kinds, and subclasses for what a program may want to tell apart.

`LatentrtError.retryable` says whether the same call may succeed later without any change by the caller.
"""

from latentrt.engines.errors import (
    BundleError,
    CancelledError,
    CheckpointError,
    ClosedError,
    DeadlineError,
    DeviceLostError,
    DrainingError,
    EngineError,
    LatentrtError,
    NestedCallError,
    NotFiniteError,
    NotInstalledError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
    WrongMachineError,
)

__all__ = [
    "BundleError",
    "CancelledError",
    "CheckpointError",
    "ClosedError",
    "DeadlineError",
    "DeviceLostError",
    "DrainingError",
    "EngineError",
    "LatentrtError",
    "NestedCallError",
    "NotFiniteError",
    "NotInstalledError",
    "OutOfMemoryError",
    "QueueFullError",
    "RequestError",
    "WrongMachineError",
]
