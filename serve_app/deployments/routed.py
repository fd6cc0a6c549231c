"""The router of this process, and which replica got which of the requests that were routed here.

Use it as `routed.remember(...)`, by the module's name: Serve pickles routers and endpoints with the globals they use,
so a table that is imported by its own name would be a copy in each of them. A module is never copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cachetools import LRUCache

from serve_app.types import short_id

if TYPE_CHECKING:
    from serve_app.deployments.request_router import KVCacheAwareRouter

_REMEMBERED_REQUESTS = 10_000

_replicas: LRUCache[str, str] = LRUCache(_REMEMBERED_REQUESTS)
_explanations: LRUCache[str, Mapping[str, str]] = LRUCache(_REMEMBERED_REQUESTS)
_router: KVCacheAwareRouter | None = None
base_model = ""  # of the adapters that this router's replicas load at need; empty: they load none


def set_router(router: KVCacheAwareRouter) -> None:
    global _router  # noqa: PLW0603  # of the process
    _router = router


def router() -> KVCacheAwareRouter | None:
    """The last one that Serve has made in this process."""
    return _router


def explain(request_id: str, headers: Mapping[str, str]) -> None:
    """What the answer is to say of the choice."""
    _explanations[short_id(request_id)] = headers


def explanation(request_id: str) -> Mapping[str, str]:
    return _explanations.pop(short_id(request_id), {})


def remember(request_id: str, replica: str) -> None:
    _replicas[short_id(request_id)] = replica


def replica_of(request_id: str) -> str | None:
    """The replica's unique id, or the name of the data parallel rank; None if it was not routed here, or long ago."""
    return _replicas.get(short_id(request_id))
