"""A Redis (or Valkey) connection from a URL, with the time-outs that every user of it here relies on."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

import redis

from serve_app.errors import ConfigError

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0  # longer than any blocking read


def connect(url: str, *, name: str) -> redis.Redis:
    """A client for `redis://`, `rediss://` (TLS) or `unix://`. Connects on first use; never retries by itself.

    Args:
        url: with user, password and database number as redis-py takes them.
        name: shown in `CLIENT LIST`.

    Raises:
        ConfigError: not such a URL.
    """
    try:
        return redis.Redis.from_url(
            url,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=ANSWER_TIMEOUT_S,
            client_name=name,
            retry=None,
        )
    except ValueError as error:
        raise ConfigError(f"redis url {redact(url)!r}: {error}") from error


def redact(url: str) -> str:
    """The URL without its password, for logs."""
    parts = urlsplit(url)
    if not parts.password:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def answers(client: redis.Redis) -> bool:
    """Whether the server answers a PING now."""
    try:
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False
