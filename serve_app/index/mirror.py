"""Keep a MemoryIndex equal to what the publishers wrote to Redis.

In: a Redis URL and a model. Out: an index that never waits for Redis.

A follower notes the log's last id, loads the sets, then follows the log from that id. Changes that were made between
the two are applied twice, which does no harm: they are set operations, in order. A thread does all of it, so that the
event loop of a router is never blocked; it gives up the GIL between batches.

What makes it load again: an entry is missing (the log was trimmed under us), or the log went backwards (Redis lost
its data). While it loads, and while Redis is away, readers go on with the index as it was; `stale_for_s` says so.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import msgspec
import redis

from serve_app.errors import RecordNotUnderstood
from serve_app.index.connection import connect, leave_server, redact
from serve_app.index.faults import FaultLog, store_error
from serve_app.index.keyspace import (
    LOG_FIELD,
    DomainRecord,
    HeartbeatRecord,
    Keyspace,
    LogRecord,
    decode_domain,
    decode_heartbeat,
    decode_log,
    decode_seq,
    encode,
)
from serve_app.index.memory import DEFAULT_MAX_BLOCKS, MemoryIndex
from serve_app.supervision import Backoff, LoopGuard
from serve_app.types import (
    GPU,
    BlockKeys,
    Domain,
    DomainId,
    EngineSpec,
    Epoch,
    ModelId,
    PodId,
    PodLoad,
    PodMatch,
    Progress,
    Routed,
    Served,
    Tier,
    Trust,
)

logger = logging.getLogger(__name__)

STALE_AFTER_S = 2.5  # without an answer of Redis every pod is stale, without news of its heartbeat that pod
LATE_S = 1.0  # every pod is stale while entries arrive so much later than the quickest ones,
LATE_LASTS_S = 10.0  # and for so long after the last late one: engines at rest send none
CHECK_PERIOD_S = 1.0  # leases, and whether the log still has what we need
READ_BLOCK_MS = 200
READ_COUNT = 1000  # entries per XREAD
SCAN_COUNT = 10_000  # keys per SSCAN
VERDICT_LASTS_S = 5.0  # a router renews it every second
BURY_AFTER_S = 60.0  # a domain without a lease for so long is dropped from Redis
BURY_RETRY_S = 10.0  # after Redis refused that, or failed in it
RETRY_S = 0.5
RETRY_MAX_S = 2.0
LOAD_LASTS_S = 10.0  # what was loaded should be followed for longer
OUTRUN_LOADS = 3  # so many in a row that were not: then every next one waits twice as long
RELOAD_MAX_S = 30.0
_LOG_START = "0-0"
NEWS_MAX = 10_000  # what nobody asks for is dropped, oldest first

_Item = TypeVar("_Item")


class _Verdict(NamedTuple):
    """What a router says of a domain's predictions."""

    epoch: Epoch
    cause: str
    at_s: float  # when it said so last, by our monotonic clock


class _LogGapError(Exception):
    """The log no longer has the entry after the one we applied last."""


VERDICTS_MAX = 64  # routers that are heard on one domain
LEFT_OUT_MAX = 1000  # senders that are named in the log
_OPS = frozenset({"join", "add", "remove", "clear", "leave", "load", "route", "told", "verdict"})


class _Delay:
    """How late entries are, without comparing two machines' clocks: the quickest of late are taken for not late at all.

    Redis dates the entries by its clock, and they arrive by ours: the smallest difference is that of the clocks.
    """

    WINDOW_S = 120.0  # clocks drift apart

    def __init__(self) -> None:
        self._least = self._before = float("inf")  # of this window, and of the one before it
        self._until_s = 0.0

    def of(self, dated_s: float, arrived_s: float) -> float:
        difference = arrived_s - dated_s
        if arrived_s >= self._until_s:
            self._until_s = arrived_s + self.WINDOW_S
            self._before, self._least = self._least, difference
        self._least = min(self._least, difference)
        return difference - min(self._least, self._before)


class Mirror:
    """An index that follows Redis. `start` it once; `close` it at the end.

    Args:
        url: Redis URL.
        model: whose blocks to follow.
        max_blocks: cap of the index in memory (see MemoryIndex).
        tier_order: tiers from fastest to slowest.
        bury: also delete from Redis what domains left that died without saying so. Any number of mirrors may.
    """

    def __init__(
        self,
        url: str,
        model: ModelId,
        *,
        max_blocks: int = DEFAULT_MAX_BLOCKS,
        tier_order: Sequence[Tier] = (GPU,),
        bury: bool = False,
    ) -> None:
        self._url = url
        self._keys = Keyspace(model)
        self._redis = connect(url, name="kvcache-mirror", slot_of=self._keys.log)
        self._faults = FaultLog(logger, f"going on with the index of {redact(url)} as it is")
        self._bury_faults = FaultLog(logger, f"what dead publishers left in {redact(url)} stays there for now")
        self._max_blocks = max_blocks
        self._tier_order = tuple(tier_order)
        self._index = self._new_index()
        self._bury = bury
        self._position: str | None = None  # id of the last log entry applied; None: nothing is loaded
        self._left_out: Counter[tuple[str, str]] = Counter()  # sender and reason
        self._verdicts: dict[DomainId, dict[str, _Verdict]] = {}  # of a domain, by router
        self._seq: dict[DomainId, tuple[Epoch, int]] = {}  # of the last entry applied
        self._lease_lost_at_s: dict[DomainId, float] = {}
        self._loads: dict[PodId, PodLoad] = {}
        self._served: deque[tuple[PodId, Sequence[Served]]] = deque(maxlen=NEWS_MAX)
        self._progress: deque[tuple[PodId, Progress]] = deque(maxlen=NEWS_MAX)
        self._routed: deque[tuple[str, Routed]] = deque(maxlen=NEWS_MAX)
        self._heartbeats: dict[DomainId, HeartbeatRecord] = {}
        self._heard_at_s: dict[DomainId, float] = {}  # when the heartbeat was seen to change
        self._fresh_at_s: float | None = None  # monotonic; None: never loaded
        self._lag_s = 0.0
        self._heard_entry_at_s = 0.0
        self._delay = _Delay()
        self._check_at_s = 0.0
        self._bury_at_s = 0.0
        self._loaded_at_s = 0.0
        self._outrun = 0  # loads in a row that the log did not last for
        self.counters: Counter[str] = Counter()  # entries applied by op, loads, gaps, errors, bury_errors
        self._backoff = Backoff(RETRY_S, RETRY_MAX_S)
        self._guard = LoopGuard(f"the index of {self._keys.log} is loaded again", self._backoff, logger, self.counters)
        self._reloads = Backoff(RETRY_S, RELOAD_MAX_S)
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kvcache-mirror-{model}", daemon=True)

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        if not self._thread.is_alive() and not self._stop.is_set():
            self._thread.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether the index was loaded within the time."""
        return self._ready.wait(timeout_s)

    @property
    def is_running(self) -> bool:
        """Whether it follows, or tries to."""
        return self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=READ_BLOCK_MS / 1000 + RETRY_MAX_S + 1)
        self._redis.close()

    # -- reader ---------------------------------------------------------------------------------------------------

    def match(
        self,
        keys: BlockKeys,
        pods: Iterable[PodId] | None = None,
        *,
        count_hits: bool = False,
        prompt_tokens: int | None = None,
    ) -> Mapping[PodId, PodMatch]:
        """See MemoryIndex.match; each match says how far it can be relied on."""
        index = self._index
        found = index.match(keys, pods, count_hits=count_hits, prompt_tokens=prompt_tokens)
        distrusted = dict.fromkeys(found, Trust.STALE) if self._is_late() else index.distrusted
        for pod in distrusted.keys() & found.keys():
            found[pod] = replace(found[pod], trust=distrusted[pod])
        return found

    def held(self, pods: Sequence[PodId], keys: BlockKeys) -> list[bool]:
        """Whether each pod holds the block beside it."""
        return self._index.held(pods, keys)

    def holders(self, keys: BlockKeys) -> list[list[PodId]]:
        """Live pods that hold each block themselves, in any tier."""
        return self._index.holders(keys)

    def pods(self) -> list[PodId]:
        return self._index.pods()

    def trust(self, pod: PodId) -> Trust:
        """How far a match of this pod can be relied on."""
        return Trust.STALE if self._is_late() else self._index.trust(pod)

    def cause(self, domain: DomainId) -> str:
        """Why the domain is not believed, by what its requests turned out to be, or its tokenizer; empty: it is."""
        return self._index.cause(domain) or self._index.unlike(domain)

    def domains(self) -> list[tuple[Domain, bool, HeartbeatRecord | None]]:
        """Every known domain: its record, whether it is live, its last heartbeat."""
        index = self._index
        return [(d, index.is_live(d.id), self._heartbeats.get(d.id)) for d in index.domains()]

    def left_out(self) -> Mapping[tuple[str, str], int]:
        """How often something was not understood, by sender (a domain, or `log`) and reason."""
        return dict(self._left_out)

    def spec(self) -> EngineSpec | None:
        """What the live engines of the model agree on; None while there is none."""
        return self._index.spec

    def load(self, pod: PodId) -> PodLoad | None:
        return self._loads.get(pod)

    def served(self) -> list[tuple[PodId, Sequence[Served]]]:
        """Requests that have ended, by pod, since this was asked last. For one reader."""
        return _drain(self._served)

    def progress(self) -> list[tuple[PodId, Progress]]:
        """What has become of requests, told since the last call, by pod."""
        return _drain(self._progress)

    def routed(self) -> list[tuple[str, Routed]]:
        """What routers have sent where, each with the router's id, since this was asked last. For one reader."""
        return _drain(self._routed)

    def block_counts(self) -> Mapping[Tier, int]:
        return self._index.block_counts()

    @property
    def evicted_blocks(self) -> int:
        return self._index.evicted_blocks

    @property
    def lag_s(self) -> float:
        """How late the newest applied log entry was, beyond the quickest of the last minutes."""
        return self._lag_s

    def _is_late(self) -> bool:
        """Nothing is heard, or what is heard is old: the engines have gone on since."""
        lagging = self._lag_s > LATE_S and time.monotonic() - self._heard_entry_at_s < LATE_LASTS_S
        return lagging or self.stale_for_s() > STALE_AFTER_S

    @property
    def fault(self) -> str:
        """Why it does not follow now; empty: it does."""
        if not self.is_running:
            return "the thread that follows the index has ended"
        return self._faults.now

    def stale_for_s(self) -> float:
        """Seconds since Redis last answered; infinite before the first load."""
        return float("inf") if self._fresh_at_s is None else time.monotonic() - self._fresh_at_s

    # -- thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._position is None:
                    self._load()
                self._check()
                self._follow()
                self._faults.healed()
                self._guard.went_well()
            except _LogGapError as gap:
                self._load_again(gap)
            except (redis.RedisError, OSError) as error:
                self._faults.failed(store_error(error, self._keys))
                self.counters["errors"] += 1
                leave_server(self._redis, error)
                self._check_at_s = 0.0  # what answers next may be another server: see that it has the log we read
                self._stop.wait(self._backoff.after())
            except Exception as error:
                self._position = None
                self._stop.wait(self._guard.failed(error))

    def _load_again(self, gap: _LogGapError) -> None:
        """A mirror that the log outruns would load without end, and slow down a Redis that is busy as it is."""
        logger.warning("index of %s is loaded again: %s", self._keys.log, gap)
        self.counters["gaps"] += 1
        self._position = None
        lasted = time.monotonic() - self._loaded_at_s > LOAD_LASTS_S
        if lasted:
            self._outrun = 0
            self._reloads.reset()
        else:
            self._outrun += 1
        if self._outrun == OUTRUN_LOADS:
            logger.warning(
                "the log %s is too short for this mirror: this process, or its network, is too slow for what is "
                "published, or somebody else trims it (XTRIM); loading ever less often",
                self._keys.log,
            )
        if self._outrun >= OUTRUN_LOADS:
            self._stop.wait(self._reloads.after())

    def _new_index(self) -> MemoryIndex:
        return MemoryIndex(self._max_blocks, self._tier_order)

    def _load(self) -> None:
        """Build a new index from the sets and put it in the place of the old one."""
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xrevrange(self._keys.log, count=1)
            pipeline.hgetall(self._keys.seqs)
            last, seqs = pipeline.execute()
        position = last[0][0].decode() if last else _LOG_START
        index = self._new_index()
        records: Any = self._redis.hgetall(self._keys.domains)
        for raw_id, raw in records.items():
            try:
                record = decode_domain(raw)
                domain = record.domain(DomainId(raw_id.decode()))
            except (msgspec.DecodeError, UnicodeDecodeError, RecordNotUnderstood) as error:
                self._leave_out(raw_id, error)
                continue
            index.join(domain)
            for tier in record.tiers:
                for keys in self._scan(self._keys.blocks(domain.id, domain.epoch, Tier(tier))):
                    index.add(domain.id, domain.epoch, Tier(tier), keys)
        self._seq = _seqs(seqs)
        self._check_leases(index)
        self._index = index
        self._position = position
        self._fresh_at_s = self._loaded_at_s = time.monotonic()
        self.counters["loads"] += 1
        self._ready.set()

    def _scan(self, name: str) -> Iterable[BlockKeys]:
        cursor = -1
        while cursor:
            answer: Any = self._redis.sscan(name, max(cursor, 0), count=SCAN_COUNT)
            cursor, keys = answer
            yield b"".join(keys)

    def _follow(self) -> None:
        answer: Any = self._redis.xread({self._keys.log: self._position or _LOG_START}, READ_COUNT, READ_BLOCK_MS)
        self._fresh_at_s = time.monotonic()
        entries = _entries(answer)
        for entry_id, fields in entries:
            try:
                record = decode_log(fields[LOG_FIELD])
            except (msgspec.DecodeError, KeyError) as error:
                self._leave_out(b"log", error)
            else:
                self._apply(record)
            self._position = entry_id.decode()
        if entries:
            self._heard_entry_at_s = time.monotonic()
            self._lag_s = self._delay.of(int(entries[-1][0].split(b"-")[0]) / 1000, self._heard_entry_at_s)

    def _apply(self, record: LogRecord) -> None:
        domain, epoch, index = DomainId(record.domain), Epoch(record.epoch), self._index
        self.counters[record.op if record.op in _OPS else "unknown_op"] += 1
        if record.seq:
            self._expect(domain, record)
        match record.op:
            case "add":
                index.add(domain, epoch, Tier(record.tier), record.keys)
            case "remove":
                index.remove(domain, epoch, Tier(record.tier), record.keys)
            case "clear":
                index.clear(domain, epoch)
            case "join" if record.record is not None:
                self._join(domain, record.record)
            case "leave":
                index.leave(domain, epoch)
                last = self._seq.get(domain)
                if last is None or last[0] == epoch:  # an earlier publisher's leave says nothing of who has it now
                    self._forget(domain)
            case "load":
                self._note_report(domain, record)
            case "verdict":
                self._verdict(domain, epoch, record.router, record.cause)
            case "route":
                route = Routed(
                    PodId(record.domain), record.keys, record.tokens, time.monotonic(), record.tag, record.lease_s
                )
                self._routed.append((record.router, route))
            case "told" if any(record.progress):
                self._progress.append((PodId(record.domain), record.progress))
            case _:
                pass  # of a later version; counted

    def _join(self, domain_id: DomainId, record: DomainRecord) -> None:
        try:
            self._index.join(record.domain(domain_id))
        except RecordNotUnderstood as error:
            known = self._index.domain(domain_id)
            if known is not None:
                self._index.leave(domain_id, known.epoch)
            self._leave_out(domain_id.encode(), error)
        self._lease_lost_at_s.pop(domain_id, None)

    def _expect(self, domain: DomainId, record: LogRecord) -> None:
        """Entries of an epoch are numbered without gaps, from its join on; the load has said where we are."""
        last, now = self._seq.get(domain), (Epoch(record.epoch), record.seq)
        if record.op == "join":
            self._seq[domain] = now
        elif last is None:
            raise _LogGapError(f"{domain}: its join is missing before {now} (epoch, number)")
        elif now[0] > last[0] or (now[0] == last[0] and now[1] > last[1] + 1):
            raise _LogGapError(f"{domain}: entries between {last} and {now} (epoch, number) are missing")
        else:
            self._seq[domain] = max(last, now)

    def _check(self) -> None:
        """Once per period: leases, and whether the log still has what we have not read."""
        now = time.monotonic()
        if now < self._check_at_s:
            return
        self._check_at_s = now + CHECK_PERIOD_S
        self._end_verdicts(now)
        self._check_leases(self._index)
        self._check_log()
        if self._bury and now >= self._bury_at_s:
            self._try_to_bury(now)

    def _check_leases(self, index: MemoryIndex) -> None:
        domains = index.domains()
        if not domains:
            return
        leases: Any = self._redis.mget([self._keys.lease(domain.id) for domain in domains])
        if not any(leases):
            leave_server(self._redis)  # a primary that was demoted, and is not yet told of the new one, looks like this
        now = time.monotonic()
        for domain, lease in zip(domains, leases, strict=True):
            if lease is None:
                self._lease_lost_at_s.setdefault(domain.id, now)
                index.set_live(domain.id, False)
                continue
            self._lease_lost_at_s.pop(domain.id, None)
            try:
                heartbeat = decode_heartbeat(lease)
            except msgspec.DecodeError as error:
                self._leave_out(domain.id.encode(), error)
                index.set_live(domain.id, False)
                continue
            if heartbeat != self._heartbeats.get(domain.id):
                self._heartbeats[domain.id] = heartbeat
                self._heard_at_s[domain.id] = now
            late = now - self._heard_at_s[domain.id] > STALE_AFTER_S
            index.set_live(domain.id, heartbeat.epoch == domain.epoch, late=late)
            if heartbeat.in_flight is not None and domain.pod not in self._loads:
                self._note_load(domain.id, heartbeat.in_flight)

    def _check_log(self) -> None:
        """It is the log that we read, nothing after the entry applied last is gone, and it holds all that was written.

        The last shows when nothing is unread: entries may have been trimmed before the first was read, or may, after
        Redis lost its data, have the ids of ones that were applied.
        """
        position = self._position or _LOG_START
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xrevrange(self._keys.log, position, position, count=1)
            pipeline.xrevrange(self._keys.log, count=1)
            pipeline.hgetall(self._keys.seqs)
            applied, newest, seqs = pipeline.execute()
        if position != _LOG_START and not applied:
            raise _LogGapError("it was trimmed past what was read, or Redis lost data")
        if newest == applied and _seqs(seqs) != self._seq:
            raise _LogGapError("entries are missing before the last one")

    def _try_to_bury(self, now_s: float) -> None:
        """Following needs no right to write, so it never waits for what does."""
        try:
            for domain in self._index.domains():
                lost_at_s = self._lease_lost_at_s.get(domain.id)
                if lost_at_s is not None and now_s - lost_at_s >= BURY_AFTER_S:
                    self._bury_dead(domain)
            self._bury_faults.healed()
        except (redis.RedisError, OSError) as error:
            self._bury_faults.failed(store_error(error, self._keys))
            leave_server(self._redis, error)
            self.counters["bury_errors"] += 1
            self._bury_at_s = time.monotonic() + BURY_RETRY_S

    def _bury_dead(self, domain: Domain) -> None:
        """Delete what is left of a domain that died without a word: only if the lease is still gone."""
        lease = self._keys.lease(domain.id)
        with self._redis.pipeline(transaction=True) as pipeline, contextlib.suppress(redis.WatchError):
            pipeline.watch(lease)
            if pipeline.exists(lease):
                return
            stored: Any = pipeline.hget(self._keys.domains, domain.id)
            try:
                record = None if stored is None else decode_domain(stored)
            except msgspec.DecodeError:
                return  # who wrote it may bury it
            if record is not None and record.epoch != domain.epoch:
                return  # who has just joined has no lease yet
            pipeline.multi()
            if record is not None:
                for tier in record.tiers:
                    pipeline.unlink(self._keys.blocks(domain.id, Epoch(record.epoch), Tier(tier)))
                pipeline.hdel(self._keys.domains, domain.id)
                pipeline.hdel(self._keys.seqs, domain.id)
            pipeline.xadd(self._keys.log, {LOG_FIELD: encode(LogRecord("leave", domain.id, domain.epoch))})
            pipeline.execute()

    def _verdict(self, domain: DomainId, epoch: Epoch, router: str, cause: str) -> None:
        """A router says that its predictions do not hold. It says so again while that is so."""
        known = self._index.domain(domain)
        if known is None or known.epoch != epoch:
            return
        said = self._verdicts.setdefault(domain, {})
        if router in said or len(said) < VERDICTS_MAX:
            said[router] = _Verdict(epoch, cause, time.monotonic())
            self._weigh_verdicts(known)

    def _end_verdicts(self, now_s: float) -> None:
        """Those that no router renews, and those of a former life."""
        for domain, said in list(self._verdicts.items()):
            known = self._index.domain(domain)
            epoch = None if known is None else known.epoch
            left = {r: v for r, v in said.items() if v.epoch == epoch and now_s - v.at_s <= VERDICT_LASTS_S}
            if left:
                self._verdicts[domain] = left
            else:
                del self._verdicts[domain]
            if known is not None and len(left) < len(said):
                self._weigh_verdicts(known)

    def _weigh_verdicts(self, domain: Domain) -> None:
        """A domain is not believed while any router says so; several causes would take turns, so one is shown."""
        said = {r: v.cause for r, v in self._verdicts.get(domain.id, {}).items() if v.epoch == domain.epoch}
        cause, before = said[min(said)] if said else "", self._index.cause(domain.id)
        if cause == before:
            return
        self._index.distrust(domain.id, domain.epoch, cause)
        if cause:
            logger.warning("%s is not exact: %s", domain.id, cause)
        else:
            logger.info("the predictions of %s hold again", domain.id)

    def _leave_out(self, sender: bytes, error: Exception) -> None:
        """One record that is not understood is nobody else's harm: its domain, or entry, is left out and counted."""
        reason = error.reason if isinstance(error, RecordNotUnderstood) else "malformed"
        name = sender.decode(errors="replace")
        if (name, reason) in self._left_out:
            self._left_out[name, reason] += 1
        elif len(self._left_out) < LEFT_OUT_MAX:
            self._left_out[name, reason] = 1
            logger.warning("%s of %s is left out: %s", name, self._keys.domains, error)
        self.counters[f"left_out_{reason}"] += 1

    def _note_load(self, domain_id: DomainId, in_flight: int, unused_blocks: int = 0) -> None:
        domain = self._index.domain(domain_id)
        if domain is not None and domain.pod is not None:
            self._loads[domain.pod] = PodLoad(in_flight, time.monotonic(), unused_blocks)

    def _note_report(self, domain: DomainId, record: LogRecord) -> None:
        """What a pod has said of its requests."""
        self._note_load(domain, record.in_flight, record.unused_blocks)
        if any(record.progress):
            self._progress.append((PodId(record.domain), record.progress))
        if record.served:
            self._served.append((PodId(record.domain), record.served))

    def _forget(self, domain: DomainId) -> None:
        self._heartbeats.pop(domain, None)
        self._heard_at_s.pop(domain, None)
        self._lease_lost_at_s.pop(domain, None)
        self._seq.pop(domain, None)


def _drain(queue: deque[_Item]) -> list[_Item]:
    """All items; the thread may append meanwhile."""
    return [queue.popleft() for _ in range(len(queue))]


def _entries(answer: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Entries of the one stream that was read: RESP2 answers with a list of pairs, RESP3 with a map."""
    if not answer:
        return []
    if isinstance(answer, dict):
        (streams,) = answer.values()
        return [entry for some in streams for entry in some]
    return list(answer[0][1])


def _seqs(raw: dict[bytes, bytes]) -> dict[DomainId, tuple[Epoch, int]]:
    """Epoch and number of each domain's last log entry."""
    seqs = {}
    for raw_id, value in raw.items():
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):  # what cannot be read is of no domain
            record = decode_seq(value)
            seqs[DomainId(raw_id.decode())] = Epoch(record.epoch), record.seq
    return seqs
