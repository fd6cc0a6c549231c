"""The publishers of what a node's replicas share: which there are to be, by what the replicas say, and their processes.

Each replica says every few seconds how its shared domain is to be published. However many say so, a domain and model
have one publisher. Replicas disagree while an application is replaced by one with another configuration: then the one
that came last is right. A publisher that no replica has asked for in `forget_after_s` ends.

    a: X          -> X is started
    a: X, b: Y    -> X ends, Y is started; `a` that says X again changes nothing
    a: X, -       -> Y ends, X is started
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import msgspec

from serve_app.events.publisher import LMCacheStream, PublisherConfig
from serve_app.supervision import Backoff
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
        self._publishers: dict[_Key, _Publisher] = {}

    def hold(self, pod: str, config: PublisherConfig) -> None:
        """`pod` is there, and this is how its domain is to be published."""
        self._wanted.hold(pod, config, time.monotonic())

    def keep(self) -> None:
        """End what is not wanted, or not so; start what is."""
        wanted = self._wanted.configs(time.monotonic())
        for key, publisher in list(self._publishers.items()):
            if publisher.config != wanted.get(key):
                logger.info("the publisher of %s ends: %s", key[0], "replaced" if key in wanted else "no replica")
                publisher.end()
                del self._publishers[key]
        for key, config in wanted.items():
            self._publishers.setdefault(key, _Publisher(config)).keep()

    def end(self) -> None:
        for publisher in self._publishers.values():
            publisher.end()
        self._publishers.clear()


class _Publisher:
    """A process, started again when it ends."""

    def __init__(self, config: PublisherConfig) -> None:
        self.config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._backoff = Backoff()
        self._started_s = self._start_at_s = 0.0

    def keep(self) -> None:
        now_s = time.monotonic()
        if self._process is not None:
            if self._process.poll() is None:
                return
            logger.error("the publisher of %s ended with %s", self.config.pod, self._process.returncode)
            self.end()
            self._start_at_s = now_s + self._backoff.after(now_s - self._started_s)
        if now_s >= self._start_at_s:
            self._start(now_s)

    def _start(self, now_s: float) -> None:
        self._started_s = now_s
        try:
            self._process = subprocess.Popen([sys.executable, "-m", "serve_app.events"], stdin=subprocess.PIPE)
        except OSError as error:  # no memory, or too many processes
            self._start_at_s = now_s + self._backoff.after(0.0)
            logger.error("the publisher of %s cannot be started: %s", self.config.pod, error)
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: seen at the next turn
            self._process.stdin.write(msgspec.json.encode(self.config) + b"\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """Its domain leaves when its stdin ends."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
