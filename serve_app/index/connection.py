"""A Redis (or Valkey) connection from a URL, with the time-outs that every user of it here relies on.

    redis://[user[:password]@]host[:port][/db]                          one server
    rediss://...                                                        the same through TLS
    unix://[user[:password]@]/path/to/socket                            one server, by its Unix socket
    redis+sentinel://[user[:password]@]host[:port],.../service[/db]     the primary that the Sentinels name
    redis+cluster://[user[:password]@]host[:port],...                   Redis Cluster, any of its nodes
    rediss+sentinel://...   rediss+cluster://...                        the same through TLS

Query, in every form: `password_file=/path` instead of a password (read at every connect, so a password can be changed),
and of redis-py's own settings `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile` and the other `ssl_...`, `username`,
`protocol`, `socket_timeout`, `socket_connect_timeout`, `socket_keepalive`, `health_check_interval`, `db`. For Sentinels
that ask for credentials of their own: `sentinel_username`, `sentinel_password`, `sentinel_password_file`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.credentials import CredentialProvider
from redis.retry import Retry
from redis.sentinel import Sentinel

from serve_app.errors import ConfigError
from serve_app.index.cluster import Address, slot_pool

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0  # longer than any blocking read

_PLAIN, _SENTINEL, _CLUSTER = "redis", "redis+sentinel", "redis+cluster"
_UNIX = "unix"
_PORTS = {_PLAIN: 6379, _CLUSTER: 6379, _SENTINEL: 26379}
_OWN_SETTINGS = frozenset({"password_file", "sentinel_username", "sentinel_password", "sentinel_password_file"})
_REDIS_PY_SETTINGS = frozenset(
    [
        "username",
        "password",
        "db",
        "protocol",
        "socket_timeout",
        "socket_connect_timeout",
        "socket_keepalive",
        "health_check_interval",
    ]
)
_ENCODE = "in a user or password, the characters : / ? # @ % are written as %3A %2F %3F %23 %40 %25"
_FILES = ("password_file", "sentinel_password_file", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class PasswordFile(CredentialProvider):
    """User and password, the latter read from a file at every connect."""

    def __init__(self, username: str | None, path: str) -> None:
        self._username = username
        self._path = Path(path)

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._path.read_text().rstrip("\r\n")
        except OSError as error:
            raise redis.AuthenticationError(f"password file {self._path}: {error.strerror}") from error
        return (self._username, password) if self._username else (password,)


def connect(url: str, *, name: str, slot_of: str = "") -> redis.Redis:
    """A client for one of the URLs above. Connects on first use; never retries by itself.

    Args:
        url: see the module.
        name: shown in `CLIENT LIST`.
        slot_of: any of the keys that it will be used for. In a Cluster it talks to the node that has this key's hash
            slot, so all keys must be of that slot.

    Raises:
        ConfigError: not such a URL, or a file that it names is not there.
    """
    try:
        client = _connect(url, name, slot_of)
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # connects to nothing yet; it looks at its settings
        return client
    except (ValueError, TypeError, redis.RedisError) as error:
        raise ConfigError(f"redis url {redact(url)!r}: {error}") from error


def redact(url: str) -> str:
    """The URL without its passwords, for logs. Of a URL that is none, it rather hides too much."""
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    userinfo, at, tail = rest.rpartition("@")
    if at:
        user, colon, _ = userinfo.partition(":")
        rest = f"{user}:***@{tail}" if colon else f"{userinfo}@{tail}"
    return re.sub(r"((?:^|[?&])\w*password=)[^&]*", r"\1***", f"{scheme}{separator}{rest}")


def answers(client: redis.Redis) -> bool:
    """Whether the server answers a PING now."""
    try:
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def leave_server(client: redis.Redis, error: Exception | None = None) -> None:
    """Have the next command connect anew, if it was Redis that said no.

    redis-py keeps a connection whose server answers, be it with an error. But that server may be a primary no more
    (READONLY), or not of the Cluster (CLUSTERDOWN), while its address already leads to another.
    """
    if error is None or isinstance(error, redis.ResponseError):
        client.connection_pool.disconnect(inuse_connections=False)


# -- inside -----------------------------------------------------------------------------------------------------------


def _connect(url: str, name: str, slot_of: str) -> redis.Redis:
    parts = urlsplit(url)
    scheme, tls = parts.scheme, False
    if scheme.startswith("rediss"):
        scheme, tls = scheme.replace("rediss", "redis", 1), True
    if scheme not in {_UNIX, *_PORTS}:
        raise ValueError("it must begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://")
    settings = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.fragment or any("@" in text for text in (parts.path, *settings)):
        raise ValueError(_ENCODE)  # before any message quotes what may be a part of a password
    _check_settings(settings, tls)
    own = {key: settings.pop(key) for key in _OWN_SETTINGS & settings.keys()}
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": ANSWER_TIMEOUT_S,
        "client_name": name,
        "retry": None,
        # Values by redis-py's own rules; where to connect to is ours.
        **parse_url(f"redis://?{urlencode(settings)}"),
        **_credentials(parts, settings, own.get("password_file")),
    }
    if scheme == _UNIX:
        if not parts.path or parts.netloc.rpartition("@")[2]:
            raise ValueError("a Unix socket is given by its whole path, unix:///path/to/socket")
        return redis.Redis.from_url(f"unix://{parts.path}", **options)
    addresses = _addresses(parts, _PORTS[scheme])
    path = [unquote(part) for part in parts.path.split("/") if part]
    service = path.pop(0) if path and scheme == _SENTINEL else ""
    if path:
        options.setdefault("db", _database(path))
    if scheme == _SENTINEL:
        if not service:
            raise ValueError("the service that the Sentinels watch is missing: redis+sentinel://host:26379/SERVICE")
        return _sentinel(addresses, service, options, own, tls)
    if scheme == _CLUSTER:
        if options.get("db"):
            raise ValueError("a Redis Cluster has only database 0")
        if not slot_of:
            raise ValueError("in a Redis Cluster a client must know of which slot its keys are (`slot_of`)")
        return redis.Redis(connection_pool=slot_pool(addresses, slot_of, tls=tls, **options))
    if len(addresses) > 1:
        raise ValueError("several hosts need redis+sentinel:// or redis+cluster://")
    ((host, port),) = addresses
    connection = redis.SSLConnection if tls else redis.Connection
    pool = redis.ConnectionPool(connection_class=connection, host=host, port=port, **options)
    return redis.Redis(connection_pool=pool)


def _check_settings(settings: dict[str, str], tls: bool) -> None:
    for key in settings:
        if key not in _OWN_SETTINGS | _REDIS_PY_SETTINGS and not key.startswith("ssl_"):
            raise ValueError(f"unknown setting {key!r}")
        if key.startswith("ssl_") and not tls:
            raise ValueError(f"{key} needs TLS: write rediss:// (with two s)")
    for key in _FILES:
        if key in settings and not Path(settings[key]).is_file():
            raise ValueError(f"{key}: there is no file {settings[key]}")


def _credentials(parts: SplitResult, settings: dict[str, str], password_file: str | None) -> dict[str, Any]:
    userinfo = parts.netloc.rpartition("@")[0]
    user, _, password = (unquote(part) for part in userinfo.partition(":"))
    user, password = user or settings.get("username", ""), password or settings.get("password", "")
    if password_file is None:
        return {"username": user or None, "password": password or None}
    if password:
        raise ValueError("password and password_file exclude each other")
    return {"username": None, "password": None, "credential_provider": PasswordFile(user or None, password_file)}


def _addresses(parts: SplitResult, default_port: int) -> list[Address]:
    addresses = []
    for text in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{text}")
        try:
            port = one.port
        except ValueError:
            raise ValueError(f"the port is no number; {_ENCODE}") from None
        if not one.hostname:
            raise ValueError("a host is missing")
        addresses.append((one.hostname, port or default_port))
    return addresses


def _database(path: Iterable[str]) -> int:
    text = "/".join(path)
    if not text.isdigit():
        raise ValueError(f"the database must be a number, not {text!r}")
    return int(text)


def _sentinel(
    addresses: list[Address], service: str, options: dict[str, Any], own: dict[str, str], tls: bool
) -> redis.Redis:
    """Ask the Sentinels for the primary at every connect, and leave a server that is no primary any more."""
    shared = {key: value for key, value in options.items() if key.startswith(("socket_", "ssl_"))} | {"ssl": tls}
    sentinels: dict[str, Any] = {**shared, "retry": Retry(NoBackoff(), 0)}
    if (path := own.get("sentinel_password_file")) is not None:
        sentinels["credential_provider"] = PasswordFile(own.get("sentinel_username"), path)
    elif "sentinel_password" in own:
        sentinels |= {"username": own.get("sentinel_username"), "password": own["sentinel_password"]}
    manager = Sentinel(addresses, sentinel_kwargs=sentinels)
    client: redis.Redis = manager.master_for(service, **options, ssl=tls)
    return client
