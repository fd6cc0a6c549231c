"""An engine's HTTP server, asked with limits of time and size, whatever it answers.

In: its base URL. Out: status and body, or `EngineAway`: a turn of a loop that asks is never longer than its limit.
"""

from __future__ import annotations

import ssl
import time
from typing import Any, NamedTuple

import httpx
import msgspec

from serve_app.errors import ConfigError, EngineAway

TIMEOUT_S = 10.0
BODY_MAX_BYTES = 16 << 20
KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own, for `--api-key`


class Answer(NamedTuple):
    """An HTTP answer: its status and its body."""

    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status == httpx.codes.OK

    def json(self) -> Any:
        """None, if it is not JSON."""
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError:
            return None


class EngineServer:
    """Args:
    url: where the server's API is, with or without `/v1`.
    api_key: vLLM's `--api-key`; empty: it has none.

    Raises:
        ConfigError: that is no URL.
    """

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"--server {url!r} is no URL ({error}): write http://HOST:PORT") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"--server {url!r} is no URL of a server: write http://HOST:PORT")
        self.host = parsed.host
        self.port = parsed.port or (443 if parsed.scheme == "https" else 80)
        self._client = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else None,
            trust_env=False,  # a proxy for the way out is none for the engine next door
            verify=ssl.create_default_context(),  # the system's CAs, or those of SSL_CERT_FILE
        )

    def close(self) -> None:
        self._client.close()

    def get(self, path: str, timeout_s: float = TIMEOUT_S) -> Answer:
        """Raises: EngineAway: see `post`."""
        return self._ask("GET", path, None, timeout_s)

    def post(self, path: str, body: object, timeout_s: float = TIMEOUT_S) -> Answer:
        """
        Args:
            path: below the base URL.
            body: sent as JSON.
            timeout_s: for the whole answer.

        Raises:
            EngineAway: nobody answers in time, or with a 5xx, or the answer is far too long.
        """
        return self._ask("POST", path, body, timeout_s)

    def _ask(self, method: str, path: str, body: object, timeout_s: float) -> Answer:
        deadline_s = time.monotonic() + timeout_s
        received = bytearray()
        try:
            with self._client.stream(method, path, json=body, timeout=timeout_s) as response:
                for chunk in response.iter_bytes():
                    received += chunk
                    if len(received) > BODY_MAX_BYTES:
                        raise EngineAway(f"{path} answers more than {BODY_MAX_BYTES >> 20} MiB")
                    if time.monotonic() > deadline_s:
                        raise EngineAway(f"{path} takes more than {timeout_s:g} s to answer")
                status = response.status_code
        except httpx.HTTPError as error:
            raise EngineAway(f"{path}: {str(error) or type(error).__name__}", refused=_is_refused(error)) from error
        if status >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise EngineAway(f"{path} answers {status}", status=status)
        return Answer(status, bytes(received))


def _is_refused(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False
