"""What a router writes: that it is there, what it has routed (for other routers), and receipts (for people).

In: calls on an event loop, which never wait. Out: a thread writes them to Redis every `PERIOD_S`. All of it may be
lost without harm to a decision: when Redis is away or the user has no right to write, it is dropped and counted.

Routes go to the log that all mirrors follow, and only while another router is there: each says which pod got how much
prefill and the keys of the blocks that it did not hold. Source of the idea: DESIGN.md, "Choosing a replica".
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import redis

from serve_app.errors import StoreError
from serve_app.index.connection import connect, leave_server, redact
from serve_app.index.faults import FaultLog, store_error
from serve_app.index.keyspace import LOG_FIELD, MARKS_FIELD, TAIL_FIELD, Keyspace, LogRecord, encode
from serve_app.index.redis_writer import LOG_MAX_ENTRIES
from serve_app.supervision import Backoff, LoopGuard
from serve_app.types import BlockKeys, Epoch, ModelId, PodId, Progress, Routed

logger = logging.getLogger(__name__)

PERIOD_S = 0.02
ANNOUNCE_S = 1.0
RETRY_MAX_S = 4.0
GONE_S = 4.0  # a router that has not announced itself for so long
ROUTERS_MAX = 1000  # that are looked at
RECEIPTS_MAX = 1000  # kept in Redis
_QUEUE_MAX = 5000


class RouterLog:
    """One router's. `start` it once, `close` it at the end.

    Args:
        url: Redis URL; the user may XADD to the log and the receipts, and write the set of routers.
        router: id of this router.
    """

    def __init__(self, url: str, model: ModelId, router: str) -> None:
        self._url = url
        self._keys = Keyspace(model)
        self._redis = connect(url, name="kvcache-router", slot_of=self._keys.log)
        self._router = router
        self._routes: deque[Routed] = deque(maxlen=_QUEUE_MAX)
        self._told: deque[tuple[PodId, Progress]] = deque(maxlen=_QUEUE_MAX)
        self._receipts: deque[dict[bytes, bytes]] = deque(maxlen=_QUEUE_MAX)
        self._distrusted: Mapping[PodId, tuple[Epoch, str]] = {}
        self._announce_at_s = 0.0
        self._others = _Others()
        self.shared = False  # another router is there
        self.counters: Counter[str] = Counter()  # routes and receipts written, errors
        consequence = "routers do not hear of each other, and receipts are not kept"
        self._faults = FaultLog(logger, f"{consequence} ({redact(url)})")
        self._backoff = Backoff(ANNOUNCE_S, RETRY_MAX_S)
        self._guard = LoopGuard(f"kvcache: {consequence}", self._backoff, logger, self.counters)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcache-router-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * ANNOUNCE_S)
        self._redis.close()

    @property
    def fault(self) -> str:
        """Why nothing is written now; empty: it is."""
        return self._faults.now if self._thread.is_alive() else "the thread that writes has ended"

    def routed(self, route: Routed) -> None:
        """Tell the other routers, if there are any."""
        if self.shared:
            self._routes.append(route)
            self._wake.set()

    def told(self, pod: PodId, progress: Progress) -> None:
        """What has become of requests that this router has sent there, and whose end only it hears of."""
        if self.shared:
            self._told.append((pod, progress))
            self._wake.set()

    def distrust(self, pods: Mapping[PodId, tuple[Epoch, str]]) -> None:
        """Tell everybody, for as long as this is not called with less, whose predictions do not hold, and why."""
        self._distrusted = pods

    def receipt(self, encoded: bytes, marks: BlockKeys = b"", tail: BlockKeys = b"") -> None:
        """Keep a receipt (JSON) where people find it, and beside it keys that tell what it belongs to."""
        self._receipts.append({LOG_FIELD: encoded, MARKS_FIELD: marks, TAIL_FIELD: tail})
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(ANNOUNCE_S)
            self._wake.clear()
            try:
                self._write()
                self._faults.healed()
                self._guard.went_well()
            except (redis.RedisError, OSError) as error:
                self.counters["errors"] += 1
                self._faults.failed(store_error(error, self._keys))
                leave_server(self._redis, error)
                self._forget(self._backoff.after())
            except Exception as error:
                self._forget(self._guard.failed(error))
            self._stop.wait(PERIOD_S)

    def _forget(self, wait_s: float) -> None:
        """What was not written is old when Redis answers again, and may be what could not be written."""
        self.shared = False
        self._routes.clear()
        self._told.clear()
        self._receipts.clear()
        self._stop.wait(wait_s)

    def _write(self) -> None:
        with self._redis.pipeline(transaction=False) as pipeline:
            for _ in range(len(self._routes)):
                route = self._routes.popleft()
                pod, keys, tokens, _, tag, lease_s = route
                record = LogRecord(
                    "route", pod, 0, keys=keys, router=self._router, tokens=tokens, tag=tag, lease_s=lease_s
                )
                pipeline.xadd(self._keys.log, {LOG_FIELD: encode(record)}, maxlen=LOG_MAX_ENTRIES, approximate=True)
                self.counters["routes"] += 1
            for _ in range(len(self._told)):  # after the routes that they end
                pod, progress = self._told.popleft()
                record = LogRecord("told", pod, 0, router=self._router, progress=progress)
                pipeline.xadd(self._keys.log, {LOG_FIELD: encode(record)}, maxlen=LOG_MAX_ENTRIES, approximate=True)
            for _ in range(len(self._receipts)):
                fields = self._receipts.popleft()
                pipeline.xadd(self._keys.receipts, fields, maxlen=RECEIPTS_MAX, approximate=True)  # type: ignore[arg-type]
                self.counters["receipts"] += 1
            if len(pipeline):
                pipeline.execute()
        if time.monotonic() >= self._announce_at_s:
            self._announce()

    def _announce(self) -> None:
        """Say that we are there, and find out who else is: whose score has changed lately, by our own clock alone."""
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.zadd(self._keys.routers, {self._router: time.time()})
            gone = self._others.gone()
            if gone:
                pipeline.zrem(self._keys.routers, *gone)
            else:
                pipeline.zcard(self._keys.routers)
            pipeline.zrange(self._keys.routers, 0, ROUTERS_MAX, withscores=True)
            for pod, (epoch, cause) in self._distrusted.items():
                record = LogRecord("verdict", pod, epoch, router=self._router, cause=cause)
                pipeline.xadd(self._keys.log, {LOG_FIELD: encode(record)}, maxlen=LOG_MAX_ENTRIES, approximate=True)
            scores: Any = pipeline.execute()[2]
        self._others.seen({name.decode(): score for name, score in scores if name.decode() != self._router})
        self.shared = self._others.alive
        self._announce_at_s = time.monotonic() + ANNOUNCE_S


class _Others:
    """Other routers, by what they write: a score that changes. No two machines' clocks are compared."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}  # score, and when it was new

    def seen(self, scores: Mapping[str, float]) -> None:
        now_s = time.monotonic()
        for name, score in scores.items():
            known = self._known.get(name)
            if known is None or known[0] != score:
                self._known[name] = score, now_s
        for name in self._known.keys() - scores.keys():
            del self._known[name]

    @property
    def alive(self) -> bool:
        return any(time.monotonic() - since_s < GONE_S for _, since_s in self._known.values())

    def gone(self) -> list[str]:
        """Those that have not announced themselves for long."""
        return [name for name, (_, since_s) in self._known.items() if time.monotonic() - since_s >= 2 * GONE_S]


class Kept(NamedTuple):
    """A receipt in Redis."""

    id: str  # of the stream's entry
    receipt: bytes
    marks: BlockKeys = b""  # see routing.receipts.Trail
    tail: BlockKeys = b""


def read_receipts(client: redis.Redis, model: ModelId, count: int, after: str = "") -> list[Kept]:
    """The last receipts, newest first.

    Args:
        after: only those that came after the one of this id.

    Raises:
        StoreError: Redis did not answer.
    """
    try:
        entries: Any = client.xrevrange(Keyspace(model).receipts, min=f"({after}" if after else "-", count=count)
    except (redis.RedisError, OSError) as error:
        leave_server(client, error)
        raise StoreError(str(error)) from error
    return [
        Kept(entry_id.decode(), fields.get(LOG_FIELD, b""), fields.get(MARKS_FIELD, b""), fields.get(TAIL_FIELD, b""))
        for entry_id, fields in entries
    ]


async def recent_receipts(client: redis.Redis, model: ModelId, count: int, after: str = "") -> list[Kept]:
    """The same, off the event loop; none while Redis is away."""
    try:
        return await asyncio.to_thread(read_receipts, client, model, count, after)
    except StoreError:
        return []
