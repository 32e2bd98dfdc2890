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


class NotFiniteError(EngineError):
    """What should become a picture has left the range of float32: nothing of the call is delivered.

    place: where it shows first, in words: `the text`, `the latents`, …
    stage: after how many of `stages` it shows, None where it is seen at the end alone or before the first
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


class RequestError(LatentrtError, ValueError):
    """What was asked of the runtime cannot be done: a size, a sampler, a prompt, a number of steps.

    Where a field of the request is at fault, the sentence begins with its name and a colon.
    """


class DeadlineError(LatentrtError, TimeoutError):
    """A request was not finished by its deadline."""
