"""What goes wrong, as a status, a code and whether a client should try again."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from latentrt.engines.errors import (
    BundleError,
    CancelledError,
    ClosedError,
    DeadlineError,
    DeviceLostError,
    DrainingError,
    EngineError,
    LatentrtError,
    NotFiniteError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
)

logger = logging.getLogger(__name__)
Retry = Literal["client decides", "no", "later"]
LONGEST_WAIT_S = 60  # clients take a Retry-After above 120 for a refusal


class Known(msgspec.Struct, frozen=True):
    """How a kind of error is answered. kind: OpenAI's `type`"""

    status: int
    code: str
    kind: str
    retry: Retry


# The first that an error is an instance of. What is certain to fail again says `x-should-retry: false`, since clients
# try 408, 409, 429 and 5xx again by themselves.
KNOWN: Mapping[type[LatentrtError], Known] = {
    QueueFullError: Known(429, "queue_full", "rate_limit_error", "later"),
    DrainingError: Known(503, "draining", "server_error", "later"),
    DeadlineError: Known(504, "deadline_exceeded", "server_error", "no"),
    CancelledError: Known(499, "cancelled", "invalid_request_error", "no"),
    RequestError: Known(400, "invalid_value", "invalid_request_error", "client decides"),
    ClosedError: Known(503, "model_reloading", "server_error", "later"),
    OutOfMemoryError: Known(500, "out_of_memory", "server_error", "no"),
    NotFiniteError: Known(500, "not_finite", "server_error", "no"),
    DeviceLostError: Known(503, "device_lost", "server_error", "later"),
    EngineError: Known(500, "engine_failed", "server_error", "no"),
    BundleError: Known(500, "bundle_unreadable", "server_error", "no"),
}


class WebError(Exception):
    """A refusal: one sentence, and what a program reads of it.

    status: HTTP's; param: the field at fault, None if it is none; code: ours, for programs
    kind: OpenAI's `type`; headers: further ones of the answer
    """

    def __init__(
        self,
        sentence: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.code, self.param, self.kind = status, code, param, kind
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """Return it as OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def web_error(error: Exception) -> WebError:
    """Return how an error is answered; one that is none of ours is a fault in the service, which is logged."""
    if isinstance(error, WebError):
        return error
    known = next((known for kind, known in KNOWN.items() if isinstance(error, kind)), None)
    if known is None:
        logger.error("a request met an error of the service itself", exc_info=error)
        return WebError(
            "the service has met an error of its own, which its log describes",
            status=500,
            code="internal_error",
            kind="server_error",
        )
    return WebError(
        str(error),
        status=known.status,
        code=known.code,
        param=error.field if isinstance(error, RequestError) and known.status == 400 else None,
        kind=known.kind,
        headers=_retry(known.retry, error),
    )


def _retry(retry: Retry, error: Exception) -> dict[str, str]:
    if retry == "later":
        seconds = getattr(error, "retry_after_s", 1.0)
        return {"retry-after": str(min(LONGEST_WAIT_S, max(1, math.ceil(seconds))))}
    return {"x-should-retry": "false"} if retry == "no" else {}
