"""What a service is told when it starts, and what it keeps to."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one request may ask for at the most: more is refused before any work is done.

    pixels: of one picture, and of an image that is sent; steps: of the sampler; pictures: in one request
    body_bytes: of a request's body
    """

    pixels: int = 2048 * 2048
    steps: int = 150
    pictures: int = 10
    body_bytes: int = 64 * 2**20


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Who may use a service.

    hosts: names that it is known by, beside localhost and IP addresses; `*` for any name, as behind a proxy that checks
    origins: of pages of other sites that may use it, as in https://draw.example
    keys: one of them must be sent with every request; none for whoever reaches the service
    proxies: addresses and networks whose X-Forwarded-Proto and X-Forwarded-For are believed; nobody else's are
    """

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()


class ConnectionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What connections may take, in number and in seconds.

    connections: in all; per_address: of one address
    head_s, body_s: until a request's head, and its body, has come; rest_s: of a body that was refused
    reader_s: of a reader who takes nothing, or next to nothing, of what is sent
    idle_s: between two requests; longer than the minute after which proxies close theirs
    """

    connections: int = 1000
    per_address: int = 256
    head_s: float = 15.0
    body_s: float = 60.0
    rest_s: float = 5.0
    reader_s: float = 30.0
    idle_s: float = 75.0


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a service serves.

    slots, waiting, slo: as in `BatcherOptions`, for each model
    aliases: further names of models, as clients with a name of their own ask for them
    memory: bytes that all loaded models may take; None for all of them at once
    room_s: how long a model waits until another one has nothing to do and can make room for it, in seconds
    self_test: draw a small picture with a model before it is served
    hang_s: how long a stage may take before the service counts as hung, in seconds
    drain_s: how long what was accepted may take once the service is told to end, in seconds
    log_prompts: whether the log holds them
    limits: of one request; access: who may ask; connecting: of connections
    loras: a folder of safetensors files that requests may name; None for no LoRAs
    pictures: a folder in which pictures are kept for an hour, for clients that ask for their `url`; None to refuse them
    """

    slots: int = 8
    waiting: int = 64
    slo: float | None = None
    aliases: dict[str, str] = {}
    memory: int | None = None
    room_s: float = 30.0
    self_test: bool = True
    hang_s: float = 120.0
    drain_s: float = 300.0
    log_prompts: bool = False
    limits: Limits = Limits()
    access: Access = Access()
    connecting: ConnectionLimits = ConnectionLimits()
    loras: Path | None = None
    pictures: Path | None = None
