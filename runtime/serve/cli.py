"""`latentrt serve`."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Any

import click

from latentrt.engines.errors import NotInstalledError, RequestError
from latentrt.runtime.cli_options import FILE, LOADING, options_of
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import Access, ConnectionLimits, Limits, ServeOptions

INSTALL = "pip install 'latentrt[serve]'"
API_KEYS = "LATENTRT_API_KEYS"


class Named(click.ParamType[tuple[str, str]]):
    """`NAME=VALUE`."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, equals, named = str(value).partition("=")
        if not (name and equals and named):
            self.fail(f"found '{value}', expected NAME=VALUE", param, ctx)
        return name, named


class Bytes(click.ParamType[int]):
    """A number of bytes: `8GiB`, `500MB`, `1000000`."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(value), re.IGNORECASE)
        if found is None:
            self.fail(f"found '{value}', expected bytes, as in 8GiB or 500MB", param, ctx)
        power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
        return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


class Network(click.ParamType[str]):
    """An address or a network: `10.0.0.7`, `10.0.0.0/8`."""

    name = "ADDRESS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return str(ipaddress.ip_network(str(value)))
        except ValueError:
            self.fail(f"found '{value}', expected an address or a network, as in 10.0.0.7 or 10.0.0.0/8", param, ctx)


COUNT = click.IntRange(min=1)
DRAWING = (
    click.option("--slots", type=COUNT, default=8, show_default=True, help="Pictures drawn together, at the most."),
    click.option("--waiting", type=COUNT, default=64, show_default=True, help="Pictures that may wait, at the most."),
    click.option("--slo", type=float, default=None, help="Promise this many times a picture's own time alone."),
    click.option(
        "--memory", type=Bytes(), default=None, help="All loaded models may take so much: 8GiB. Default: any."
    ),
    click.option("--self-test/--no-self-test", default=True, help="Draw a picture with a model before it is served."),
    click.option("--drain", default=300.0, show_default=True, help="Seconds for accepted work at the end."),
    click.option("--hang", default=120.0, show_default=True, help="Seconds of a stage after which /healthz fails."),
    click.option("--alias", type=Named(), multiple=True, help="A further name: gpt-image-1=NAME."),
)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
KEEPING = (
    click.option("--loras", type=FOLDER, default=None, help="A folder of LoRAs that requests may name."),
    click.option("--pictures", type=FOLDER, default=None, help="A folder to keep pictures in, for `url` as format."),
    click.option("--log-prompts", is_flag=True, help="Let the log hold prompts."),
)
LIMITS = (
    click.option("--max-pixels", type=COUNT, default=Limits().pixels, show_default=True, help="Of one picture."),
    click.option("--max-steps", type=COUNT, default=Limits().steps, show_default=True, help="Of one picture."),
    click.option("--max-n", type=COUNT, default=Limits().pictures, show_default=True, help="Pictures of a request."),
    click.option("--max-connections", type=COUNT, default=1000, show_default=True, help="In all."),
    click.option("--max-per-address", type=COUNT, default=256, show_default=True, help="Connections of one address."),
    click.option("--max-body", type=COUNT, default=Limits().body_bytes, show_default=True, help="Bytes of a request."),
)
ACCESS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on."),
    click.option("--port", default=8000, show_default=True, help="The port; 0 for any that is free."),
    click.option("--allow-host", multiple=True, help="A name that the service is known by; * for any."),
    click.option("--allow-origin", multiple=True, help="A site whose pages may use it: https://HOST."),
    click.option(
        "--trust-proxy", type=Network(), multiple=True, help="Believe this proxy who asks, and by TLS or not."
    ),
    click.option("--api-key-file", type=FILE, default=None, help=f"A file of keys, one a line; or set {API_KEYS}."),
    click.option("--no-key", is_flag=True, help="Serve other machines without a key."),
)


@click.command(context_settings={"auto_envvar_prefix": "LATENTRT_SERVE"})
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@options_of((*ACCESS, *DRAWING, *KEEPING, *LIMITS, *LOADING))
@click.option("--log-format", type=click.Choice(["json", "text"]), default="json", help="Of the log, on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when it is ready: address, models, pid.")
def serve(bundles: tuple[str, ...], embeddings: tuple[Path, ...], log_format: str, as_json: bool, **given: Any) -> None:
    """Serve BUNDLES over HTTP: OpenAI's Images API and more."""
    try:
        from latentrt.runtime.serve.operation.logs import set_up
        from latentrt.runtime.serve.server import address, bind, run
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"the service needs '{error.name}'", install=INSTALL) from error
    options, named = _options(given), _by_name(bundles)
    set_up(as_json=log_format == "json")
    with (
        bind(given.pop("host"), given.pop("port")) as listener,
        Models(named, options, given, embeddings, load=False) as models,
    ):
        run(models, listener, ready=lambda: _say(address(listener), models, as_json=as_json))


def _say(address: str, models: Models, *, as_json: bool) -> None:
    """Tell whoever started it that it answers."""
    ready = {"address": address, "models": models.names, "pid": os.getpid()}
    click.echo(json.dumps(ready) if as_json else f"serving {', '.join(models.names)} at {address}")


def _options(given: dict[str, Any]) -> ServeOptions:
    """Take what is not for loading a bundle out of the options. Raises RequestError."""
    limits = Limits(
        pixels=given.pop("max_pixels"),
        steps=given.pop("max_steps"),
        pictures=given.pop("max_n"),
        body_bytes=given.pop("max_body"),
    )
    keys, no_key, host = keys_of(given.pop("api_key_file")), given.pop("no_key"), given["host"]
    if not (keys or no_key or _is_loopback(host)):
        raise RequestError(
            f"host: '{host}' is reached from other machines, and there is no API key; give --api-key-file, or say "
            "--no-key"
        )
    origins = tuple(origin.lower().rstrip("/") for origin in given.pop("allow_origin"))  # as browsers send them
    hosts = (*given.pop("allow_host"), host)
    access = Access(hosts=hosts, origins=origins, keys=keys, proxies=given.pop("trust_proxy"))
    alike = ("slots", "waiting", "slo", "memory", "self_test", "log_prompts", "loras", "pictures")
    named = {name: given.pop(name) for name in alike}
    connecting = ConnectionLimits(connections=given.pop("max_connections"), per_address=given.pop("max_per_address"))
    return ServeOptions(
        **named,
        drain_s=given.pop("drain"),
        hang_s=given.pop("hang"),
        connecting=connecting,
        aliases=dict(given.pop("alias")),
        limits=limits,
        access=access,
    )


def _is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keys_of(file: Path | None) -> tuple[str, ...]:
    """Return the keys of a file and of the environment; lines that begin with # are none. Raises RequestError."""
    keys = os.environ.get(API_KEYS, "").replace(",", " ").split()
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"api_key_file: '{file}' cannot be read: {error}") from error
        keys += [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise RequestError(f"api_key_file: '{file}' has no key; write one a line")
    return tuple(keys)


def _by_name(bundles: tuple[str, ...]) -> dict[str, str]:
    """Return paths by their names: the directory's own where none is given. Raises RequestError."""
    named: dict[str, str] = {}
    for given in bundles:
        name, equals, path = given.rpartition("=")
        name = name if equals else Path(path).resolve().name
        if name in named:
            raise RequestError(f"bundles: two are called '{name}'; name them, as in first={named[name]}")
        named[name] = path
    return named
