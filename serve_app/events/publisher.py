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

import contextlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import msgspec
import zmq

from serve_app.errors import DomainTaken, StoreError, WireError
from serve_app.events.changes import Added, Change, Cleared, Removed
from serve_app.events.endpoint import SilenceWatch
from serve_app.events.engine_blocks import EngineBlocks
from serve_app.events.engine_groups import EngineGroup, EngineLayout, GroupError, engine_layout, groups_of, plain_layout
from serve_app.events.engine_hash import EngineHasher
from serve_app.events.lmcache_source import LMCacheSource, decode_records
from serve_app.events.self_check import SelfCheck
from serve_app.events.source import EventSource, Received
from serve_app.events.wire import AllBlocksCleared, Event, decode_batch
from serve_app.index.faults import FaultLog
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.redis_writer import LEASE_TTL_S, RedisWriter
from serve_app.supervision import Backoff
from serve_app.types import CPU, GPU, NO_PROGRESS, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId, Progress, Served

logger = logging.getLogger(__name__)

HEARTBEAT_S = LEASE_TTL_S / 3
FEED_LATE_S = 2.5  # the engine's process says something every second, unless it is stopped
MOMENT_S = 0.1  # after it a figure that was looked up once says nothing of now
LOAD_REPORT_S = 0.05  # at most one load report in this time, at least one per HEARTBEAT_S
RETRY_S = 0.5
STAND_BY_S = LEASE_TTL_S  # while another publisher has our domain: by then it has renewed the lease, or it is gone
RETRY_REFUSED_MAX_S = 8.0  # while Redis answers and refuses, every attempt sends the whole set: then ever less often
_POLL_MS = 50
_EVENTS_LOST = "events of the engine were lost; right again when as many blocks as it has were stored since"
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
    groups: tuple[EngineGroup, ...] = ()  # the engine's KV cache groups, in its order; empty: its events tell
    eagle: bool = False  # without `groups`: the engine speculates with EAGLE or MTP, which events do not tell
    alignment: int = 0  # tokens that a hit's length is a multiple of; 0: as vLLM works it out from the groups
    hash_algorithm: str = "sha256"  # vLLM's --prefix-caching-hash-algo
    hash_seed: str | None = None  # PYTHONHASHSEED of the engine's process
    offload_chunk_blocks: int = 1  # blocks that the engine's native offload stores as one
    adapter_slots: int = 0  # LoRA adapters that it may have at once, each loaded at need; 0: it loads none by itself
    tokenizer: str = ""  # path or Hugging Face id; empty: the model's name
    chat_template: str | None = None
    content_format: str = "auto"
    template_kwargs: str = ""  # JSON
    served_names: tuple[str, ...] = ()  # more names of the base model; any other name is a LoRA adapter's
    pooling: bool = False
    excludes_tools: bool = False
    revision: str = ""
    tokenizer_mode: str = "auto"
    identity: tuple[tuple[str, str], ...] = ()  # what the engine makes prompts with; empty: nobody has asked it
    address: str = ""
    rank: int | None = None  # data parallel rank of the engine; None: it has no ranks
    replica: str = ""  # with a rank: where requests for it are sent; `pod` is a name of its own, or the same
    lease_ttl_s: float = LEASE_TTL_S
    attached: tuple[str, ...] = ()  # shared domains that the engine loads from
    block_size_is_learned: bool = False  # `block_size` is what to join with until an event tells it
    lmcache: LMCacheStream | None = None  # `endpoint` is an LMCache server, `pod` the name of its domain

    @property
    def domain(self) -> tuple[DomainId, PodId | None]:
        return DomainId(self.pod), None if self.lmcache else PodId(self.pod)


class Feed(msgspec.Struct, frozen=True):
    """What the engine's process says of its requests, a JSON line each."""

    in_flight: int  # requests that it has now
    served: list[Served] = []  # requests that have ended since the line before
    usage: float = 0.0  # part of the GPU cache's blocks that requests hold, as vLLM counts; 0: nothing is compared
    progress: Progress = NO_PROGRESS  # of requests since the line before
    adapters: tuple[str, ...] | None = None  # that the engine has now; None: nothing is said of them
    momentary: bool = False  # `in_flight` was looked up once, and may change without another line


class Report(msgspec.Struct, frozen=True):
    """How a publisher is doing, a JSON line each."""

    connected: bool  # somebody is at the engine's event socket
    joined: bool  # its record is in Redis
    degraded: bool  # what it believes of the engine may be wrong
    blocks: int  # that the engine holds, of the kind that is indexed
    applied: int  # events
    lost: int  # event batches
    skipped: dict[str, int]  # events that were not understood, by reason
    joins: int  # how often everything was published
    heartbeat_age_s: float  # since Redis has confirmed one; -1: none yet


class StopSignal(Protocol):
    def is_set(self) -> bool: ...


_decode_feed = msgspec.json.Decoder(Feed).decode


class Publisher:
    """See the module. `run` returns when `stop` is set or the feed ends, after the domain has left Redis.

    Args:
        config: engine, Redis, and the names under which to publish.
        feed: file descriptor from which lines come, each a `Feed` as JSON; its end means that the engine's process is
            gone. None: nobody tells.
        reports: file descriptor for a `Report` a second, as JSON; None: nobody wants to know.
    """

    def __init__(self, config: PublisherConfig, feed: int | None = None, reports: int | None = None) -> None:
        self._config = config
        self._feed = feed
        self._reports = reports
        self._feed_rest = b""
        self._source: EventSource | LMCacheSource = (
            LMCacheSource(config.endpoint, config.lmcache.model)
            if config.lmcache
            else EventSource(config.endpoint, config.replay_endpoint, config.topic)
        )
        self._writer = RedisWriter(config.redis_url, ModelId(config.model), lease_ttl_s=config.lease_ttl_s)
        self._hasher = EngineHasher(config.hash_algorithm, config.hash_seed)
        self._blocks: EngineBlocks | None = None
        self._self_check: SelfCheck | None = None
        self._usage = 0.0
        self._groups_known = False  # otherwise the first events tell which KV cache groups the engine has
        self._refused = ""  # why nothing of the engine can be indexed
        self._domain: Domain | None = None  # as it is in Redis; None: join (again)
        self._last_epoch = 0
        self._in_flight: int | None = None
        self._served: deque[Served] = deque(maxlen=SERVED_MAX)  # not yet reported
        self._progress: deque[Progress] = deque(maxlen=SERVED_MAX)  # not yet reported
        self._fed_at_s = 0.0
        self._momentary = False
        self._adapters: tuple[str, ...] = ()
        self._reported_load: tuple[int, int] | None = None  # requests in flight, unused blocks
        self._reported_at_s = self._heartbeat_at_s = self._retry_at_s = self._told_at_s = 0.0
        self._confirmed_at_s: float | None = None  # by Redis, that our record is there
        self._applied = self._lost = self._joins = 0
        self._lost_in_life = False  # of the engine
        self._skipped: Counter[str] = Counter()
        self._begin_life()
        self._retry = Backoff(RETRY_S, RETRY_REFUSED_MAX_S)
        self._standing_by = False
        self._faults = FaultLog(logger, "publishing everything again when it does as it is asked")
        self._silence = _silence_watch(config)
        self._poller = zmq.Poller()
        self._poller.register(self._source.socket, zmq.POLLIN)
        self._poller.register(self._source.monitor, zmq.POLLIN)
        if feed is not None:
            os.set_blocking(feed, False)
            self._poller.register(feed, zmq.POLLIN)
        if reports is not None:
            os.set_blocking(reports, False)

    def run(self, stop: StopSignal) -> None:
        try:
            while not stop.is_set() and self._step():
                self._say_what_is_missing()
                self._tell(time.monotonic())
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
            if not error.refused:
                self._retry.reset()
            self._retry_at_s = time.monotonic() + self._retry.after()
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
                self._begin_life()
                self._domain = None
            if received.lost:
                self._lost += received.lost
                self._lost_in_life = True
                logger.warning("%d event batches before %d are lost", received.lost, received.seq)
                if self._blocks is not None:
                    self._blocks.doubt()
            if received.payload is not None:
                self._apply(received.payload)
        self._check_itself()
        self._renew_record()

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
        if not self._groups_known:
            self._learn_groups(batch.events)
        if self._blocks is None or self._refused:
            return
        own = [event for event in batch.events if _is_gpu(event)] if self._config.attached else batch.events
        changes = self._blocks.apply(own)
        if self._domain is not None:
            self._publish(self._domain, changes)

    def _begin_life(self) -> None:
        """The engine holds nothing of its former life; it may even have come back with other KV cache groups."""
        config, before = self._config, self._blocks
        if before is not None:
            self._skipped.update(before.skipped)
        self._blocks = None
        self._lost_in_life = False
        self._refused = ""
        self._groups_known = bool(config.groups) or config.lmcache is not None
        if config.groups:
            self._follow_groups(config.groups)
        elif config.block_size:  # join at once, with what most engines are
            self._blocks = self._new_blocks(plain_layout(config.block_size))

    def _learn_groups(self, events: Sequence[Event]) -> None:
        """What the first events tell of the engine's KV cache groups."""
        groups = groups_of(event for event in events if _is_gpu(event))
        if not groups:
            return
        self._groups_known = True
        groups = [msgspec.structs.replace(group, eagle=self._config.eagle) for group in groups]
        self._follow_groups(groups)

    def _follow_groups(self, groups: Sequence[EngineGroup]) -> None:
        config = self._config
        known_size = 0 if config.block_size_is_learned else config.block_size
        try:
            layout = engine_layout(groups, known_size, config.alignment)
        except GroupError as error:
            logger.error("nothing of this engine can be indexed: %s", error)
            self._skipped[error.reason] += 1
            self._refused = str(error)
            layout = plain_layout(config.block_size or max(1, groups[0].block_size))
        if self._blocks is not None and self._blocks.groups == layout and not self._refused:
            return
        self._blocks = self._new_blocks(layout)
        self._blocks.unsure = self._refused
        if self._refused:
            self._blocks.unindexed[GPU] = self._refused
        if self._lost_in_life:
            self._blocks.doubt()
        self._domain = None  # join with it
        logger.info("KV cache groups: %s", layout.layout)

    def _new_blocks(self, groups: EngineLayout) -> EngineBlocks:
        config = self._config
        self._self_check = SelfCheck(groups, config.capacity)
        return EngineBlocks(
            ModelId(config.model),
            groups.block_size,
            config.capacity,
            counted=config.lmcache is None,
            groups=groups,
            hasher=self._hasher,
            chunk_blocks=config.offload_chunk_blocks,
        )

    def _renew_record(self) -> None:
        """Say in the domain's record whether the set may be wrong, and which tiers and adapters there are.

        When that changes.
        """
        blocks, domain = self._blocks, self._domain
        if blocks is None or domain is None:
            return
        if self._adapters != domain.adapters:
            self._domain = domain = replace(domain, adapters=self._adapters)
            self._writer.join(domain)
        if blocks.degraded != domain.degraded or self._unindexed() != domain.unindexed:
            if blocks.degraded != domain.degraded:
                why = self._doubt(blocks)
                logger.warning("the index %s", f"may be wrong: {why}" if why else "is exact again")
            self._domain = replace(
                domain, degraded=blocks.degraded, unindexed=self._unindexed(), doubt=self._doubt(blocks)
            )
            self._writer.join(self._domain)

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
        self._last_epoch = self._writer.next_epoch(config.domain[0], self._last_epoch)
        spec = EngineSpec(
            ModelId(config.model),
            self._blocks.block_size,
            config.tokenizer or config.model,
            config.chat_template,
            config.content_format,
            config.template_kwargs,
            config.served_names,
            config.pooling,
            config.excludes_tools,
            config.revision,
            config.tokenizer_mode,
            config.identity,
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
            chunk_size=config.lmcache.chunk_size if config.lmcache else self._offloaded_chunk_tokens(),
            layout=None if self._blocks.groups.is_plain else self._blocks.groups.layout,
            capacity=config.capacity,
            rank=config.rank,
            replica=config.replica,
            unindexed=self._unindexed(),
            doubt=self._doubt(self._blocks),
            adapters=self._adapters,
            adapter_slots=config.adapter_slots,
        )
        self._writer.join(domain)
        for tier, keys in self._blocks.snapshot().items():
            self._writer.add(domain.id, domain.epoch, tier, keys)
        self._writer.flush()
        self._domain = domain
        self._joins += 1
        self._heartbeat_at_s = 0.0
        self._beat(now_s)
        self._retry.reset()
        self._standing_by = False
        self._faults.healed()
        logger.info("joined %s as %s with %d blocks", config.model, config.pod, len(self._blocks))

    def _check_itself(self) -> None:
        """What is believed of the engine must be possible. After lost events it is known not to be right already."""
        blocks, check = self._blocks, self._self_check
        if blocks is None or check is None or self._lost_in_life or blocks.unsure:
            return
        if why := check.capacity(blocks.copies):
            self._skipped["over_capacity"] += 1
        elif self._in_flight and self._usage and not self._is_late(time.monotonic()):
            in_use = round(self._usage * (self._config.capacity - 1))  # vLLM leaves its null block out
            if why := check.in_use(blocks.copies, in_use, self._in_flight, time.monotonic()):
                self._skipped["not_heard"] += 1
        blocks.unsure = why

    def _is_late(self, now_s: float) -> bool:
        """Whether what was looked up once is too old to compare with."""
        return self._momentary and now_s - self._fed_at_s > FEED_LATE_S

    def _unindexed(self) -> dict[str, str]:
        """Tiers that the engine uses and the index does not know."""
        assert self._blocks is not None
        if self._config.attached and not self._blocks.groups.is_plain:
            return {"lmcache": "not followed for engines with several KV cache groups", **self._blocks.unindexed}
        return dict(self._blocks.unindexed)

    @staticmethod
    def _doubt(blocks: EngineBlocks) -> str:
        """Why the set may be wrong; empty: it is right."""
        return blocks.unsure or (_EVENTS_LOST if blocks.degraded else "")

    def _offloaded_chunk_tokens(self) -> int:
        assert self._blocks is not None
        chunk = self._config.offload_chunk_blocks
        return chunk * self._blocks.block_size if chunk > 1 else 0

    def _beat(self, now_s: float) -> None:
        if self._domain is None or now_s < self._heartbeat_at_s:
            return
        self._heartbeat_at_s = now_s + HEARTBEAT_S
        if not self._writer.heartbeat(self._domain.id, self._heartbeat_record(self._domain.epoch)):
            logger.warning("redis has lost our record: publishing everything again")
            self._domain = None
        else:
            self._confirmed_at_s = now_s

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
        valid_s = MOMENT_S if self._momentary else FEED_LATE_S
        if self._domain is None or self._in_flight is None or now_s - self._fed_at_s > valid_s:
            return
        load = self._in_flight, self._blocks.unused if self._blocks is not None else 0
        changed = load != self._reported_load or bool(self._served or self._progress)
        changed |= self._momentary and self._fed_at_s > self._reported_at_s
        if now_s >= self._reported_at_s + (LOAD_REPORT_S if changed else HEARTBEAT_S):
            self._reported_at_s = now_s
            self._reported_load = load
            in_flight, unused_blocks = load
            progress = Progress(*(b"".join(parts) for parts in zip(*self._progress, strict=True)))
            self._writer.report_load(
                self._domain.id, self._domain.epoch, in_flight, self._served, unused_blocks, progress
            )
            self._served.clear()
            self._progress.clear()

    def _read_feed(self) -> bool:
        assert self._feed is not None
        data = os.read(self._feed, 65536)
        *lines, self._feed_rest = (self._feed_rest + data).split(b"\n")
        for line in lines:
            feed = _decode_feed(line)
            self._in_flight = feed.in_flight
            self._usage, self._momentary = feed.usage, feed.momentary
            self._served.extend(feed.served)
            self._fed_at_s = time.monotonic()
            self._adapters = self._adapters if feed.adapters is None else feed.adapters
            if any(feed.progress):
                self._progress.append(feed.progress)
        return bool(data)

    def _tell(self, now_s: float) -> None:
        """One line a second; left out, if the reader is late."""
        if self._reports is None or now_s < self._told_at_s + HEARTBEAT_S:
            return
        self._told_at_s = now_s
        beat = self._heartbeat_record(Epoch(self._last_epoch))
        report = Report(
            connected=self._source.connected,
            joined=self._domain is not None,
            degraded=self._blocks is not None and self._blocks.degraded,
            blocks=beat.blocks,
            applied=beat.events_applied,
            lost=beat.events_lost,
            skipped=beat.events_skipped,
            joins=self._joins,
            heartbeat_age_s=-1.0 if self._confirmed_at_s is None else now_s - self._confirmed_at_s,
        )
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._reports, msgspec.json.encode(report) + b"\n")

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
