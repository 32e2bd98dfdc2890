"""What a sampler is called: canonical names, the community's, diffusers' classes, each with a spacing or without."""

from __future__ import annotations

import difflib
import functools
import re
from typing import NamedTuple

from latentrt.engines.errors import RequestError
from latentrt.engines.manifest import TrainingSchedule
from latentrt.runtime.samplers.catalogue import SAMPLERS
from latentrt.runtime.spacings import SPACINGS


class Name(NamedTuple):
    """A sampler's line in the table, and the spacing of sigmas that its name asks for."""

    sampler: str
    spacing: str | None

    def __str__(self) -> str:
        return self.sampler if self.spacing is None else f"{self.sampler}_{self.spacing}"


def sampler_names() -> tuple[str, ...]:
    """Return the canonical names, sorted: every sampler, and its Karras form where it has one.

    The other spacings make names in the same way: `dpmpp_2m_exponential`, `euler_ays`.
    """
    karras = [f"{name}_karras" for name, sampler in SAMPLERS.items() if sampler.spaced]
    return tuple(sorted([*SAMPLERS, *karras]))


def find(name: str) -> Name:
    """Return what a name means: `dpmpp_2m_karras`, `DPM++ 2M Karras`, `k_dpmpp_2m`, `EulerDiscreteScheduler`.

    Raises RequestError with the nearest name when there is none such.
    """
    squashed = _squash(name)
    known = _known()
    if squashed in known:
        return known[squashed]
    nearest = difflib.get_close_matches(squashed, known, n=1, cutoff=0.5)
    hint = f"did you mean '{known[nearest[0]]}'?" if nearest else "expected one of " + ", ".join(sampler_names())
    raise RequestError(f"sampler: unknown sampler '{name}'; {hint}")


def default_sampler(schedule: TrainingSchedule) -> str:
    """Return the canonical name of the checkpoint's own scheduler. Raises RequestError when it is not known."""
    return str(find(schedule.scheduler))


@functools.cache
def _known() -> dict[str, Name]:
    plain = {_squash(n): key for key, s in SAMPLERS.items() for n in (key, s.title, *s.aliases)}
    names = {n: Name(key, None) for n, key in plain.items()}
    for spacing in SPACINGS:
        names |= {n + _squash(spacing): Name(key, spacing) for n, key in plain.items() if SAMPLERS[key].spaced}
    return names


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
