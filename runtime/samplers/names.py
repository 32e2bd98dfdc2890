"""What a sampler is called: canonical names, the community's, diffusers' classes, each with a spacing or without."""

from __future__ import annotations

import difflib
import functools
import re
from typing import NamedTuple

from latentrt.engines.errors import RequestError
from latentrt.engines.manifest import OwnSampler, TrainingSchedule
from latentrt.runtime.samplers.catalogue import SAMPLERS
from latentrt.runtime.spacings import SPACINGS

OWN = "own"  # the checkpoint's own scheduler, with what its config sets


class Name(NamedTuple):
    """A sampler's line in the table, and the spacing of sigmas that its name asks for.

    own: whether a checkpoint's config sets more than a name can say, as in `own:dpmpp_2m_karras`
    """

    sampler: str
    spacing: str | None
    own: bool = False

    def __str__(self) -> str:
        plain = self.sampler if self.spacing is None else f"{self.sampler}_{self.spacing}"
        return f"{OWN}:{plain}" if self.own else plain


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


def choose_sampler(name: str | None, schedule: TrainingSchedule) -> OwnSampler:
    """Return what a name means for a checkpoint: its own scheduler for None, `own` and `own:…`, else a plain sampler.

    Raises RequestError where there is no such sampler, or where the checkpoint's own is another one.
    """
    if name is None or name == OWN:
        return own_sampler(schedule)
    if not name.startswith(f"{OWN}:"):
        plain = find(name)
        return OwnSampler(name=plain.sampler, spacing=plain.spacing)
    wanted, own = find(name.removeprefix(f"{OWN}:")), own_sampler(schedule)
    if wanted != Name(own.name, own.spacing):
        raise RequestError(f"sampler: found '{name}', and this checkpoint's own is '{Name(own.name, own.spacing)}'")
    return own


def own_sampler(schedule: TrainingSchedule) -> OwnSampler:
    """Return the checkpoint's own scheduler. Raises RequestError when it is not known."""
    if schedule.sampler is not None:
        return schedule.sampler
    name = find(schedule.scheduler)  # a bundle of an older version, which kept the class alone
    return OwnSampler(name=name.sampler, spacing=name.spacing)


@functools.cache
def _known() -> dict[str, Name]:
    plain = {_squash(n): key for key, s in SAMPLERS.items() for n in (key, s.title, *s.aliases)}
    names = {n: Name(key, None) for n, key in plain.items()}
    for spacing in SPACINGS:
        names |= {n + _squash(spacing): Name(key, spacing) for n, key in plain.items() if SAMPLERS[key].spaced}
    return names


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
