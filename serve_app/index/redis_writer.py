"""Publish the changes of domains to Redis: state (sets, domain record, lease) and log entry in one transaction.

Calls are buffered; `flush` sends them all in one MULTI, what is added and what is removed merged into a command and a
log entry each: their order only matters where they are about the same block, so there a new run begins.

    add a, remove b, add c, remove d  ->  add a c, remove b d
    add a, remove a, add c            ->  add a, remove a, add c

When `flush` fails it is not known what arrived: the caller joins again under a new epoch, and everything older is void.
What Redis lost later (a failover, a restart from an older snapshot, a deleted or evicted key) shows at the next
heartbeat, and so does a second publisher of the same domain. Of two the one that joined last has it; the other may join
again when the lease has ended.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec
import redis

from serve_app.blocks import split_keys
from serve_app.errors import DomainTaken, StoreError
from serve_app.index.connection import connect, leave_server
from serve_app.index.faults import store_error
from serve_app.index.keyspace import (
    LOG_FIELD,
    DomainRecord,
    HeartbeatRecord,
    Keyspace,
    LogRecord,
    SeqRecord,
    decode_domain,
    encode,
)
from serve_app.types import NO_PROGRESS, BlockKey, BlockKeys, Domain, DomainId, Epoch, ModelId, Progress, Served, Tier

LEASE_TTL_S = 3.0  # a dead domain is out of every mirror within this and one check of the mirror
STATE_TTL_S = 600  # block sets that nobody renews go away by themselves
LOG_KEEP_S = 60.0  # a mirror that hangs for an answer, or a moment longer, finds the log as it left it
LOG_MAX_ENTRIES = 200_000  # some 100 to 350 bytes each; what 64 busy replicas write in half a minute
_KEYS_PER_COMMAND = 10_000


@dataclass(slots=True)
class _Published:
    """What this writer has put into Redis for one domain."""

    domain: Domain
    tiers: set[Tier] = field(default_factory=set)
    seq: int = 0
    beats: int = 0  # renewals of the lease
    flushed_seq: int = 0  # `seq` that Redis has confirmed


class RedisWriter:
    """The writer's calls of MemoryIndex, which end in Redis. Not thread-safe: one per publisher.

    Args:
        url: Redis URL.
        model: names the key space.
        lease_ttl_s: how long a domain outlives its last heartbeat.
    """

    def __init__(self, url: str, model: ModelId, *, lease_ttl_s: float = LEASE_TTL_S) -> None:
        self._keys = Keyspace(model)
        self._redis = connect(url, name="kvcache-publisher", slot_of=self._keys.log)
        self._lease_ttl_ms = int(lease_ttl_s * 1000)
        self._published: dict[DomainId, _Published] = {}
        self._pipeline = self._redis.pipeline(transaction=True)
        self._set_sizes: Counter[str] = Counter()  # blocks set -> members, by Redis' own answers
        self._log_at_ms = 0  # of the newest entry we know of, by Redis' clock: ours may be another; 0: of none
        self._trim_by_age = False
        self._taken: dict[DomainId, bytes] = {}  # by another publisher -> the lease as we wrote it last
        self._run: tuple[DomainId, Tier] | None = None  # whose changes are in `_added` and `_removed`
        self._added: set[BlockKey] = set()  # of the run; none is in both
        self._removed: set[BlockKey] = set()

    # -- buffered -------------------------------------------------------------------------------------------------

    def next_epoch(self, domain: DomainId, after: int = 0) -> Epoch:
        """A number for a new life of the engine, above those of all lives before, whatever this machine's clock says.

        It is milliseconds since 1970, unless the log's newest entry, which Redis has dated, or the record of the life
        before are ahead of that.

        Raises:
            StoreError: Redis did not answer.
        """
        try:
            newest: Any = self._redis.xrevrange(self._keys.log, count=1)
        except (redis.RedisError, OSError) as error:
            raise self._failed(error) from error
        stored = self._stored(domain)
        logged_ms = int(newest[0][0].split(b"-")[0]) if newest else 0
        before = stored.epoch if stored is not None else 0
        return Epoch(max(time.time_ns() // 1_000_000, logged_ms + 1, before + 1, after + 1))

    def join(self, domain: Domain) -> None:
        """Register a domain under its (new) epoch and drop what an earlier epoch left; or change its record.

        Raises:
            DomainTaken: by the publisher that took it from this one before, and that still renews the lease.
            StoreError: Redis did not answer.
        """
        self._end_run()
        known = self._current(domain.id, domain.epoch)
        if known is not None:
            known.domain = domain
            record = DomainRecord.of(domain, tuple(sorted(known.tiers)))
            self._pipeline.hset(self._keys.domains, domain.id, encode(record))
            self._log(known, "join", record=record)
            return
        self._check_free(domain.id)
        self._drop_state(domain.id)
        published = self._published[domain.id] = _Published(domain)
        self._pipeline.hset(self._keys.domains, domain.id, encode(DomainRecord.of(domain)))
        self._log(published, "join", record=DomainRecord.of(domain))

    def add(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: BlockKeys) -> None:
        self._change("add", domain, epoch, tier, keys)

    def remove(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: BlockKeys) -> None:
        self._change("remove", domain, epoch, tier, keys)

    def clear(self, domain: DomainId, epoch: Epoch) -> None:
        published = self._current(domain, epoch)
        if published is None:
            return
        self._end_run()
        self._unlink(published)
        self._log(published, "clear")

    def leave(self, domain: DomainId, epoch: Epoch) -> None:
        """Drop the domain; of one that another publisher has by now only what is our own.

        Raises:
            StoreError: Redis did not answer.
        """
        published = self._current(domain, epoch)
        if published is None:
            return
        self._end_run()
        stored = self._stored(domain)
        self._unlink(published)
        if stored is None or stored.epoch == epoch or not published.flushed_seq:
            self._pipeline.hdel(self._keys.domains, domain)
            self._pipeline.hdel(self._keys.seqs, domain)
            self._pipeline.delete(self._keys.lease(domain))
            self._log(published, "leave")
        del self._published[domain]

    def flush(self) -> None:
        """Send what is buffered, as one transaction.

        Raises:
            StoreError: it may or may not have been applied. The buffer is empty afterwards in any case.
        """
        self._end_run()
        if not len(self._pipeline):
            return
        unflushed = [published for published in self._published.values() if published.seq > published.flushed_seq]
        for published in unflushed:
            record = SeqRecord(published.domain.epoch, published.seq)
            self._pipeline.hset(self._keys.seqs, published.domain.id, encode(record))
        commands = [arguments for arguments, _ in self._pipeline.command_stack]
        try:
            answers = self._pipeline.execute()
        except (redis.RedisError, OSError) as error:
            raise self._failed(error) from error
        finally:
            self._pipeline.reset()
        for published in unflushed:
            published.flushed_seq = published.seq
        for command, answer in zip(commands, answers, strict=True):
            match command[0]:
                case "SADD":
                    self._set_sizes[command[1]] += answer
                case "SREM":
                    self._set_sizes[command[1]] -= answer
                case "XADD":
                    self._log_at_ms = int(answer.split(b"-")[0])
                case "UNLINK":
                    for name in command[1:]:
                        del self._set_sizes[name]

    # -- lease and load -------------------------------------------------------------------------------------------

    def heartbeat(self, domain: DomainId, record: HeartbeatRecord) -> bool:
        """Renew the lease. False: Redis no longer has all that was flushed under this epoch; join again.

        Raises:
            DomainTaken: another publisher has joined since.
            StoreError: Redis did not answer.
        """
        published = self._published.get(domain)
        if published is None:
            return False
        published.beats += 1
        lease = encode(msgspec.structs.replace(record, beat=published.beats))
        try:
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.set(self._keys.lease(domain), lease, px=self._lease_ttl_ms)
            pipeline.hget(self._keys.domains, domain)
            pipeline.hget(self._keys.seqs, domain)
            sets = [self._keys.blocks(domain, published.domain.epoch, tier) for tier in published.tiers]
            for name in sets:
                pipeline.expire(name, STATE_TTL_S)
            for name in sets:
                pipeline.scard(name)
            _, stored, seq, *answers = pipeline.execute()
        except (redis.RedisError, OSError) as error:
            raise self._failed(error) from error
        known = _decoded(stored)
        stored_epoch = None if known is None else known.epoch
        if stored_epoch is not None and stored_epoch > published.domain.epoch:
            self._taken[domain] = lease
            raise _taken(domain)
        if seq is None or stored_epoch != published.domain.epoch:
            return False
        sizes = answers[len(sets) :]
        return bool(
            seq == encode(SeqRecord(published.domain.epoch, published.flushed_seq))
            and sizes == [self._set_sizes[name] for name in sets]  # a set may be evicted, or deleted by a person
        )

    def report_load(
        self,
        domain: DomainId,
        epoch: Epoch,
        in_flight: int,
        served: Sequence[Served] = (),
        unused_blocks: int = 0,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        """Tell the routers how many requests the engine has, what became of them, and how much room its cache has left.

        Buffered, as the changes are.
        """
        if self._current(domain, epoch) is not None:
            self._append(
                LogRecord(
                    "load",
                    domain,
                    epoch,
                    in_flight=in_flight,
                    served=tuple(served),
                    unused_blocks=unused_blocks,
                    progress=progress,
                )
            )

    def close(self) -> None:
        self._redis.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _current(self, domain: DomainId, epoch: Epoch) -> _Published | None:
        published = self._published.get(domain)
        return published if published is not None and published.domain.epoch == epoch else None

    def _change(self, op: str, domain: DomainId, epoch: Epoch, tier: Tier, keys: BlockKeys) -> None:
        if self._current(domain, epoch) is None:
            return
        own, other = (self._added, self._removed) if op == "add" else (self._removed, self._added)
        split = split_keys(keys)
        if self._run != (domain, tier) or not other.isdisjoint(split):
            self._end_run()
            self._run = (domain, tier)
        own.update(split)

    def _end_run(self) -> None:
        """Turn the merged run of changes into commands."""
        run, self._run = self._run, None
        if run is None:
            return
        domain_id, tier = run
        published = self._published[domain_id]
        name = self._keys.blocks(domain_id, published.domain.epoch, tier)
        if tier not in published.tiers:  # a follower finds the sets to load by the record
            published.tiers.add(tier)
            record = DomainRecord.of(published.domain, tuple(sorted(published.tiers)))
            self._pipeline.hset(self._keys.domains, domain_id, encode(record))
        for op, command, keys in (
            ("add", self._pipeline.sadd, self._added),
            ("remove", self._pipeline.srem, self._removed),
        ):
            left = iter(keys)
            while some := tuple(islice(left, _KEYS_PER_COMMAND)):
                command(name, *some)
                self._log(published, op, tier=tier, keys=b"".join(some))
            keys.clear()

    def _log(
        self,
        published: _Published,
        op: str,
        *,
        tier: str = "",
        keys: bytes = b"",
        record: DomainRecord | None = None,
    ) -> None:
        published.seq += 1
        domain = published.domain
        self._append(LogRecord(op, domain.id, domain.epoch, published.seq, tier, keys, record))

    def _append(self, record: LogRecord) -> None:
        """Redis trims by age or by number, not by both at once: entries take turns."""
        self._trim_by_age = not self._trim_by_age and self._log_at_ms > 0
        oldest = str(self._log_at_ms - int(LOG_KEEP_S * 1000)) if self._trim_by_age else None
        self._pipeline.xadd(
            self._keys.log,
            {LOG_FIELD: encode(record)},
            minid=oldest,
            maxlen=None if oldest else LOG_MAX_ENTRIES,
            approximate=True,
        )

    def _failed(self, error: redis.RedisError | OSError, command: str = "") -> StoreError:
        leave_server(self._redis, error)
        self._log_at_ms = 0  # what answers next may have a clock of its own
        return store_error(error, self._keys, command)

    def _unlink(self, published: _Published) -> None:
        domain = published.domain
        if published.tiers:
            self._pipeline.unlink(*(self._keys.blocks(domain.id, domain.epoch, t) for t in sorted(published.tiers)))

    def _check_free(self, domain_id: DomainId) -> None:
        """After another publisher took the domain, it is free when nobody renews the lease any more."""
        own_lease = self._taken.get(domain_id)
        if own_lease is None:
            return
        try:
            answer: Any = self._redis.mget([self._keys.lease(domain_id)])
        except (redis.RedisError, OSError) as error:
            raise self._failed(error) from error
        if answer[0] not in (None, own_lease):
            raise _taken(domain_id)
        del self._taken[domain_id]

    def _drop_state(self, domain_id: DomainId) -> None:
        """Unlink the sets of the domain's earlier epoch, whoever wrote them."""
        old = self._stored(domain_id)
        if old is not None and old.tiers:
            self._pipeline.unlink(*(self._keys.blocks(domain_id, Epoch(old.epoch), Tier(tier)) for tier in old.tiers))

    def _stored(self, domain_id: DomainId) -> DomainRecord | None:
        """The domain's record as it is in Redis, whoever wrote it."""
        try:
            stored: Any = self._redis.hget(self._keys.domains, domain_id)
        except (redis.RedisError, OSError) as error:
            raise self._failed(error, f"HGET {self._keys.domains}") from error
        return _decoded(stored)


def _decoded(stored: bytes | None) -> DomainRecord | None:
    """A domain's record; none, if what is there is no record: then it is written anew."""
    try:
        return None if stored is None else decode_domain(stored)
    except msgspec.DecodeError:
        return None


def _taken(domain: DomainId) -> DomainTaken:
    return DomainTaken(
        f"another publisher has joined as {domain}",
        advice="every publisher needs a name of its own (`--pod`): stop one of the two",
        refused=True,
    )
