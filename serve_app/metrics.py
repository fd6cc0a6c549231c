"""What is counted and measured. The process that it is in says with what: Ray's metrics, or Prometheus' client.

Counters of the hot path are plain integers, handed over once per second: a Ray counter costs more than a decision.
"""

import logging
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from serve_app import metric_table as table
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.mirror import Mirror
from serve_app.loop_watch import LoopWatch
from serve_app.metric_table import NAMED_MAX, Metric
from serve_app.routing.receipts import Receipt
from serve_app.supervision import Backoff, LoopGuard
from serve_app.types import Domain, Tier, Trust

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
LAG_FLUSHES = 30  # whoever scrapes every 30 s misses no lag


class Record(Protocol):
    """A step of a counter, what a gauge shows now, or an observation of a histogram."""

    def __call__(self, value: float, labels: Mapping[str, str]) -> None: ...

    def forget(self, labels: Mapping[str, str]) -> None:
        """What has these labels is gone: it is 0 once more, or not shown any longer."""
        ...


class Instruments(Protocol):
    """Makes them. The label `model` is on each without being named."""

    def make(self, metric: Metric) -> Record: ...


class _Every:
    """Call a function once per period, in a daemon thread, until the process ends."""

    def __init__(self, period_s: float, function: Callable[[], None]) -> None:
        self._stop = threading.Event()
        guard = LoopGuard("kvcache: metrics could not be updated", Backoff(period_s), logger)

        def loop() -> None:
            wait_s = period_s
            while not self._stop.wait(wait_s):
                try:
                    function()
                    guard.went_well()
                    wait_s = period_s
                except Exception as error:
                    wait_s = guard.failed(error)

        threading.Thread(target=loop, name="kvcache-metrics", daemon=True).start()


class Named:
    """Which replicas a metric names. Beyond `NAMED_MAX` at a time they are one, `other`: a series each is too many."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def label(self, replica: str) -> str:
        if replica not in self._names:
            if len(self._names) >= NAMED_MAX:
                return "other"
            self._names.add(replica)
        return replica

    def keep_only(self, replicas: Iterable[str]) -> set[str]:
        """These are there; the places of others are free. Returns the others."""
        gone = self._names - set(replicas)
        self._names -= gone
        return gone


class RouterMetrics:
    """What a router decided, on what, and how long it took."""

    def __init__(self, make: Instruments) -> None:
        self._decisions: Tally[tuple[str, str]] = Tally()
        self._tokens: Tally[str] = Tally()
        self._decision_counter = make.make(table.DECISIONS)
        self._prompt_counter = make.make(table.PROMPT_TOKENS)
        self._matched_counter = make.make(table.MATCHED_TOKENS)
        self._latency = make.make(table.STAGE_LATENCY)
        self._cached: Tally[tuple[str, str]] = Tally()
        self._cached_counter = make.make(table.CACHED_TOKENS)
        self._error = make.make(table.PREDICTION_ERROR)
        self._ttft = make.make(table.TTFT)
        self._lag = make.make(table.LOOP_LAG)
        self._worst_s: deque[float] = deque((0.0,), LAG_FLUSHES)
        self._named = Named()
        self._loop: LoopWatch | None = None
        self._lock = threading.Lock()
        self._flusher = _Every(FLUSH_S, self.flush)

    def watch(self, loop: LoopWatch) -> None:
        """Report how late this loop is."""
        self._loop = loop

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Of others nothing is shown any longer."""
        for replica in self._named.keep_only(replicas):
            for kind in ("predicted", "actual"):
                self._cached_counter.forget({"kind": kind, "replica": replica})
            self._error.forget({"replica": replica})
            self._ttft.forget({"replica": replica})

    def decided(self, outcome: str, reason: str, total_s: float) -> None:
        with self._lock:
            self._decisions[outcome, reason] += 1
        self._latency(total_s, {"stage": "total"})

    def served(self, complete: Receipt) -> None:
        """What the engine took from its cache, beside what was expected."""
        actual = complete.actual
        if actual is None or not complete.prompt_tokens or complete.incomplete or not complete.one_sequence:
            return
        replica = self._named.label(complete.chosen)
        with self._lock:
            self._cached["predicted", replica] += complete.predicted_cached_tokens
            self._cached["actual", replica] += actual.cached_tokens
        tags = {"replica": replica}
        self._error(abs(complete.predicted_cached_tokens - actual.cached_tokens), tags)
        self._ttft(actual.queued_s + actual.prefill_s, tags)

    def found(self, prompt_tokens: int, matched: Mapping[Tier, int], stage_s: Mapping[str, float]) -> None:
        with self._lock:
            self._tokens["prompt"] += prompt_tokens
            for tier, tokens in matched.items():
                self._tokens[f"matched {tier}"] += tokens
        for stage, seconds in stage_s.items():
            self._latency(seconds, {"stage": stage})

    def flush(self) -> None:
        if self._loop is not None:
            self._worst_s.append(self._loop.take_worst())
        self._lag(max(self._worst_s), {})
        with self._lock:
            decisions, self._decisions = self._decisions, Tally()
            tokens, self._tokens = self._tokens, Tally()
            cached, self._cached = self._cached, Tally()
        for (kind, replica), count in cached.items():
            if count:
                self._cached_counter(count, {"kind": kind, "replica": replica})
        for (outcome, reason), count in decisions.items():
            self._decision_counter(count, {"outcome": outcome, "reason": reason})
        for name, count in tokens.items():
            if name == "prompt" and count:
                self._prompt_counter(count, {})
            elif count:
                self._matched_counter(count, {"tier": name.removeprefix("matched ")})


class _Shown:
    """A gauge with labels. It is set at every flush: Ray drops what is not set for two export intervals."""

    def __init__(self, make: Instruments, metric: Metric) -> None:
        self._gauge = make.make(metric)
        self._labels = metric.labels
        self._shown: set[tuple[str, ...]] = set()

    def show(self, now: Mapping[tuple[str, ...], float]) -> None:
        """Label values -> value; what was shown and is not among them is gone."""
        for key, value in now.items():
            self._gauge(value, dict(zip(self._labels, key, strict=True)))
        for key in self._shown - now.keys():
            self._gauge.forget(dict(zip(self._labels, key, strict=True)))
        self._shown = set(now)


class IndexMetrics:
    """What a mirror holds, how far it is behind, and what the publishers it follows report."""

    def __init__(self, mirror: Mirror, make: Instruments) -> None:
        self._mirror = mirror
        self._named = Named()
        self._sent: Tally[tuple[str, str]] = Tally()
        self._pod_sent: Tally[tuple[str, str]] = Tally()  # by pod and result
        self._started_s = time.monotonic()
        self._blocks = _Shown(make, table.BLOCKS)
        self._pods = make.make(table.PODS)
        self._lag = make.make(table.LOG_LAG)
        self._stale = make.make(table.STALE)
        self._trust = _Shown(make, table.POD_TRUST)
        self._unindexed = _Shown(make, table.UNINDEXED_TIERS)
        self._entries = make.make(table.LOG_ENTRIES)
        self._evicted = make.make(table.EVICTED_BLOCKS)
        self._events = make.make(table.POD_EVENTS)
        self._flusher = _Every(FLUSH_S, self.flush)

    def flush(self) -> None:
        mirror = self._mirror
        self._blocks.show({(str(tier),): count for tier, count in mirror.block_counts().items()})
        self._pods(len(mirror.pods()), {})
        self._lag(mirror.lag_s, {})
        self._stale(min(mirror.stale_for_s(), time.monotonic() - self._started_s), {})
        for kind, count in list(mirror.counters.items()):
            self._up_to(self._entries, count, self._sent, ("entries", kind), {"kind": kind})
        self._up_to(self._evicted, mirror.evicted_blocks, self._sent, ("evicted", ""), {})
        domains = mirror.domains()
        self._show_pods([domain for domain, _, _ in domains])
        self._count_events({domain.pod or domain.id: heartbeat for domain, _, heartbeat in domains})

    def _show_pods(self, domains: Sequence[Domain]) -> None:
        trust = {domain.pod: self._mirror.trust(domain.pod) for domain in domains if domain.pod is not None}
        # In a large fleet those that are well are too many to be named.
        named = sorted(trust, key=lambda pod: (trust[pod] is Trust.EXACT, pod))[:NAMED_MAX]
        self._trust.show({(pod, each): each == trust[pod] for pod in named for each in Trust})
        unindexed = sorted((domain.pod or domain.id, tier) for domain in domains for tier in domain.unindexed)
        self._unindexed.show(dict.fromkeys(unindexed[:NAMED_MAX], 1))

    def _count_events(self, heartbeats: Mapping[str, HeartbeatRecord | None]) -> None:
        """Args: heartbeats: by pod; a domain that several share stands for itself."""
        gone = self._named.keep_only(heartbeats)
        for name, result in [key for key in self._pod_sent if key[0] not in heartbeats]:
            del self._pod_sent[name, result]
            if name in gone:
                self._events.forget({"pod": name, "result": result})
        for name, heartbeat in heartbeats.items():
            if heartbeat is None:
                continue
            label = self._named.label(name)
            results = {"applied": heartbeat.events_applied, "lost": heartbeat.events_lost, **heartbeat.events_skipped}
            for result, count in results.items():
                self._up_to(self._events, count, self._pod_sent, (name, result), {"pod": label, "result": result})

    @staticmethod
    def _up_to(
        counter: Record, total: int, sent: Tally[tuple[str, str]], key: tuple[str, str], tags: dict[str, str]
    ) -> None:
        """Raise a counter to a total that is kept elsewhere. A total that fell has started again from 0."""
        before, sent[key] = sent[key], total
        step = total - before if total >= before else total
        if step > 0:
            counter(step, tags)
