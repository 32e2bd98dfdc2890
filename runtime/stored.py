"""Engines for the machine that a service finds itself on, from a store that machines of all kinds share."""

from __future__ import annotations

import os

from latentrt.engines.build import DEFAULTS, build_engines
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.find import choose_to_build, serves


def fetch_missing(bundle: str | os.PathLike[str], backend: str, *, store: str, device: int = 0) -> None:
    """Where a bundle holds no engines for this machine, fetch them by their key; build and publish what is not there.

    They are those that `latentrt build --store` without further options makes. So machines of different GPUs share one
    bundle, which may be read-only: then engines go into the user's cache.
    Raises EngineError (backend, store) and BundleError (files).
    """
    opened = Bundle.open(bundle)
    if not serves(backend, opened, device=device):
        chosen = choose_to_build(backend, DEFAULTS, device=device)
        build_engines(opened, chosen.backend, device=device, store=store)
