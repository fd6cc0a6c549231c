"""The page for people: static files of the package, which load nothing from anywhere else.

It is open even where keys are set. Its data is not: the page asks for the key.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # a new version is seen at once; what is unchanged is answered with 304
}


def page_routes() -> list[BaseRoute]:
    """The page itself, and its parts."""
    static = _Files(directory=str(files("serve_app.service") / "page"))

    async def index(request: Request) -> Response:
        return await static.get_response("index.html", request.scope)

    return [Route("/", index), Mount("/page", static)]


class _Files(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(HEADERS)
        return response
