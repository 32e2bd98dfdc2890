"""The application behind uvicorn, until a signal ends it."""

from __future__ import annotations

import uvicorn

from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models


def run(models: Models, *, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM."""
    config = uvicorn.Config(build(models), host=host, port=port, server_header=False, access_log=False)
    uvicorn.Server(config).run()
