"""What Redis said when it did not do what it was asked, and what a person can do about it.

In: redis-py's exceptions. Out: StoreError with one stable sentence, and a log that says each thing once, not per retry.
"""

from __future__ import annotations

import logging
import re

import redis
from redis.exceptions import MovedError, NoPermissionError, OutOfMemoryError

from serve_app.errors import StoreError
from serve_app.index.keyspace import Keyspace

# As in: Command # 3 (XADD kv:{m}:log * r ...) of pipeline caused error: WRONGTYPE ...
_OF_PIPELINE = re.compile(
    r"Command # \d+ \((?P<command>\S+ ?\S*).*\) of pipeline caused error: (?P<error>.*)", re.DOTALL
)


def store_error(error: redis.RedisError | OSError, keys: Keyspace, command: str = "") -> StoreError:
    """The error to raise instead, with advice where only a person can help. `command`: if `error` does not name it."""
    text = f"{error} ({command})" if command and isinstance(error, redis.ResponseError) else str(error)
    if in_pipeline := _OF_PIPELINE.fullmatch(text):
        text = f"{in_pipeline['error']} ({in_pipeline['command']})"
    return StoreError(text, advice=_advice(error, text, keys), refused=isinstance(error, redis.ResponseError))


def _advice(error: Exception, text: str, keys: Keyspace) -> str:
    match error:
        case MovedError():
            return "this server is part of a Redis Cluster: write redis+cluster:// in the URL"
        case NoPermissionError():
            return "give this user the rights that cluster/redis/users.acl lists"
        case redis.AuthenticationError():
            return "set user and password, or the password_file, of the URL right"
        case redis.ReadOnlyError():
            return "this server is a replica: name the primary in the URL, or the Sentinels (redis+sentinel://)"
        case OutOfMemoryError():
            return "Redis is at its maxmemory: raise it, or remove what else is stored there"
    if "WRONGTYPE" in text:
        return (
            f"somebody else has written to our keys: {keys.domains} must be a hash, {keys.seqs} a hash, {keys.log} a "
            "stream (TYPE tells); delete the one that is not (DEL), it is written again"
        )
    if "MISCONF" in text:
        return "Redis cannot save to disk: make room there, or turn saving off (cluster/redis/valkey.conf)"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "name the CA that signed the server's certificate in the URL: ?ssl_ca_certs=/path"
    return ""


class FaultLog:
    """Logs every fault once until things go well again."""

    def __init__(self, logger: logging.Logger, consequence: str) -> None:
        self._logger = logger
        self._consequence = consequence
        self._said: set[str] = set()

    def failed(self, error: StoreError) -> None:
        what = error.advice or str(error)  # the command that fails may be another every time, the advice is not
        if what not in self._said:
            self._said.add(what)
            self._logger.warning("redis: %s; %s", error, self._consequence)

    @property
    def now(self) -> str:
        """What has failed and does not go well yet; empty: nothing."""
        return "; ".join(sorted(tuple(self._said)))  # noqa: C414  # a copy: the loop that it is of goes on

    def healed(self) -> None:
        if self._said:
            self._logger.info("redis answers again")
        self._said.clear()
