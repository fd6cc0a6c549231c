"""Every metric that there is: its name, what it says, its labels. What makes them is elsewhere; docs/metrics.md is it.

Names are by Prometheus' rules: base units, `_total` on what only rises. Ray puts `ray_` before them. The label `model`
is on all but those of the publisher and the picker. Labels have few values: of replicas NAMED_MAX are named at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

NAMED_MAX: Final = 64  # replicas that a metric names at a time; the others are one, `other`

_LATENCY_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_TTFT_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_TOKENS = (0.5, 32, 128, 512, 2048, 8192, 32768)


class Kind(StrEnum):
    """A metric's type, as Prometheus names it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(NamedTuple):
    """One row of the table: a metric's name, type, labels and meaning."""

    name: str
    kind: Kind
    text: str  # what it says
    labels: tuple[str, ...] = ()  # without `model`
    bounds: Sequence[float] = ()  # of a histogram, in its unit

    @property
    def series(self) -> tuple[str, ...]:
        """Names under which Prometheus has it."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "count", "sum"))
        return (self.name,)


# Of a router: Ray's ingress or request router, the score service, the picker.
DECISIONS = Metric(
    "kvcache_router_decisions_total",
    Kind.COUNTER,
    "Routing decisions, by what they rested on (hit, miss, fallback, baseline) and why.",
    ("outcome", "reason"),
)
PROMPT_TOKENS = Metric("kvcache_router_prompt_tokens_total", Kind.COUNTER, "Prompt tokens of scored requests.")
MATCHED_TOKENS = Metric(
    "kvcache_router_matched_tokens_total",
    Kind.COUNTER,
    "Prompt tokens that the chosen replica held, by tier.",
    ("tier",),
)
STAGE_LATENCY = Metric(
    "kvcache_router_stage_latency_seconds",
    Kind.HISTOGRAM,
    "Time of a decision by stage (prompt, index), and as a whole (total).",
    ("stage",),
    _LATENCY_S,
)
CACHED_TOKENS = Metric(
    "kvcache_router_cached_tokens_total",
    Kind.COUNTER,
    "Prompt tokens from the replica's cache: as predicted, and as the engine says (actual).",
    ("replica", "kind"),
)
PREDICTION_ERROR = Metric(
    "kvcache_router_prediction_error_tokens",
    Kind.HISTOGRAM,
    "Difference of predicted and actual cached tokens of a request.",
    ("replica",),
    _TOKENS,
)
TTFT = Metric(
    "kvcache_router_ttft_seconds",
    Kind.HISTOGRAM,
    "Time to first token by the engine's figures: queue and prefill.",
    ("replica",),
    _TTFT_S,
)
LOOP_LAG = Metric(
    "kvcache_router_loop_lag_seconds",
    Kind.GAUGE,
    "How late the router's event loop was at worst, in the last 30 seconds.",
)

# Of a copy of the index: a router's, or BlockIndex'.
BLOCKS = Metric("kvcache_index_blocks", Kind.GAUGE, "Distinct blocks in the index, by tier.", ("tier",))
PODS = Metric("kvcache_index_pods", Kind.GAUGE, "Live pods.")
LOG_LAG = Metric(
    "kvcache_index_log_lag_seconds", Kind.GAUGE, "How late the newest log entry was when the index applied it."
)
STALE = Metric(
    "kvcache_index_stale_seconds", Kind.GAUGE, "Time since Redis last answered; before it ever did, since the start."
)
POD_TRUST = Metric(
    "kvcache_index_pod_trust",
    Kind.GAUGE,
    "1 for the trust that a pod has now (exact, degraded, stale, unknown), 0 for the others.",
    ("pod", "trust"),
)
UNINDEXED_TIERS = Metric(
    "kvcache_index_unindexed_tiers",
    Kind.GAUGE,
    "1 for a tier that a pod uses and that the index does not follow (why: in its record), 0 once it does.",
    ("pod", "tier"),
)
LOG_ENTRIES = Metric(
    "kvcache_index_log_entries_total", Kind.COUNTER, "Log entries applied, by kind; loads, gaps, errors.", ("kind",)
)
EVICTED_BLOCKS = Metric("kvcache_index_evicted_blocks_total", Kind.COUNTER, "Blocks that the index's cap has evicted.")
POD_EVENTS = Metric(
    "kvcache_index_pod_events_total",
    Kind.COUNTER,
    "KV events by pod and what became of them, as its heartbeats say: applied, lost (batches), or why skipped.",
    ("pod", "result"),
)

# Of a replica of Ray, and of the picker.
UNROUTED = Metric(
    "kvcache_replica_unrouted_requests_total",
    Kind.COUNTER,
    "Requests that HAProxy has balanced plainly because no router named a replica, by reason.",
    ("reason",),
)
PICKER_REQUESTS = Metric(
    "kvcache_picker_requests_total",
    Kind.COUNTER,
    "Requests of Envoy, and what they met with (service/exchange.py).",
    ("kind",),
)

# Of `kvcache publish --listen`.
ENGINE_UP = Metric("kvcache_publisher_engine_up", Kind.GAUGE, "Whether the engine's server answers.")
READY = Metric("kvcache_publisher_ready", Kind.GAUGE, "Whether all records are in Redis.")
ENGINE_LIVES = Metric("kvcache_publisher_engine_lives_total", Kind.COUNTER, "Lives of the engine that were published.")
SCRAPES = Metric(
    "kvcache_publisher_scrapes_total", Kind.COUNTER, "Scrapes of the engine's metrics, by result.", ("result",)
)
PUBLISHER_EVENTS = Metric(
    "kvcache_publisher_events_total",
    Kind.COUNTER,
    "KV events by what became of them: applied, lost (batches), or why skipped.",
    ("pod", "result"),
)
JOINS = Metric("kvcache_publisher_joins_total", Kind.COUNTER, "Times that everything was published.", ("pod",))
HELD_BLOCKS = Metric("kvcache_publisher_blocks", Kind.GAUGE, "Blocks that the engine holds.", ("pod",))
JOINED = Metric("kvcache_publisher_joined", Kind.GAUGE, "Whether the pod's record is in Redis.", ("pod",))
DEGRADED = Metric("kvcache_publisher_degraded", Kind.GAUGE, "Whether what is believed may be wrong.", ("pod",))
HEARTBEAT_AGE = Metric(
    "kvcache_publisher_heartbeat_age_seconds", Kind.GAUGE, "Since Redis has confirmed the last heartbeat.", ("pod",)
)

WITH_MODEL: Final = (
    *(DECISIONS, PROMPT_TOKENS, MATCHED_TOKENS, STAGE_LATENCY, CACHED_TOKENS, PREDICTION_ERROR, TTFT, LOOP_LAG),
    *(BLOCKS, PODS, LOG_LAG, STALE, POD_TRUST, UNINDEXED_TIERS, LOG_ENTRIES, EVICTED_BLOCKS, POD_EVENTS, UNROUTED),
)
PICKER: Final = (PICKER_REQUESTS,)
PUBLISHER: Final = (
    *(ENGINE_UP, READY, ENGINE_LIVES, SCRAPES, PUBLISHER_EVENTS),
    *(JOINS, HELD_BLOCKS, JOINED, DEGRADED, HEARTBEAT_AGE),
)
TABLE: Final = (*WITH_MODEL, *PICKER, *PUBLISHER)


def markdown() -> str:
    """docs/metrics.md."""
    parts = (
        ("Routers and the index", "In Ray with the prefix `ray_`. The label `model` is on each.", WITH_MODEL),
        ("Envoy's endpoint picker", "`kvcache serve-scores --picker`.", PICKER),
        ("Publishers", "`kvcache publish --listen`. In Ray publishers have no endpoint: see `pod_events`.", PUBLISHER),
    )
    return "\n".join(
        (
            "# Metrics",
            "",
            (
                "Written by `make docs` from serve_app/metric_table.py. Where replicas or pods are named, they are"
                f" {NAMED_MAX} at a time; the others are one, `other`, or left out where they are well."
            ),
            *(line for part in parts for line in _part(*part)),
        )
    )


def _part(title: str, intro: str, metrics: Iterable[Metric]) -> list[str]:
    head = ["", f"## {title}", "", intro, "", "| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    rows = [
        f"| `{each.name}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} | {each.text} |"
        for each in metrics
    ]
    return [*head, *rows]
