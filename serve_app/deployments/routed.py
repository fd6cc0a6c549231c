"""Which replica got which request, for the requests that were routed in this process.

Use it as `routed.remember(...)`, by the module's name: Serve pickles routers and endpoints with the globals they use,
so a table that is imported by its own name would be a copy in each of them. A module is never copied.
"""

from cachetools import LRUCache

_REMEMBERED_REQUESTS = 10_000

_replicas: LRUCache[str, str] = LRUCache(_REMEMBERED_REQUESTS)


def remember(request_id: str, replica: str) -> None:
    _replicas[request_id] = replica


def replica_of(request_id: str) -> str | None:
    """The replica's unique id; None if the request was not routed here, or long ago."""
    return _replicas.get(request_id)
