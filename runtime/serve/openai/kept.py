"""Answers in the making, which several may wait for, and finished ones, kept for who asks for the same again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import msgspec
from cachetools import TTLCache

from latentrt.engines.errors import CancelledError, EngineError
from latentrt.runtime.serve.web_errors import WebError

Start = Callable[[], Awaitable[AsyncIterator[bytes]]]
"""begins to make an answer: returns its parts once the request has been taken, and raises where it is not"""

KEPT, KEPT_BYTES, KEPT_S = 256, 128 * 2**20, 600.0


class Making:
    """An answer in the making. It goes on while anyone waits for it, and its parts stay for who comes later."""

    def __init__(self, start: Start) -> None:
        self.parts: list[bytes] = []
        self.taken = self.ended = self.left = False
        self.error: Exception | None = None
        self.readers = 0
        self._change = asyncio.Event()
        self.task = asyncio.create_task(self._make(start))

    async def _make(self, start: Start) -> None:
        try:
            parts = await start()
            self.taken = True
            self._tell()
            async for part in parts:
                self.parts.append(part)
                self._tell()
        except asyncio.CancelledError:
            self.error = CancelledError("nobody waits for this answer any more")
        except Exception as error:
            self.error = error
        except BaseException as error:  # a panic in a library: its readers are not to wait for ever
            self.error = EngineError(f"drawing was ended by {type(error).__name__}: {error}")
        self.ended = True
        self._tell()

    def _tell(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()

    async def changed(self) -> None:
        """Wait until there is more of it."""
        await self._change.wait()


class Reader:
    """One that waits for an answer. Leave it: when all have left, what is not made yet is not made any more."""

    def __init__(self, making: Making) -> None:
        self._making = making
        self._left = False
        making.readers += 1

    async def taken(self) -> None:
        """Wait until the request has been taken. Raises where it was not."""
        while not (self._making.taken or self._making.ended):
            await self._making.changed()
        if self._making.error is not None and not self._making.parts:
            raise self._making.error

    async def parts(self) -> AsyncIterator[bytes]:
        """Give the answer's parts, from the first on. Raises what making it raises."""
        making, number = self._making, 0
        while True:
            while number < len(making.parts):
                yield making.parts[number]
                number += 1
            if making.ended:
                break
            await making.changed()
        if making.error is not None:
            raise making.error

    async def whole(self) -> bytes:
        """Wait for all of it."""
        return b"".join([part async for part in self.parts()])

    def leave(self) -> None:
        """Wait no longer."""
        if self._left:
            return
        self._left = True
        self._making.readers -= 1
        if not self._making.readers and not self._making.ended:
            self._making.left = True
            self._making.task.cancel()


class Known(msgspec.Struct, frozen=True, eq=False):
    """An answer under a key. digest: of what was asked"""

    digest: bytes
    making: Making


class Kept:
    """Answers by idempotency key: in the making, and the last ones that were made, bounded in count, bytes and age.

    It belongs to one event loop.
    """

    def __init__(self, *, count: int = KEPT, most_bytes: int = KEPT_BYTES, age_s: float = KEPT_S) -> None:
        self._count = count
        self._under_way: dict[str, Known] = {}
        self._made: TTLCache[str, Known] = TTLCache(most_bytes, age_s, getsizeof=_size)

    def join(self, key: str | None, digest: bytes, start: Start) -> Reader:
        """Return a reader of the answer under a key, which is begun if there is none. None is nobody's key.

        Raises WebError, 409, where something else was asked for under the key.
        """
        if key is None:
            return Reader(Making(start))
        known = self._under_way.get(key) or self._made.get(key)
        if known is None or known.making.left:
            known = self._under_way[key] = Known(digest, Making(start))
            known.making.task.add_done_callback(partial(self._settle, key, known))
        elif known.digest != digest:
            raise WebError(
                "idempotency-key: another request was sent under it; give each request a key of its own",
                status=409,
                code="idempotency_key_reused",
                headers={"x-should-retry": "false"},
            )
        return Reader(known.making)

    def _settle(self, key: str, known: Known, _: object) -> None:
        if self._under_way.get(key) is not known:
            return  # all had left it, and somebody has begun it again
        del self._under_way[key]
        if known.making.error is None and _size(known) <= self._made.maxsize:
            self._made[key] = known
            while len(self._made) > self._count:
                self._made.popitem()


def _size(known: Known) -> int:
    return sum(map(len, known.making.parts))
