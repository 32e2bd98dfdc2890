"""The errors a user can mend, named for who can act on them. Anything else that is raised is a bug of ours."""

from __future__ import annotations


class LatentrtError(Exception):
    """One sentence: what is wrong, where, and what to do. The command line prints it and exits with 2."""


class CheckpointError(LatentrtError):
    """The checkpoint to export is missing, incomplete, unsafe or of a kind that is not supported."""


class BundleError(LatentrtError):
    """A file of a bundle is missing, altered, truncated, from another version, or cannot be written."""


class EngineError(LatentrtError):
    """A backend is not installed, has no engine for this machine, or refused what it was given."""


class RequestError(LatentrtError, ValueError):
    """What was asked of the runtime cannot be done: a size, a sampler, a prompt, a number of steps."""


class DeadlineError(LatentrtError, TimeoutError):
    """A request was not finished by its deadline."""
