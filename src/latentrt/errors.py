"""What latentrt raises for a user to mend: four kinds, and below them what a program may want to tell apart.

`LatentrtError.retryable` says whether the same call may succeed later though its caller changes nothing.
"""

from latentrt.engines.errors import (
    BundleError,
    CancelledError,
    CheckpointError,
    ClosedError,
    DeadlineError,
    EngineError,
    LatentrtError,
    NestedCallError,
    NotFiniteError,
    NotInstalledError,
    OutOfMemoryError,
    RequestError,
    WrongMachineError,
)

__all__ = [
    "BundleError",
    "CancelledError",
    "CheckpointError",
    "ClosedError",
    "DeadlineError",
    "EngineError",
    "LatentrtError",
    "NestedCallError",
    "NotFiniteError",
    "NotInstalledError",
    "OutOfMemoryError",
    "RequestError",
    "WrongMachineError",
]
