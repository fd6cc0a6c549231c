"""What a metric names in a large fleet."""

from __future__ import annotations

from serve_app.deployments.ray_host import RayInstruments
from serve_app.metric_table import NAMED_MAX
from serve_app.metrics import Named, RouterMetrics
from serve_app.routing.receipts import Actual, Receipt


def test_so_many_replicas_are_named_and_the_rest_are_one() -> None:
    named = Named()
    labels = [named.label(f"r{i}") for i in range(NAMED_MAX + 10)]
    assert labels == [f"r{i}" for i in range(NAMED_MAX)] + ["other"] * 10
    named.keep_only(f"r{i}" for i in range(5, NAMED_MAX + 10))
    assert [named.label(f"r{i}") for i in (5, NAMED_MAX, 0, NAMED_MAX + 9)][:2] == ["r5", f"r{NAMED_MAX}"]


def test_cached_tokens_of_a_large_fleet_add_up() -> None:
    metrics = RouterMetrics(RayInstruments("m"))
    for i in range(200):
        metrics.served(
            Receipt("id", 0.0, "r", "hit", "prefix", f"p{i}", 0.0, 100, 64, actual=Actual(100, 60, 0.0, 0.1))
        )
    with metrics._lock:
        cached = dict(metrics._cached)
        metrics._cached.clear()
    assert len(cached) == 2 * (NAMED_MAX + 1)
    assert sum(count for (kind, _), count in cached.items() if kind == "actual") == 200 * 60
    assert cached["actual", "other"] == (200 - NAMED_MAX) * 60
