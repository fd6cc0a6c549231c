"""What a soak has seen -> its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.soak.children import Children
from benchmarks.soak.truth import Truth
from benchmarks.soak.verdict import WARM_UP_S, judged, verdict
from serve_app.index.redis_writer import LOG_MAX_ENTRIES

_STREAM_NODE: Final = 200  # entries by which a stream may be longer than its approximate MAXLEN


@dataclass
class Seen:
    redis: list[dict[str, float]] = field(default_factory=list)  # one each second or so
    delays_ms: list[float] = field(default_factory=list)  # from an engine's store to the mirror
    lags_ms: list[float] = field(default_factory=list)  # the mirror's own figure
    state: Mapping[str, Any] = field(default_factory=dict)  # of the mirror, as it was last


def report(
    *,
    seen: Seen,
    children: Children,
    truth: Truth,
    lasted_s: float,
    load: Mapping[str, Any],
    counts: Sequence[Mapping[str, int]],
    left: Mapping[str, int] | None,
    failure: str,
    maxmemory_mb: int,
) -> dict[str, Any]:
    """Args:
    counts: of each process with simulated engines: events sent, blocks stored and removed.
    left: what mirror and engines held at the end.
    """
    warm_up_s = min(WARM_UP_S, lasted_s / 2)
    processes = judged(children.samples, warm_up_s)
    of_redis = {
        "used_mb_max": round(max((one["used_mb"] for one in seen.redis), default=0.0), 1),
        "used_mb_last": round(seen.redis[-1]["used_mb"], 1) if seen.redis else 0.0,
        "limit_mb": round(maxmemory_mb * 2**20 / 1e6, 1),
        "evicted_keys": max((one["evicted_keys"] for one in seen.redis), default=0),
        "log_max": max((one["log"] for one in seen.redis), default=0),
        "log_limit": LOG_MAX_ENTRIES + _STREAM_NODE,
    }
    claims = verdict(
        processes=processes,
        judged_s=lasted_s - warm_up_s,
        died=[*children.died, *([failure] if failure else [])],
        redis=of_redis,
        truth=truth.for_verdict(),
    )
    sent, stored, removed = (sum(one[what] for one in counts) for what in ("events", "stored", "removed"))
    return {
        "load": {
            **load,
            "events_per_s_sent": round(sent / lasted_s, 1),
            "events_per_s_after_warm_up": _rate([one for one in seen.redis if one["at_s"] >= warm_up_s]),
            "events_sent": sent,
            "blocks_stored": stored,
            "blocks_removed": removed,
            "turnovers": round(removed / load["blocks_of_all_pools"], 2),
        },
        "truth": {**truth.counts, "settled_after_ms": _spread(truth.settled_ms), "examples": truth.examples},
        "at_the_end": left,
        "event_to_mirror_ms": _spread(seen.delays_ms),
        "mirror_lag_ms": _spread(seen.lags_ms),
        "redis": of_redis,
        "publishers": seen.state.get("publishers"),
        "mirror": {name: seen.state.get(name) for name in ("counters", "evicted_blocks", "late_probes")},
        "died": children.died,
        "verdict": claims,
        "holds": all(claim is not False for claim in claims.values()),
        "judged_after_s": round(warm_up_s, 1),
        "processes": processes,
        "redis_by_minute": [{name: round(value, 1) for name, value in one.items()} for one in seen.redis[::60]],
    }


def _rate(seen: Sequence[Mapping[str, float]]) -> float:
    """Events a second that the publishers have applied."""
    if len(seen) < 2:
        return 0.0
    return round((seen[-1]["events"] - seen[0]["events"]) / (seen[-1]["at_s"] - seen[0]["at_s"]), 1)


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    found = {name: round(ordered[min(len(ordered) - 1, int(len(ordered) * part))], 2) for name, part in at.items()}
    return {**found, "count": len(ordered)}
