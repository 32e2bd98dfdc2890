"""Who may ask for what: looked at before anything else is done for a request."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentrt.runtime.serve.a1111 import errors as a1111
from latentrt.runtime.serve.options import Access
from latentrt.runtime.serve.web_errors import WebError, web_error

OPEN = ("/", "/healthz", "/readyz", "/favicon.ico")  # without a key: probes, and the page, which then asks for one
OPEN_BELOW = "/page/"  # what the page is made of
LOCAL = "localhost"
AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s/?#@:\\\[\]]+))(?::\d{0,5})?", re.ASCII)
SMALL, LONGEST = 2**20, 16  # bytes of a body that always have room; beyond them all have that of so many of the longest
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY: Mapping[str, str] = {
    "content-security-policy": CSP,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


def refusal(error: Exception, scope: Scope) -> JSONResponse:
    """Return an error as OpenAI's error object, and below A1111's path as its clients read it."""
    answer = web_error(error)
    body = a1111.body_of(answer) if own_path(scope).startswith(a1111.BELOW) else answer.body
    return JSONResponse(body, status_code=answer.status, headers=answer.headers)


class Guards:
    """Refuses what a foreign page, or somebody without a key, asks for, and bodies that are too long.

    body_bytes: what a body may have at the most, on every route; those that are in hand have 16 times as much together
    """

    def __init__(self, app: ASGIApp, *, access: Access, body_bytes: int) -> None:
        self._app = app
        self._access = access
        self._body_bytes = body_bytes
        self._held = 0  # bytes of the bodies in hand, beyond what is small
        self._digests = [_digest(key) for key in access.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
        except WebError as error:
            await refusal(error, scope)(scope, receive, secured)
            return
        with self._limited(receive) as limited:
            await self._app(scope, limited, secured)

    @contextmanager
    def _limited(self, receive: Receive) -> Iterator[Receive]:
        """Give a `receive` that raises WebError at the first bytes above a limit: 413, or 429 where it is of all."""
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            before, count = count, count + len(message.get("body", b""))
            self._held += max(0, count - SMALL) - max(0, before - SMALL)
            if count > self._body_bytes:
                raise _too_long(self._body_bytes)
            if self._held > LONGEST * self._body_bytes:
                raise WebError(
                    "this service has its hands full with what is sent to it; try again",
                    status=429,
                    code="too_much_at_a_time",
                    kind="rate_limit_error",
                    headers={"retry-after": "2"},
                )
            return message

        try:
            yield counted
        finally:
            self._held -= max(0, count - SMALL)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        check_host(headers, self._access)
        check_origin(scope["method"], headers, self._access)
        if self._digests and not _is_open(own_path(scope)):
            check_key(headers, self._digests)
        if _length(headers) > self._body_bytes:
            raise _too_long(self._body_bytes)


def check_host(headers: Headers, access: Access) -> None:
    """Refuse a name that the service is not known by. Raises WebError, 403.

    A page that has its own name resolve to this machine (DNS rebinding) is of the same origin to a browser, and only
    the Host header tells. It cannot do so with an IP address, so those are always known.
    """
    host = host_name(headers.get("host", ""))
    if "*" in access.hosts or host == LOCAL or host in {name.lower() for name in access.hosts} or _is_address(host):
        return
    raise WebError(
        f"host: this service is not known as '{host}'; whoever runs it can allow that name with --allow-host",
        status=403,
        code="host_not_allowed",
    )


def check_origin(method: str, headers: Headers, access: Access) -> None:
    """Refuse what another site's page sends, whatever the method. Raises WebError, 403."""
    origin = headers.get("origin")
    if origin is None:
        # Pages load images and scripts from elsewhere without an Origin; browsers then say where they stand to it.
        foreign = headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
        followed = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if not foreign or followed:
            return
    elif origin in access.origins or _same(origin, headers.get("host", "")):
        return
    raise WebError(
        f"origin: pages of '{origin or 'another site'}' may not use this service; whoever runs it can allow them "
        "with --allow-origin",
        status=403,
        code="origin_not_allowed",
    )


def check_key(headers: Headers, digests: list[bytes]) -> None:
    """Refuse who does not bring a key: as a bearer token, or as the password of Basic. Raises WebError, 401."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    key = _password(given) if scheme.lower() == "basic" else given.strip() if scheme.lower() == "bearer" else ""
    found = _digest(key)
    if not sum(hmac.compare_digest(found, one) for one in digests):  # all of them, so that time tells nothing
        raise WebError(
            "authorization: this service needs an API key, sent as 'Authorization: Bearer KEY', and this is none",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": 'Bearer realm="latentrt"'},
        )


def host_name(authority: str) -> str:
    """Return the host of `HOST[:PORT]`, in small letters and without the brackets of IPv6; "" where there is none."""
    found = AUTHORITY.fullmatch(authority)
    return (found[1] or found[2]).lower() if found else ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _same(origin: str, host: str) -> bool:
    """Tell whether an origin is this service as the client names it. A proxy may have turned https into http."""
    scheme, separator, authority = origin.partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme, "")
    return bool(separator and port) and authority.lower() in (host.lower(), host.lower().removesuffix(port))


def own_path(scope: Scope) -> str:
    """Return what is asked for, without the path that the application may be mounted at in another one."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_BELOW)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _password(given: str) -> str:
    try:
        return base64.b64decode(given, validate=True).decode("utf-8", "surrogateescape").partition(":")[2]
    except ValueError:  # letters that are none of base64, or of ASCII
        return ""


def _length(headers: Headers) -> int:
    text = headers.get("content-length", "")
    return int(text[:19]) if text.isascii() and text.isdigit() else 0


def _too_long(most: int) -> WebError:
    return WebError(f"the body has more than the {most} bytes that may be sent", status=413, code="body_too_large")
