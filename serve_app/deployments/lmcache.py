"""`lmcache:`: one LMCache server per node, for all the replicas of the node, whichever comes first.

A node's server, and the publisher of what it holds, belong to an actor of the node and to no replica: the first replica
creates it, the others find it by its name. Each replica then says every few seconds that it is there. When none has
for `linger_s`, the actor ends, and the server with it. So a replica that dies takes no block with it, a replica that
is started again finds the blocks, and nothing is left of an application that was deleted. The actor outlives a
redeployment: how its domain is published is what the newest replica says (`events/node_publishers.py`).

    replica --hold(pod, publisher)--> actor --starts--> lmcache server, publisher (one per model)
    engine  --LMCacheMPConnector----------------------> lmcache server --event stream--> publisher --> Redis

A server that dies is started again on its port, empty; until then its domain is void, and engines do without. It is not
started at once: an engine registers its caches again only when its heartbeat has missed the server. A ping sent while
the server is down waits in the socket, so a server that is back soon answers it, and has then never been away for an
engine whose stores it refuses.
"""

import asyncio
import hashlib
import logging
import threading
import time
from typing import Any

import msgspec
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.config import LMCacheSettings
from serve_app.deployments.embedded_redis import session_folder
from serve_app.errors import StoreError
from serve_app.events.lmcache_server import LMCacheProcess
from serve_app.events.lmcache_source import chunk_size_of, reports_changes
from serve_app.events.node_publishers import NodePublishers, of_domain
from serve_app.events.publisher import LMCacheStream, PublisherConfig
from serve_app.supervision import Backoff, LoopGuard

logger = logging.getLogger("ray.serve")

HOLD_S = 2.0  # how often a replica says that it is there
WATCH_S = 0.5
START_TIMEOUT_S = 180.0
_NAMESPACE = "kvcache"
_LOOPBACK = ("127.0.0.1", "localhost")
# What vLLM's connector waits for a server that does not answer, and how soon it notices that one is gone, in s.
_MQ_TIMEOUT_S, _HEARTBEAT_S = 10, 3
RESTART_AFTER_S = 2 * _HEARTBEAT_S + 1.0  # until the next ping is sent, and until it counts as unanswered


class LMCacheNode:
    """The actor. Its calls take no time: a thread of its own starts, watches and ends the processes."""

    def __init__(self, settings: LMCacheSettings, node: str, port: int | None) -> None:
        logging.basicConfig(level=logging.INFO)
        self._settings = settings
        self._node = node
        self._port = port
        self._start_at_s = time.monotonic() + RESTART_AFTER_S if port else 0.0  # a port that engines know
        self._server: LMCacheProcess | None = None
        self._endpoint = f"tcp://{settings.attach}" if settings.attach else ""
        self._error = ""
        self._keep_for_s = settings.linger_s + 3 * HOLD_S
        # A replica whose model takes long to load has that time to call at all.
        self._end_at_s = time.monotonic() + START_TIMEOUT_S + self._keep_for_s
        self._publishers = NodePublishers(self._keep_for_s)
        threading.Thread(target=self._run, name="lmcache", daemon=True).start()

    def endpoint(self) -> str:
        """Of the server, once it is up; until then empty.

        Raises:
            StoreError: it does not come up.
        """
        if self._error:
            raise StoreError(self._error)
        return self._endpoint

    def hold(self, pod: str, publisher: PublisherConfig | None) -> None:
        """`pod` uses the server, and once its engine is up says how the server's blocks are to be published."""
        self._end_at_s = time.monotonic() + self._keep_for_s
        if publisher is not None:
            self._publishers.hold(pod, publisher)

    # -- thread: children are told to end when the thread that made them does, so one thread makes them all -----------

    def _run(self) -> None:
        guard = LoopGuard("lmcache: the node's server and publishers are not looked after", Backoff(WATCH_S), logger)
        while time.monotonic() < self._end_at_s:
            wait_s = WATCH_S
            try:
                self._keep_server()
                self._publishers.keep()
                guard.went_well()
            except Exception as error:
                wait_s = guard.failed(error)
            time.sleep(wait_s)
        logger.info("lmcache: no replica has used the server for %s s; it ends", self._settings.linger_s)
        self._publishers.end()
        if self._server is not None:
            self._server.stop()
        ray.kill(ray.get_runtime_context().current_actor)

    def _keep_server(self) -> None:
        settings = self._settings
        if settings.attach or (self._server is not None and self._server.is_running()):
            return
        if self._server is not None:
            logger.error("lmcache: the server ended with %s; starting it again", self._server.process.returncode)
            self._server, self._start_at_s = None, time.monotonic() + RESTART_AFTER_S
        if time.monotonic() < self._start_at_s:
            return
        try:
            self._server = LMCacheProcess(
                size_gb=settings.size_gb,
                chunk_size=settings.chunk_size,
                eviction_policy=settings.eviction_policy,
                instance=self._node,
                log=session_folder() / "logs" / f"kvcache-lmcache-{self._node}.log",
                port=self._port,
            )
        except StoreError as error:
            logger.error("lmcache: %s", error)
            self._error = "" if self._port else str(error)  # with engines on its port, it is tried again
            if self._port:  # it may have answered one of them before it ended
                self._start_at_s = time.monotonic() + RESTART_AFTER_S
            return
        self._port, self._endpoint, self._error = self._server.port, self._server.endpoint, ""
        logger.info("lmcache: server at %s", self._endpoint)


class LMCacheAttachment:
    """A replica's end of it.

    Args:
        settings: of the deployment.
        pod: the replica.
    """

    def __init__(self, settings: LMCacheSettings, pod: str) -> None:
        self._settings = settings
        self._pod = pod
        host = settings.attach.partition(":")[0]
        self._on_node = not settings.attach or host in _LOOPBACK
        node = ray.get_runtime_context().get_node_id()
        digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
        self._node = f"{node[:12]}-{digest}" if self._on_node else digest
        self._endpoint = ""
        self._chunk_size = settings.chunk_size
        self._publisher: PublisherConfig | None = None

    async def start(self, block_size: int | None) -> dict[str, Any]:
        """vLLM's `kv_transfer_config` for a server that is up.

        Args:
            block_size: the engine's, if it was given one.

        Raises:
            StoreError: there is no server.
            ConfigError: its chunks are no whole blocks of the engine.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._endpoint:
            if time.monotonic() > deadline_s:
                raise StoreError(f"lmcache: the node's server was not up within {START_TIMEOUT_S} s")
            try:
                actor = await asyncio.to_thread(self._actor)
                await actor.hold.remote(self._pod, None)
                self._endpoint = await actor.endpoint.remote()
            except RayActorError:
                logger.info("lmcache: the node's actor has just ended; making another")
            await asyncio.sleep(WATCH_S)
        self._chunk_size = await asyncio.to_thread(chunk_size_of, self._endpoint)
        if block_size:
            self._settings.check_block_size(block_size, self._chunk_size)
        if not await asyncio.to_thread(reports_changes, self._endpoint):
            logger.error(
                "lmcache: the server at %s does not report what it holds (--kv-event-log-size 0, or too old): "
                "engines use it, the index does not know its blocks",
                self._endpoint,
            )
        host, _, port = self._endpoint.rpartition(":")
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "serve_app.deployments.lmcache_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": host,
                "lmcache.mp.port": int(port),
                "lmcache.mp.mq_timeout": _MQ_TIMEOUT_S,
                "lmcache.mp.heartbeat_interval": _HEARTBEAT_S,
            },
        }

    @property
    def domain(self) -> str:
        """Named by an address that is the server's own in the whole cluster."""
        host, _, port = self._endpoint.removeprefix("tcp://").rpartition(":")
        if self._on_node:
            host = ray.util.get_node_ip_address()
        return f"node:{host}:{port}"

    def attach(self, replica: PublisherConfig, engine_model: str) -> PublisherConfig:
        """The replica's own publisher with the domain put in. From now on the domain is published, too.

        Args:
            replica: as it would be without a server.
            engine_model: the engine's name for its model, under which LMCache keeps the blocks.
        """
        stream = LMCacheStream(engine_model, self._chunk_size)
        self._publisher = of_domain(replica, self.domain, self._endpoint, stream)
        return msgspec.structs.replace(replica, attached=(self.domain,))

    async def hold(self) -> None:
        """Say that the replica is there, for as long as it is."""
        guard = LoopGuard("lmcache: the node's actor is not told of this replica", Backoff(WATCH_S, HOLD_S), logger)
        while True:
            wait_s = HOLD_S
            try:
                actor = await asyncio.to_thread(self._actor)
                await actor.hold.remote(self._pod, self._publisher)
                guard.went_well()
            except Exception as error:
                wait_s = guard.failed(error)
            await asyncio.sleep(wait_s)

    def _actor(self) -> Any:
        """The node's actor; made, if there is none, with the port that the engine knows."""
        options: dict[str, Any] = {}
        if self._on_node:
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        port = int(self._endpoint.rpartition(":")[2]) if self._endpoint and not self._settings.attach else None
        return (
            ray.remote(LMCacheNode)
            .options(
                name=f"lmcache-{self._node}",
                namespace=_NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                **options,
            )
            .remote(self._settings, self._node, port)
        )
