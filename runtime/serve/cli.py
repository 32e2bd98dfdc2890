"""`latentrt serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentrt.engines.errors import NotInstalledError, RequestError
from latentrt.runtime.cli_options import LOADING, options_of
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions

INSTALL = "pip install 'latentrt[serve]'"


class Named(click.ParamType[tuple[str, str]]):
    """`NAME=VALUE`."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, equals, named = str(value).partition("=")
        if not (name and equals and named):
            self.fail(f"found '{value}', expected NAME=VALUE", param, ctx)
        return name, named


@click.command
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, help="The port; 0 for any that is free.")
@click.option("--slots", default=8, show_default=True, help="Pictures that are drawn together, at the most.")
@click.option("--waiting", default=64, show_default=True, help="Pictures that may wait, at the most.")
@click.option("--slo", type=float, default=None, help="Promise this many times a picture's own time alone.")
@click.option("--alias", "aliases", type=Named(), multiple=True, help="A further name of a model: gpt-image-1=NAME.")
@options_of(LOADING)
def serve(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    slots: int,
    waiting: int,
    slo: float | None,
    aliases: tuple[tuple[str, str], ...],
    embeddings: tuple[Path, ...],
    **loading: Any,
) -> None:
    """Serve BUNDLES over HTTP: OpenAI's Images API and more."""
    try:
        from latentrt.runtime.serve.server import run
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"the service needs '{error.name}'", install=INSTALL) from error
    options = ServeOptions(slots=slots, waiting=waiting, slo=slo, aliases=dict(aliases))
    with Models(_by_name(bundles), options, loading) as models:
        for path in embeddings:
            for model in models.all():
                model.pipe.add_embedding(path)
        run(models, host=host, port=port)


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
