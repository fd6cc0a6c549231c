"""What is counted and measured. The process that it is in says with what: Ray's metrics, or Prometheus' client.

Counters of the hot path are plain integers, handed over once per second: a Ray counter costs more than a decision.
"""

import logging
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from serve_app.index.mirror import Mirror
from serve_app.loop_watch import LoopWatch
from serve_app.routing.receipts import Receipt
from serve_app.supervision import Backoff, LoopGuard
from serve_app.types import Tier, Trust

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
NAMED_MAX = 64  # replicas that a metric names at a time
_LATENCY_BOUNDARIES_S = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
_TTFT_BOUNDARIES_S = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0]
_TOKEN_BOUNDARIES = [0.5, 32, 128, 512, 2048, 8192, 32768]


Record = Callable[[float, Mapping[str, str]], None]
"""(value, labels): a step of a counter, what a gauge shows now, or an observation of a histogram."""


class Instruments(Protocol):
    """Makes them. The label `model` is on each without being named."""

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Record: ...

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Record: ...

    def histogram(self, name: str, text: str, boundaries: Sequence[float], labels: Sequence[str] = ()) -> Record: ...


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

    def keep_only(self, replicas: Iterable[str]) -> None:
        """These are there; the places of others are free."""
        self._names &= set(replicas)


class RouterMetrics:
    """What a router decided, on what, and how long it took."""

    def __init__(self, make: Instruments) -> None:
        self._decisions: Tally[tuple[str, str]] = Tally()
        self._tokens: Tally[str] = Tally()
        self._decision_counter = make.counter(
            "kvcache_router_decisions_total",
            "Routing decisions, by what they rested on (hit, miss, fallback, baseline) and why.",
            labels=("outcome", "reason"),
        )
        self._prompt_counter = make.counter(
            "kvcache_router_prompt_tokens_total",
            "Prompt tokens of scored requests.",
        )
        self._matched_counter = make.counter(
            "kvcache_router_matched_tokens_total",
            "Prompt tokens that the chosen replica held, by tier.",
            labels=("tier",),
        )
        self._latency = make.histogram(
            "kvcache_router_stage_latency_seconds",
            "Time of a decision by stage (prompt, index), and as a whole (total).",
            boundaries=_LATENCY_BOUNDARIES_S,
            labels=("stage",),
        )
        self._cached: Tally[tuple[str, str]] = Tally()
        self._cached_counter = make.counter(
            "kvcache_router_cached_tokens_total",
            "Prompt tokens from the replica's cache: as predicted, and as the engine says (actual).",
            labels=("replica", "kind"),
        )
        self._error = make.histogram(
            "kvcache_router_prediction_error_tokens",
            "Difference of predicted and actual cached tokens of a request.",
            boundaries=_TOKEN_BOUNDARIES,
            labels=("replica",),
        )
        self._ttft = make.histogram(
            "kvcache_router_ttft_seconds",
            "Time to first token by the engine's figures: queue and prefill.",
            boundaries=_TTFT_BOUNDARIES_S,
            labels=("replica",),
        )
        self._lag = make.gauge(
            "kvcache_router_loop_lag_seconds",
            "How late the router's event loop was at worst, in the last second.",
        )
        self.named = Named()
        self._loop: LoopWatch | None = None
        self._lock = threading.Lock()
        self._flusher = _Every(FLUSH_S, self.flush)

    def watch(self, loop: LoopWatch) -> None:
        """Report how late this loop is."""
        self._loop = loop

    def decided(self, outcome: str, reason: str, total_s: float) -> None:
        with self._lock:
            self._decisions[outcome, reason] += 1
        self._latency(total_s, {"stage": "total"})

    def served(self, complete: Receipt) -> None:
        """What the engine took from its cache, beside what was expected."""
        actual = complete.actual
        if actual is None or not complete.prompt_tokens or complete.incomplete or not complete.one_sequence:
            return
        replica = self.named.label(complete.chosen)
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
            self._lag(self._loop.take_worst(), {})
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


class _Now:
    """A gauge of what holds now: 1 or 0, and 0 once more for what is gone."""

    def __init__(self, gauge: Record, tags: tuple[str, ...]) -> None:
        self._gauge = gauge
        self._tags = tags
        self._shown: Iterable[tuple[str, ...]] = ()

    def show(self, now: Mapping[tuple[str, ...], bool]) -> None:
        """At every flush: Ray drops a gauge that is not set for two export intervals."""
        for key, holds in {**dict.fromkeys(self._shown, False), **now}.items():
            self._gauge(float(holds), dict(zip(self._tags, key, strict=True)))
        self._shown = list(now)


class IndexMetrics:
    """What a mirror holds, how far it is behind, and what the publishers it follows report."""

    def __init__(self, mirror: Mirror, make: Instruments) -> None:
        self._mirror = mirror
        self._named = Named()
        self._sent: Tally[tuple[str, str]] = Tally()
        self._blocks = make.gauge(
            "kvcache_index_blocks",
            "Distinct blocks in the mirror, by tier.",
            labels=("tier",),
        )
        self._pods = make.gauge(
            "kvcache_index_pods",
            "Live pods.",
        )
        self._lag = make.gauge(
            "kvcache_index_log_lag_seconds",
            "Age of the newest log entry when the mirror applied it.",
        )
        self._stale = make.gauge(
            "kvcache_index_stale_seconds",
            "Time since Redis last answered the mirror.",
        )
        self._trust = _Now(
            make.gauge(
                "kvcache_index_pod_trust",
                "1 for the trust that each pod has now (exact, degraded, stale), 0 for the others.",
                labels=("pod", "trust"),
            ),
            ("pod", "trust"),
        )
        self._unindexed = _Now(
            make.gauge(
                "kvcache_index_unindexed_tiers",
                "1 for a tier that a pod uses and that the index does not follow (why: in its record), 0 once it does.",
                labels=("pod", "tier"),
            ),
            ("pod", "tier"),
        )
        self._entries = make.counter(
            "kvcache_index_log_entries_total",
            "Log entries applied, by kind; loads, gaps, errors.",
            labels=("kind",),
        )
        self._evicted = make.counter(
            "kvcache_index_evicted_blocks_total",
            "Blocks evicted by the cap.",
        )
        self._events = make.counter(
            "kvcache_publisher_events_total",
            "KV events by pod and result: applied, lost, or skipped with the reason.",
            labels=("pod", "result"),
        )
        self._flusher = _Every(FLUSH_S, self.flush)

    def flush(self) -> None:
        mirror = self._mirror
        for tier, count in mirror.block_counts().items():
            self._blocks(count, {"tier": tier})
        self._pods(len(mirror.pods()), {})
        self._lag(mirror.lag_s, {})
        if mirror.stale_for_s() != float("inf"):
            self._stale(mirror.stale_for_s(), {})
        for kind, count in list(mirror.counters.items()):
            self._up_to(self._entries, count, ("entries", kind), {"kind": kind})
        self._up_to(self._evicted, mirror.evicted_blocks, ("evicted", ""), {})
        domains = mirror.domains()
        trust = {domain.pod: mirror.trust(domain.pod) for domain, _, _ in domains if domain.pod is not None}
        # In a large fleet those that are well are too many to be named.
        named = sorted(trust, key=lambda pod: (trust[pod] is Trust.EXACT, pod))[:NAMED_MAX]
        self._trust.show({(pod, each): each == trust[pod] for pod in named for each in Trust})
        self._unindexed.show({(d.pod or d.id, tier): True for d, _, _ in domains for tier in d.unindexed})
        self._named.keep_only(domain.pod or domain.id for domain, _, _ in domains)
        for domain, _, heartbeat in domains:
            if heartbeat is None:
                continue
            name = domain.pod or domain.id  # a shared domain stands for itself
            label = self._named.label(name)
            results = {"applied": heartbeat.events_applied, "lost": heartbeat.events_lost, **heartbeat.events_skipped}
            for result, count in results.items():
                self._up_to(self._events, count, (name, result), {"pod": label, "result": result})

    def _up_to(self, counter: Record, total: int, key: tuple[str, str], tags: dict[str, str]) -> None:
        """Raise a Ray counter to a total that is kept elsewhere. A total that fell has started again from 0."""
        sent = self._sent[key]
        step = total - sent if total >= sent else total
        self._sent[key] = total
        if step > 0:
            counter(step, tags)
