"""One engine's publisher: KV events in, Redis state and log out, until it is told to stop.

It is a process of its own next to the engine (`python -m serve_app.events`, or `kvcache publish` for an engine that
Ray does not manage), so that it never takes time from the engine's event loop. It holds the authoritative set of the
engine's blocks: whenever Redis may have missed something (an error, an expired record, FLUSHALL), or the engine began
a new life, it joins again under a new epoch and publishes the whole set. One mechanism for every kind of doubt.

The blocks of an LMCache server have a publisher of their own, the only one for them: its source is the server itself,
its domain belongs to no pod. Engines that are attached to the server name that domain in their own record, and what
they say of the server's blocks is left out. So a replica that ends, or starts, changes nothing about them.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import msgspec
import zmq

from serve_app.errors import DomainTaken, StoreError, WireError
from serve_app.events.endpoint import SilenceWatch
from serve_app.events.engine_blocks import Added, Change, Cleared, EngineBlocks, Removed
from serve_app.events.lmcache_source import LMCacheSource, decode_records
from serve_app.events.source import EventSource, Received
from serve_app.events.wire import AllBlocksCleared, BlockStored, Event, decode_batch
from serve_app.index.faults import FaultLog
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.redis_writer import LEASE_TTL_S, RedisWriter
from serve_app.types import CPU, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId, Served

logger = logging.getLogger(__name__)

HEARTBEAT_S = LEASE_TTL_S / 3
LOAD_REPORT_S = 0.05  # at most one load report in this time, at least one per HEARTBEAT_S
RETRY_S = 0.5
STAND_BY_S = LEASE_TTL_S  # while another publisher has our domain: by then it has renewed the lease, or it is gone
RETRY_REFUSED_MAX_S = 8.0  # while Redis answers and refuses, every attempt sends the whole set: then ever less often
_POLL_MS = 50
_BATCHES_PER_FLUSH = 2000
SERVED_MAX = 1000  # requests whose figures wait for Redis; older ones are dropped: they are statistics


class LMCacheStream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which part of an LMCache server's stream to publish."""

    model: str  # as the server calls it: the path or id that the engine was given
    chunk_size: int  # tokens


class PublisherConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a publisher is started with. `block_size` 0: take it from the engine's first event."""

    redis_url: str
    model: str
    pod: str
    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""
    block_size: int = 0
    capacity: int = 0  # blocks of the engine's GPU cache; 0: unknown, and lost events are never made up for
    tokenizer: str = ""  # path or Hugging Face id; empty: the model's name
    chat_template: str | None = None
    content_format: str = "auto"
    template_kwargs: str = ""  # JSON
    served_names: tuple[str, ...] = ()  # more names of the base model; any other name is a LoRA adapter's
    address: str = ""
    lease_ttl_s: float = LEASE_TTL_S
    attached: tuple[str, ...] = ()  # shared domains that the engine loads from
    lmcache: LMCacheStream | None = None  # `endpoint` is an LMCache server, `pod` the name of its domain

    @property
    def domain(self) -> tuple[DomainId, PodId | None]:
        return DomainId(self.pod), None if self.lmcache else PodId(self.pod)


class Feed(msgspec.Struct, frozen=True):
    """What the engine's process says of its requests, a JSON line each."""

    in_flight: int  # requests that it has now
    served: list[Served] = []  # requests that have ended since the line before


class StopSignal(Protocol):
    def is_set(self) -> bool: ...


_decode_feed = msgspec.json.Decoder(Feed).decode


class Publisher:
    """See the module. `run` returns when `stop` is set or the feed ends, after the domain has left Redis.

    Args:
        config: engine, Redis, and the names under which to publish.
        feed: file descriptor from which lines come, each a `Feed` as JSON; its end means that the engine's process is
            gone. None: nobody tells.
    """

    def __init__(self, config: PublisherConfig, feed: int | None = None) -> None:
        self._config = config
        self._feed = feed
        self._feed_rest = b""
        self._source: EventSource | LMCacheSource = (
            LMCacheSource(config.endpoint, config.lmcache.model)
            if config.lmcache
            else EventSource(config.endpoint, config.replay_endpoint, config.topic)
        )
        self._writer = RedisWriter(config.redis_url, ModelId(config.model), lease_ttl_s=config.lease_ttl_s)
        self._blocks = self._new_blocks(config.block_size) if config.block_size else None
        self._domain: Domain | None = None  # as it is in Redis; None: join (again)
        self._last_epoch = 0
        self._in_flight: int | None = None
        self._served: deque[Served] = deque(maxlen=SERVED_MAX)  # not yet reported
        self._reported_load: tuple[int, int] | None = None  # requests in flight, unused blocks
        self._reported_at_s = self._heartbeat_at_s = self._retry_at_s = 0.0
        self._applied = self._lost = self._joins = 0
        self._lost_in_life = False  # of the engine
        self._skipped: Counter[str] = Counter()
        self._retry_s = RETRY_S
        self._standing_by = False
        self._faults = FaultLog(logger, "publishing everything again when it does as it is asked")
        self._silence = _silence_watch(config)
        self._poller = zmq.Poller()
        self._poller.register(self._source.socket, zmq.POLLIN)
        self._poller.register(self._source.monitor, zmq.POLLIN)
        if feed is not None:
            os.set_blocking(feed, False)
            self._poller.register(feed, zmq.POLLIN)

    def run(self, stop: StopSignal) -> None:
        try:
            while not stop.is_set() and self._step():
                self._say_what_is_missing()
        finally:
            self._leave()
            self._source.close()
            self._writer.close()

    def _step(self) -> bool:
        """One turn of the loop. False: the feed has ended."""
        ready = dict(self._poller.poll(_POLL_MS))
        if self._feed in ready and not self._read_feed():
            return False
        self._take(self._source.read(_BATCHES_PER_FLUSH))
        now = time.monotonic()
        try:
            if not self._source.connected:
                self._leave()  # nobody knows what an engine holds that we do not hear
            elif self._domain is None:
                self._join(now)
            else:
                self._report_load(now)
                self._writer.flush()
                self._beat(now)
        except DomainTaken as error:
            self._stand_by(error)
        except StoreError as error:
            self._faults.failed(error)
            self._domain = None
            self._retry_at_s = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, RETRY_REFUSED_MAX_S) if error.refused else RETRY_S
        return True

    def _stand_by(self, error: DomainTaken) -> None:
        """Two that take the domain from each other would publish everything once a second: who joined last has it."""
        if not self._standing_by:
            logger.warning("%s; publishing nothing until the other has ended", error)
        self._standing_by, self._domain = True, None
        self._retry_at_s = time.monotonic() + STAND_BY_S

    def _take(self, batches: Iterable[Received]) -> None:
        for received in batches:
            if received.restarted:
                logger.info("the engine has restarted: its old blocks are void")
                self._forget_blocks()
                self._domain = None
            if received.lost:
                self._lost += received.lost
                self._lost_in_life = True
                logger.warning("%d event batches before %d are lost", received.lost, received.seq)
                if self._blocks is not None:
                    self._blocks.doubt()
            if received.payload is not None:
                self._apply(received.payload)
        self._publish_doubt()

    def _apply(self, payload: bytes) -> None:
        try:
            batch = (
                decode_records(payload, self._config.lmcache.chunk_size)
                if self._config.lmcache
                else decode_batch(payload)
            )
        except WireError as error:
            self._skipped["malformed_batch"] += 1
            logger.warning("%s", error)
            return
        self._skipped.update(batch.skipped)
        self._applied += len(batch.events)
        if self._blocks is None:
            size = next((e.block_size for e in batch.events if isinstance(e, BlockStored) and _is_gpu(e)), 0)
            if not size:
                return
            self._blocks = self._new_blocks(size)
            if self._lost_in_life:
                self._blocks.doubt()
        own = [event for event in batch.events if _is_gpu(event)] if self._config.attached else batch.events
        changes = self._blocks.apply(own)
        if self._domain is not None:
            self._publish(self._domain, changes)

    def _forget_blocks(self) -> None:
        """The engine holds nothing of its former life; it may even have come back with another block size."""
        self._lost_in_life = False
        if self._blocks is not None and self._config.block_size:
            self._blocks.clear()
        elif self._blocks is not None:
            self._skipped.update(self._blocks.skipped)
            self._blocks = None

    def _new_blocks(self, block_size: int) -> EngineBlocks:
        config = self._config
        return EngineBlocks(ModelId(config.model), block_size, config.capacity, counted=config.lmcache is None)

    def _publish_doubt(self) -> None:
        """Say in the domain's record whether events of the engine are missing, when that changes."""
        blocks, domain = self._blocks, self._domain
        if blocks is not None and domain is not None and blocks.degraded != domain.degraded:
            self._domain = replace(domain, degraded=blocks.degraded)
            self._writer.join(self._domain)
            logger.warning("the index %s", "lacks lost events" if blocks.degraded else "is exact again")

    def _publish(self, domain: Domain, changes: Iterable[Change]) -> None:
        for change in changes:
            match change:
                case Added(tier, keys):
                    self._writer.add(domain.id, domain.epoch, tier, keys)
                case Removed(tier, keys):
                    self._writer.remove(domain.id, domain.epoch, tier, keys)
                case Cleared():
                    self._writer.clear(domain.id, domain.epoch)

    def _join(self, now_s: float) -> None:
        """Publish the whole set under a new epoch."""
        if self._blocks is None or not self._source.caught_up or now_s < self._retry_at_s:
            return
        config = self._config
        self._last_epoch = max(time.time_ns() // 1_000_000, self._last_epoch + 1)
        spec = EngineSpec(
            ModelId(config.model),
            self._blocks.block_size,
            config.tokenizer or config.model,
            config.chat_template,
            config.content_format,
            config.template_kwargs,
            config.served_names,
        )
        domain_id, pod = config.domain
        domain = Domain(
            domain_id,
            Epoch(self._last_epoch),
            spec,
            pod,
            config.address,
            self._blocks.degraded,
            attached=tuple(DomainId(domain) for domain in config.attached),
            chunk_size=config.lmcache.chunk_size if config.lmcache else 0,
        )
        self._writer.join(domain)
        for tier, keys in self._blocks.snapshot().items():
            self._writer.add(domain.id, domain.epoch, tier, keys)
        self._writer.flush()
        self._domain = domain
        self._joins += 1
        self._heartbeat_at_s = 0.0
        self._beat(now_s)
        self._retry_s = RETRY_S
        self._standing_by = False
        self._faults.healed()
        logger.info("joined %s as %s with %d blocks", config.model, config.pod, len(self._blocks))

    def _beat(self, now_s: float) -> None:
        if self._domain is None or now_s < self._heartbeat_at_s:
            return
        self._heartbeat_at_s = now_s + HEARTBEAT_S
        if not self._writer.heartbeat(self._domain.id, self._heartbeat_record(self._domain.epoch)):
            logger.warning("redis has lost our record: publishing everything again")
            self._domain = None

    def _heartbeat_record(self, epoch: Epoch) -> HeartbeatRecord:
        blocks = self._blocks
        skipped = self._skipped + (blocks.skipped if blocks is not None else Counter())
        return HeartbeatRecord(
            epoch,
            self._in_flight,
            0 if blocks is None else len(blocks),
            self._applied,
            self._lost,
            dict(skipped),
            max(0, self._joins - 1),
        )

    def _report_load(self, now_s: float) -> None:
        if self._domain is None or self._in_flight is None:
            return
        load = self._in_flight, self._blocks.unused if self._blocks is not None else 0
        changed = load != self._reported_load or bool(self._served)
        if now_s >= self._reported_at_s + (LOAD_REPORT_S if changed else HEARTBEAT_S):
            self._reported_at_s = now_s
            self._reported_load = load
            in_flight, unused_blocks = load
            self._writer.report_load(self._domain.id, self._domain.epoch, in_flight, self._served, unused_blocks)
            self._served.clear()

    def _read_feed(self) -> bool:
        assert self._feed is not None
        data = os.read(self._feed, 65536)
        *lines, self._feed_rest = (self._feed_rest + data).split(b"\n")
        for line in lines:
            feed = _decode_feed(line)
            self._in_flight = feed.in_flight
            self._served.extend(feed.served)
        return bool(data)

    def _say_what_is_missing(self) -> None:
        connected, understood = self._source.connected, self._blocks is not None
        if missing := self._silence.missing(time.monotonic(), connected=connected, understood=understood):
            logger.warning(missing)

    def _leave(self) -> None:
        domain, self._domain = self._domain, None
        if domain is None:
            return
        logger.info("leaving %s", self._config.model)
        try:
            self._writer.leave(domain.id, domain.epoch)
            self._writer.flush()
        except StoreError as error:
            logger.warning("redis: %s; the lease will end in %s s", error, self._config.lease_ttl_s)


def _silence_watch(config: PublisherConfig) -> SilenceWatch:
    endpoint = config.endpoint
    return SilenceWatch(
        f"no LMCache server at {endpoint}; if it runs, check --server"
        if config.lmcache
        else f"no engine at {endpoint}; check --engine and `endpoint` of --kv-events-config",
        f"nothing that {endpoint} has sent tells the block size: give --block-size, or send the engine a prompt of "
        "some blocks; if that does not help, check --topic, and `enable_kv_cache_events` of --kv-events-config",
        time.monotonic(),
    )


def _is_gpu(event: Event) -> bool:
    return isinstance(event, AllBlocksCleared) or event.medium is None or event.medium.lower() != CPU
