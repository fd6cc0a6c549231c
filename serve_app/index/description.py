"""A mirror, as people want to see it: what the index knows of every pod."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from serve_app.index.mirror import Mirror


def describe(mirror: Mirror) -> dict[str, Any]:
    """JSON of `GET /v1/pods`."""
    domains = mirror.domains()
    return {
        "stale_for_s": round(mirror.stale_for_s(), 3),
        "blocks": dict(mirror.block_counts()),
        "left_out": [
            {"sender": sender, "reason": reason, "count": count}
            for (sender, reason), count in mirror.left_out().items()
        ],
        "shared": [
            {
                "domain": domain.id,
                "live": live,
                "epoch": domain.epoch,
                "address": domain.address,
                "chunk_size": domain.chunk_size,
                "blocks": heartbeat.blocks if heartbeat else None,
                "events_applied": heartbeat.events_applied if heartbeat else None,
                "events_skipped": heartbeat.events_skipped if heartbeat else None,
                "events_lost": heartbeat.events_lost if heartbeat else None,
            }
            for domain, live, heartbeat in domains
            if domain.pod is None
        ],
        "pods": [
            {
                "pod": domain.pod,
                "live": live,
                "trust": mirror.trust(domain.pod),
                "epoch": domain.epoch,
                "address": domain.address,
                "replica": domain.replica or domain.pod,
                "rank": domain.rank,
                "capacity": domain.capacity or None,
                "cause": mirror.cause(domain.id) or domain.doubt,
                "block_size": domain.spec.block_size,
                "groups": [asdict(group) for group in domain.layout.groups] if domain.layout else [],
                "unindexed": dict(domain.unindexed),
                "blocks": heartbeat.blocks if heartbeat else None,
                "in_flight": heartbeat.in_flight if heartbeat else None,
                "events_applied": heartbeat.events_applied if heartbeat else None,
                "events_skipped": heartbeat.events_skipped if heartbeat else None,
                "events_lost": heartbeat.events_lost if heartbeat else None,
            }
            for domain, live, heartbeat in domains
            if domain.pod is not None
        ],
    }


def ages_s(mirror: Mirror) -> dict[str, float]:
    """Pod -> seconds since it reported last."""
    now_s = time.monotonic()
    loads = {pod: mirror.load(pod) for pod in mirror.pods()}
    return {str(pod): now_s - load.received_at_s for pod, load in loads.items() if load is not None}
