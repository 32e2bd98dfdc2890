"""The calls that are under way for a caller: how far they are, and an end to them."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request as WebRequest

from latentrt.runtime.request import Request
from latentrt.runtime.serve.jobs import Job, View
from latentrt.runtime.serve.models import Model


def caller_of(web: WebRequest) -> str:
    """Return who asks: A1111's API has no ids, and nobody may see or end what others draw."""
    host = web.client.host if web.client else ""
    return f"{host} {web.headers.get('authorization', '')}"


class Desk:
    """All calls that are under way, by who called. Used on the event loop's thread alone."""

    def __init__(self) -> None:
        self._jobs: dict[str, list[Job]] = {}

    @contextmanager
    def job(self, caller: str, model: Model, request: Request) -> Iterator[Job]:
        """Give a job that is seen under way while the block runs, and is cancelled when that ends."""
        job = Job(model, request, caller, lambda _: None)
        self._jobs.setdefault(caller, []).append(job)
        try:
            yield job
        finally:
            job.cancel()
            self._jobs[caller].remove(job)
            if not self._jobs[caller]:
                del self._jobs[caller]

    def interrupt(self, caller: str) -> None:
        """End a caller's calls within a stage: they answer with the pictures that are done."""
        for job in self._jobs.get(caller, ()):
            job.cancel()

    async def progress(self, caller: str, *, look: bool) -> dict[str, Any]:
        """Return how far a caller's calls are, as `/sdapi/v1/progress` gives it. look: with a preview"""
        jobs = list(self._jobs.get(caller, ()))
        image = await _preview(jobs) if look else None
        return _told([job.view() for job in jobs], image)


async def _preview(jobs: list[Job]) -> str | None:
    """Return the newest preview as base64 of a PNG; None where there is none, as in a bundle without previews."""
    for job in reversed(jobs):
        if previews := await job.previews():
            return base64.b64encode(max(previews.values())[1]).decode()
    return None


def _told(views: list[View], image: str | None) -> dict[str, Any]:
    step, steps = max(((view.step, view.steps) for view in views), default=(0, 0))
    progress = sum(view.progress for view in views) / max(1, len(views))
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "drawing" if views else "",
        "job_count": len(views),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "job_no": 0,
        "sampling_step": step,
        "sampling_steps": steps,
    }
    return {
        "progress": min(1.0, max(0.01, progress)) if views else 0.0,  # clients take 0 for "there is nothing under way"
        "eta_relative": max((view.eta_s or 0.0 for view in views), default=0.0),
        "state": state,
        "current_image": image,
        "textinfo": None,
    }
