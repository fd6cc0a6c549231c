"""What a vLLM server makes prompts with, asked over HTTP: for engines that Ray does not manage.

In: its own /tokenize. Out: the probes of identity.py. Its files are not seen, so they are not told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve_app.errors import ConfigError
from serve_app.prompts.identity import PROBES, digest_of_ids, probe_name

Tokenize = Callable[[dict[str, Any]], Any]
"""A body for /tokenize -> its answer as JSON; None if the server refuses it."""


def identity_of_server(tokenize: Tokenize, model: str) -> tuple[tuple[str, str], ...]:
    """Probes and their digests; those that the server refuses (no chat template, say) are left out.

    Args:
        tokenize: asks the server.
        model: a name that it serves its base model under.

    Raises:
        ConfigError: it answers none of the probes, or something else.
    """
    parts: dict[str, str] = {}
    for name, body in PROBES.items():
        answer = tokenize({"model": model, **body})
        if answer is None:
            continue
        try:
            parts[probe_name(name)] = digest_of_ids(answer["tokens"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ConfigError(f"/tokenize does not answer as vLLM does: {error!r}") from error
    if not parts:
        raise ConfigError(f"/tokenize knows no model {model!r}, or is not there (is it a vLLM server?)")
    return tuple(sorted(parts.items()))
