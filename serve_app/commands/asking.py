"""Questions to the Score API: of the graph (http://HOST:8000/kvcache), or of the score service (http://HOST:8100)."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from serve_app.access import own_key_header
from serve_app.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000/kvcache"
_START = "`kvcache up` starts a gateway, `kvcache serve-scores --embedded --model MODEL` a score service"
_ADVICE = f"does the kvcache application (build_kvcache) run there? --url is its route prefix; {_START}"

UrlOption = Annotated[
    str,
    typer.Option(
        help=f"The graph's application or the score service; default: what `kvcache up` started, else {DEFAULT_URL}.",
        show_default=False,
    ),
]


def endpoint(url: str, name: str) -> str:
    """Where to ask for `name`.

    Args:
        url: of the API, or of any of its endpoints; "" means what `kvcache up` started.
    """
    from serve_app import local_stack

    if not url:
        running = local_stack.current()
        url = f"{running.url}{running.graph}" if running is not None and running.graph is not None else DEFAULT_URL
    base = url.rstrip("/")
    return base if "/v1/" in urlsplit(base).path else f"{base}/v1/{name}"


def ask(method: str, url: str, **more: Any) -> tuple[int, Any]:
    """Status and JSON of an endpoint.

    Raises:
        ConfigError: nobody answers, or somebody else does.
    """
    import httpx

    try:
        answer = httpx.request(method, url, timeout=60, headers=own_key_header(), **more)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"{url} does not answer ({error}); {_ADVICE}") from error
    if answer.status_code == httpx.codes.NOT_FOUND and b'"error"' not in answer.content:  # the API's own has one
        raise ConfigError(f"there is no such endpoint at {url} (404); {_ADVICE}")
    try:
        return answer.status_code, answer.json()
    except ValueError as error:
        raise ConfigError(f"{url} answers {answer.status_code}, and not in JSON; {_ADVICE}") from error


def get(url: str, **params: Any) -> Any:
    """JSON of an endpoint that shows something.

    Raises:
        ConfigError: it does not; the message has what it says.
    """
    status, answer = ask("GET", url, params=params)
    if status >= 400:
        raise ConfigError(f"{url} answers {status}: {json.dumps(answer)}")
    return answer
