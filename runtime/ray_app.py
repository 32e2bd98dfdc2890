"""The service on Ray Serve: `serve run latentrt.runtime.ray_app:app bundles=shapes=demo/shapes max_replicas=2`.

Each replica is the web application of `latentrt serve` with batchers of its own; Ray shares out requests, adds and
takes away replicas, and lets those that leave end what they have accepted.
"""

# No `from __future__ import annotations`: Ray reads the class of the builder's argument from its annotation.

import asyncio
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve.config import AutoscalingConfig
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentrt.engines.errors import EngineError, RequestError
from latentrt.runtime.serve.cli import keys_of
from latentrt.runtime.serve.models import Model, Models
from latentrt.runtime.serve.operation.routes import state_of
from latentrt.runtime.serve.options import Access, Limits, ServeOptions
from latentrt.runtime.stored import fetch_missing

SPARE = 64  # requests beside those that draw or wait: refusals, lists, probes, and who follows a job
ENDING_S = 30  # beyond what is drawn, for the last answers to be sent and the bundle to be closed
REQUEST_ID = "x-request-id"


class Args(BaseModel):
    """What the application is told, as arguments of `serve run` or in a config file of Serve.

    bundles: paths by the names of the models, as each machine of the cluster reaches them; aliases: further names.
        Either is a mapping, or in a command line NAME=PATH,NAME=PATH
    store: a URL from which engines come that a bundle does not hold for a replica's machine
    memory: bytes that the loaded models of a replica may take: those that have no room are loaded when they are asked
        for, and others make room; None to load all
    loras: a folder, on each machine, of LoRAs that requests may name
    slots, waiting, slo: as in `BatcherOptions`, for each model of a replica
    min_replicas, max_replicas: Ray keeps about `slots` requests on each between these; it adds and takes away replicas
        when there were more or fewer for so many seconds (upscale_delay_s, downscale_delay_s)
    cpus, gpus: what Ray reserves for a replica, which sees no other GPU; threads: of a CPU's engines
    drain_s: how long what was accepted may take when a replica is to leave: at least the longest request
    hosts, origins, api_key_file: as for `latentrt serve`; keys may be in LATENTRT_API_KEYS as well
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: dict[str, str] = Field(min_length=1)
    aliases: dict[str, str] = {}
    backend: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    store: str | None = None
    memory: int | None = Field(default=None, gt=0)
    loras: Path | None = None
    slots: int = Field(default=8, ge=1)
    waiting: int = Field(default=64, ge=1)
    slo: float | None = Field(default=None, gt=0)
    max_pixels: int = Field(default=Limits().pixels, ge=1)
    max_steps: int = Field(default=Limits().steps, ge=1)
    max_n: int = Field(default=Limits().pictures, ge=1)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    upscale_delay_s: float = Field(default=30, ge=0)
    downscale_delay_s: float = Field(default=600, ge=0)
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    drain_s: float = Field(default=300, gt=0)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    api_key_file: Path | None = None

    @field_validator("bundles", "aliases", mode="before")
    @classmethod
    def named(cls, given: object) -> object:
        """Read what a command line says."""
        if not isinstance(given, str):
            return given
        pairs = [pair.partition("=") for pair in given.split(",")]
        for name, _, value in pairs:
            if not (name and value):
                raise ValueError(f"found '{given}', expected NAME=VALUE, as in shapes=demo/shapes")
        return {name: value for name, _, value in pairs}

    @property
    def options(self) -> ServeOptions:
        """Return what the web application keeps to. Raises RequestError where there is no file of keys."""
        return ServeOptions(
            slots=self.slots,
            waiting=self.waiting,
            slo=self.slo,
            memory=self.memory,
            loras=self.loras,
            aliases=self.aliases,
            drain_s=self.drain_s,
            limits=Limits(pixels=self.max_pixels, steps=self.max_steps, pictures=self.max_n),
            access=Access(hosts=self.hosts, origins=self.origins, keys=keys_of(self.api_key_file)),
        )

    @property
    def deployment(self) -> dict[str, Any]:
        """Return what Ray keeps to.

        All requests go to a replica, which says itself when its queue is full: Ray would answer without Retry-After.
        """
        return {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=self.min_replicas,
                max_replicas=self.max_replicas,
                target_ongoing_requests=self.slots,
                upscale_delay_s=self.upscale_delay_s,
                downscale_delay_s=self.downscale_delay_s,
            ),
            "max_ongoing_requests": self.slots + self.waiting + SPARE,
            "max_queued_requests": -1,
            "graceful_shutdown_timeout_s": self.drain_s + ENDING_S,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }


class ReplicaModels(Models):
    """The models of one replica. Ray is told which of them are loaded, so that requests for a model go where it is."""

    async def find(self, name: str | None) -> Model:
        """Return a model as `Models.find` does."""
        model = await super().find(name)
        await serve.get_replica_context().servable_object.loaded(model.name)
        return model


def app(args: Args) -> serve.Application:
    """Return the application that `serve run`, `serve deploy` and `serve.run` deploy. Raises RequestError."""
    check(args)

    def web() -> Starlette:
        from latentrt.runtime.serve.app import build  # in a replica, not where the application is deployed from

        if args.store is not None:
            for bundle in args.bundles.values():
                fetch_missing(bundle, args.backend, store=args.store)
        loading = {"backend": args.backend, "threads": args.threads}
        web_app = build(ReplicaModels(args.bundles, args.options, loading))
        web_app.add_middleware(ProxyIds)
        return web_app

    class LatentRT:
        """A replica. `serve.ingress` gives it `app`, which is what `web` returned."""

        app: Starlette

        @serve.multiplexed(max_num_models_per_replica=-1)  # type: ignore[untyped-decorator]
        async def loaded(self, name: str) -> str:
            return name

        def check_health(self) -> None:
            check_health(self.app.state.models)

        async def __del__(self) -> None:
            if not hasattr(self, "app"):  # its bundles were not loaded
                return
            models: Models = self.app.state.models
            await asyncio.to_thread(models.drain)
            await asyncio.to_thread(models.close)

    return serve.deployment(**args.deployment)(serve.ingress(web)(LatentRT)).bind()


def check_health(models: Models) -> None:
    """Raise EngineError if a model hangs or has lost its device: then Ray puts another replica in this one's place."""
    for model in models.all():
        if (state := state_of(model, models.options.hang_s)) != "ok":
            raise EngineError(f"'{model.name}': {state}")


class ProxyIds:
    """Lets a request keep the id that Ray's proxy has given it, and adds to its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        number = Headers(scope=scope).get(REQUEST_ID, "") if scope["type"] == "http" else ""
        if not re.fullmatch(r"[\w-]{1,64}", number, flags=re.ASCII):
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["request_id"] = number

        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID]
            await send(message)

        await self._app(scope, receive, once)


def check(args: Args) -> None:
    """Refuse what could only fail in a replica later. Raises RequestError."""
    for alias, name in args.aliases.items():
        if name not in args.bundles:
            raise RequestError(f"aliases: '{alias}' stands for '{name}'; there are: {', '.join(args.bundles)}")
    if args.max_replicas < args.min_replicas:
        raise RequestError(f"max_replicas: found {args.max_replicas}, expected {args.min_replicas} at least")
