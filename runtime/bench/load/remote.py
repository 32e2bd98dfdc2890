"""A server that answers OpenAI's Images API, as one more way of serving: asked over HTTP, with partial pictures."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from latentrt.engines.errors import LatentrtError, NotInstalledError, QueueFullError, RequestError
from latentrt.runtime.bench.load.arrivals import Item, prompt_of
from latentrt.runtime.bench.load.drive import Submit

if TYPE_CHECKING:
    import httpx2 as httpx

TIMEOUT_S = 300.0  # without a byte
FULL = 429
COMPLETED = ".completed"


@contextmanager
def server(url: str, key: str | None) -> Iterator[Submit]:
    """Serve by asking a server at a URL, such as http://127.0.0.1:8000; its first model draws.

    key: for the service, None for none. Raises RequestError where no such server answers, and NotInstalledError.
    """
    try:
        import httpx2 as httpx
    except ImportError:
        raise NotInstalledError("asking a server needs httpx2", install="pip install 'latentrt[bench]'") from None
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="latentrt-ask", daemon=True)
    thread.start()
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    client = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S, limits=limits)
    try:
        model = asyncio.run_coroutine_threadsafe(_first_model(client), loop).result()
        yield lambda number, item: asyncio.run_coroutine_threadsafe(_ask(client, model, number, item), loop)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise RequestError(f"url: found '{url}', expected one such as http://127.0.0.1:8000") from None
    finally:
        asyncio.run_coroutine_threadsafe(_end(client), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(client: httpx.AsyncClient) -> None:
    """Give up what is still asked for, and close the connections."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()


async def _first_model(client: httpx.AsyncClient) -> str:
    import httpx2 as httpx

    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.TransportError, httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        raise RequestError(f"url: {client.base_url} lists no models at /v1/models ({error}); start a server") from None


async def _ask(client: httpx.AsyncClient, model: str, number: int, item: Item) -> float | None:
    """Ask for a picture with one partial picture; return the seconds until that. Raises LatentrtError."""
    import httpx2 as httpx

    start, first = time.perf_counter(), None
    try:
        async with client.stream("POST", "/v1/images/generations", json=body_of(item, number, model)) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                raise _refusal(answer)
            async for event in events(answer.aiter_lines()):
                if "error" in event:
                    raise RequestError(f"the server failed: {event['error'].get('message')}")
                if str(event.get("type")).endswith(COMPLETED):
                    return first
                first = time.perf_counter() - start if first is None else first
    except httpx.TransportError as error:
        raise RequestError(f"the server did not answer: {error or type(error).__name__}") from None
    raise RequestError("the server ended its answer without a picture")


def body_of(item: Item, number: int, model: str) -> dict[str, Any]:
    """Return what OpenAI's API is asked for an item, with the fields that it does not have beside it."""
    body = {
        "model": model,
        "prompt": prompt_of(item, number),
        "size": None if item.size is None else "x".join(map(str, item.size)),
        "stream": True,
        "partial_images": 1,
        "seed": number if item.seed is None else item.seed,
        "steps": item.steps,
        "guidance": item.guidance,
        "sampler": item.sampler,
        "negative_prompt": item.negative_prompt,
    }
    return {name: value for name, value in body.items() if value is not None}


async def events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """Give the data of server-sent events; comments are passed over."""
    data: list[str] = []
    async for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].strip())
        elif not line and data:
            content, data = "\n".join(data), []
            if content != "[DONE]":
                yield json.loads(content)


def _refusal(answer: httpx.Response) -> LatentrtError:
    try:
        sentence = str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        sentence = answer.text[:200]
    if answer.status_code == FULL:
        return QueueFullError(sentence, retry_after_s=1.0)
    return RequestError(f"the server answered {answer.status_code}: {sentence}")
