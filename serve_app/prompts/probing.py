"""What a vLLM server makes prompts with, asked over HTTP: for engines that Ray does not manage.

In: its base URL. Out: the probes of identity.py, by its own /tokenize. Its files are not seen, so they are not told.
"""

from __future__ import annotations

import logging
import time

import httpx

from serve_app.errors import ConfigError
from serve_app.prompts.identity import PROBES, digest_of_ids, probe_name

logger = logging.getLogger(__name__)

WAIT_S = 600.0  # an engine of a large model takes minutes to start
_PAUSE_S = 1.0
_TIMEOUT_S = 30.0


def identity_of_server(url: str, model: str, wait_s: float = WAIT_S) -> tuple[tuple[str, str], ...]:
    """Probes and their digests; those that the server refuses (no chat template, say) are left out.

    Args:
        url: where the server's API is, with or without `/v1`.
        model: a name that it serves its base model under.
        wait_s: how long to wait until it answers.

    Raises:
        ConfigError: it does not answer, or answers none of the probes.
    """
    base = url.rstrip("/").removesuffix("/v1")
    parts: dict[str, str] = {}
    with httpx.Client(base_url=base, timeout=_TIMEOUT_S) as client:
        _wait(client, base, wait_s)
        for name, body in PROBES.items():
            try:
                answer = client.post("/tokenize", json={"model": model, **body})
                if answer.status_code == httpx.codes.OK:
                    parts[probe_name(name)] = digest_of_ids(answer.json()["tokens"])
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{base}/tokenize does not answer as vLLM does: {error!r}") from error
    if not parts:
        raise ConfigError(f"{base}/tokenize knows no model {model!r}, or is not there (is it a vLLM server?)")
    return tuple(sorted(parts.items()))


def _wait(client: httpx.Client, base: str, wait_s: float) -> None:
    deadline, told = time.monotonic() + wait_s, False
    while True:
        try:
            if client.get("/health").status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() >= deadline:
            raise ConfigError(f"no vLLM server answers at {base}/health within {wait_s:.0f} s; check --server")
        if not told:
            logger.info("waiting for the engine at %s", base)
            told = True
        time.sleep(_PAUSE_S)
