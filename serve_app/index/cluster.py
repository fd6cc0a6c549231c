"""Redis Cluster, for a client all of whose keys are in one hash slot: an ordinary connection to the slot's owner.

In: some of the nodes and a key. Out: a connection pool for `redis.Redis`, as redis-py's own SentinelConnectionPool is.

redis-py's RedisCluster connects to every node when it is made, and sends a transaction again after an error although it
may have been applied. With one slot there is one node to talk to, so none of that is needed: at every connect the
nodes are asked who owns the slot (`CLUSTER SLOTS`), and a connection whose node answers MOVED is closed. So
transactions, WATCH, MGET and blocking reads work as on a single server, and so does the way errors are dealt with.
"""

from __future__ import annotations

from typing import Any

import redis
from redis.crc import key_slot
from redis.exceptions import MovedError, NoPermissionError

Address = tuple[str, int]


def slot_pool(seeds: list[Address], key: str, *, tls: bool, **options: Any) -> redis.ConnectionPool:
    """Connections to the primary that owns the slot of `key`.

    Args:
        seeds: nodes to ask; more are learned from what they answer.
        key: name of any key of the slot.
        tls: also between the nodes: they must announce their TLS ports.
        options: of redis-py's Connection.
    """
    plain = redis.SSLConnection if tls else redis.Connection
    owner = SlotOwner(seeds, key_slot(key.encode()), plain, options)
    return redis.ConnectionPool(
        connection_class=_SlotSSLConnection if tls else _SlotConnection, slot_owner=owner, **options
    )


class SlotOwner:
    """Who owns the slot, according to the nodes."""

    def __init__(
        self, seeds: list[Address], slot: int, connection_class: type[redis.Connection], options: dict[str, Any]
    ) -> None:
        self.slot = slot
        self._seeds = list(seeds)
        self.nodes = list(seeds)  # to ask, the one that answered last first
        self._connection_class = connection_class
        self._options = options

    def ask(self, node: Address) -> Address:
        """The owner, as one node has it.

        Raises:
            redis.RedisError: it did not answer, or it knows of no owner.
        """
        host, port = node
        pool = redis.ConnectionPool(
            connection_class=self._connection_class, host=host, port=port, max_connections=1, **self._options
        )
        with redis.Redis(connection_pool=pool) as client:
            try:
                ranges: Any = client.execute_command("CLUSTER SLOTS")
            finally:
                pool.disconnect()
        owner: Address | None = None
        known = [node]
        for first, last, *servers in ranges:  # the primary first; a node that does not know its own name says nothing
            addresses = [(name.decode() if name else host, int(port)) for name, port, *_ in servers]
            known += addresses
            if first <= self.slot <= last:
                owner = addresses[0]
        if owner is None:
            raise redis.ConnectionError(f"{host}:{port}: no node owns slot {self.slot}")
        self.nodes = list(dict.fromkeys([*known, *self._seeds]))
        return owner


class _SlotConnection(redis.Connection):
    """Connects to whichever node owns the slot now."""

    def __init__(self, slot_owner: SlotOwner, **options: Any) -> None:
        self._slot_owner = slot_owner
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def _connect(self) -> Any:  # of redis-py's Connection: makes the socket
        errors = []
        for node in list(self._slot_owner.nodes):
            try:
                self.host, self.port = self._slot_owner.ask(node)
                return super()._connect()  # type: ignore[no-untyped-call]
            except (redis.AuthenticationError, NoPermissionError):
                raise
            except (redis.RedisError, OSError) as error:
                errors.append(f"{node[0]}:{node[1]}: {error}")
        raise redis.ConnectionError("; ".join(errors))

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except MovedError as error:
            self.disconnect()  # type: ignore[no-untyped-call]
            moved = f"slot {self._slot_owner.slot} has moved to {error.host}:{error.port}"
            raise redis.ConnectionError(moved) from error


class _SlotSSLConnection(_SlotConnection, redis.SSLConnection):
    """The same through TLS: `super()._connect()` is SSLConnection's."""
