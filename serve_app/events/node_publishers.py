"""The publishers of what a node's replicas share: which there are to be, by what the replicas say, and their processes.

Each replica says every few seconds how its shared domain is to be published. However many say so, a domain and model
have one publisher. Replicas disagree while an application is replaced by one with another configuration: then the one
that came last is right. A publisher that no replica has asked for in `forget_after_s` ends.

    a: X          -> X is started
    a: X, b: Y    -> X ends, Y is started; `a` that says X again changes nothing
    a: X, -       -> Y ends, X is started
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import msgspec

from serve_app.events.child import KeptPublisher
from serve_app.events.publisher import LMCacheStream, PublisherConfig
from serve_app.types import DomainId, ModelId

logger = logging.getLogger("ray.serve")

END_TIMEOUT_S = 5.0

_Key = tuple[DomainId, ModelId]


def of_domain(replica: PublisherConfig, domain: str, endpoint: str, stream: LMCacheStream) -> PublisherConfig:
    """How to publish an LMCache server's domain: the same, whichever replica of a deployment is asked.

    Args:
        replica: the replica's own publisher.
        domain: `node:host:port`.
        endpoint: of the server, as the node reaches it.
        stream: which part of it.
    """
    return msgspec.structs.replace(
        replica,
        pod=domain,
        endpoint=endpoint,
        replay_endpoint=None,
        capacity=0,
        address=domain.removeprefix("node:"),
        attached=(),
        lmcache=stream,
    )


@dataclass(slots=True)
class _Hold:
    config: PublisherConfig
    at_s: float


class Wanted:
    """One configuration per domain and model, of the replica that came last of those that are there."""

    def __init__(self, forget_after_s: float) -> None:
        self._forget_after_s = forget_after_s
        self._holds: dict[str, _Hold] = {}  # by replica, in the order in which they came with their configuration
        self._lock = threading.Lock()

    def hold(self, pod: str, config: PublisherConfig, now_s: float) -> None:
        with self._lock:
            known = self._holds.get(pod)
            if known is not None and known.config == config:
                known.at_s = now_s
                return
            self._holds.pop(pod, None)
            self._holds[pod] = _Hold(config, now_s)

    def configs(self, now_s: float) -> dict[_Key, PublisherConfig]:
        with self._lock:
            first_s = now_s - self._forget_after_s
            self._holds = {pod: hold for pod, hold in self._holds.items() if hold.at_s > first_s}
            return {
                (DomainId(hold.config.pod), ModelId(hold.config.model)): hold.config for hold in self._holds.values()
            }


class NodePublishers:
    """See the module. `hold` may be called from any thread, the others from one that lives on: it makes the processes.

    Args:
        forget_after_s: how long after its last call a replica counts as there.
    """

    def __init__(self, forget_after_s: float) -> None:
        self._wanted = Wanted(forget_after_s)
        self._publishers: dict[_Key, KeptPublisher] = {}

    def hold(self, pod: str, config: PublisherConfig) -> None:
        """`pod` is there, and this is how its domain is to be published."""
        self._wanted.hold(pod, config, time.monotonic())

    def keep(self) -> None:
        """End what is not wanted, or not so; start what is."""
        wanted = self._wanted.configs(time.monotonic())
        for key, publisher in list(self._publishers.items()):
            if publisher.config != wanted.get(key):
                logger.info("the publisher of %s ends: %s", key[0], "replaced" if key in wanted else "no replica")
                publisher.end(END_TIMEOUT_S)
                del self._publishers[key]
        for key, config in wanted.items():
            self._publishers.setdefault(key, KeptPublisher(config)).keep()

    def end(self) -> None:
        for publisher in self._publishers.values():
            publisher.end(END_TIMEOUT_S)
        self._publishers.clear()
