"""What a service is told when it starts, and what it keeps to."""

from __future__ import annotations

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
    """

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a service serves.

    slots, waiting, slo: as in `BatcherOptions`, for each model
    aliases: further names of models, as clients with a name of their own ask for them
    limits: of one request; access: who may ask
    """

    slots: int = 8
    waiting: int = 64
    slo: float | None = None
    aliases: dict[str, str] = {}
    limits: Limits = Limits()
    access: Access = Access()
