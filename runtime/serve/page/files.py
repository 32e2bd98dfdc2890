"""The page's own files."""

from __future__ import annotations

import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

DIRECTORY = Path(__file__).resolve().parent / "static"
TYPES = {  # not the system's table, which may say anything
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
REVALIDATED = "no-cache"  # asked for again by its ETag, so that a newer service never meets an older page


class Files(StaticFiles):
    """Starlette's static files, with types of their own."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        answer = super().file_response(full_path, stat_result, scope, status_code)
        answer.headers["cache-control"] = REVALIDATED
        if answer.status_code == 200:
            answer.headers["content-type"] = TYPES[Path(full_path).suffix]
        return answer


def routes() -> list[Route]:
    """Return the routes of the files: `/`, and `/page/…`."""
    files = Files(directory=DIRECTORY)

    async def show(web: Request) -> Response:
        whole = [pair for pair in web.scope["headers"] if pair[0] != b"range"]  # parts of these files are of no use
        web.scope["headers"] = whole
        return await files.get_response(web.path_params.get("file", "index.html"), web.scope)

    return [Route("/", show, methods=["GET"]), Route("/page/{file}", show, methods=["GET"])]
