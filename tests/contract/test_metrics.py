"""What a copy of the index shows, in a registry of Prometheus: all of it at every flush, and nothing of who is gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import Gauge
from prometheus_client.parser import text_string_to_metric_families

from serve_app import metric_table as table
from serve_app.index.mirror import Mirror
from serve_app.metric_table import NAMED_MAX
from serve_app.metrics import IndexMetrics, RouterMetrics
from serve_app.routing.receipts import Actual, Receipt
from serve_app.service.instruments import PrometheusInstruments, Registered
from serve_app.types import ModelId, Trust
from tests.contract.serve_router import MODEL, Fleet
from tests.helpers import eventually

Series = tuple[str, tuple[tuple[str, str], ...]]


@pytest.fixture
def mirror(redis_url: str) -> Iterator[Mirror]:
    mirror = Mirror(redis_url, ModelId(MODEL))
    mirror.start()
    yield mirror
    mirror.close()


def shown(registered: Registered) -> dict[Series, float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(registered.text().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def clear_gauges(registered: Registered) -> None:
    """As Ray does with those that are not set for two export intervals."""
    for made in registered._by_name.values():
        if isinstance(made, Gauge):
            made.clear()


def test_every_gauge_is_set_at_every_flush(mirror: Mirror, fleet: Fleet) -> None:
    registered = Registered()
    metrics = IndexMetrics(mirror, PrometheusInstruments(MODEL, registered))
    router = RouterMetrics(PrometheusInstruments(MODEL, registered))
    fleet.join_plain("a", holds=3)
    eventually(lambda: mirror.pods() == ["a"] and sum(mirror.block_counts().values()) == 3, 10)
    metrics.flush()
    router.flush()
    gauges = {each.name for each in table.WITH_MODEL if each.kind is table.Kind.GAUGE} - {table.UNINDEXED_TIERS.name}
    before = {series for series in shown(registered) if series[0] in gauges}
    assert {name for name, _ in before} == gauges
    clear_gauges(registered)
    metrics.flush()
    router.flush()
    assert {series for series in shown(registered) if series[0] in gauges} == before
    trust = {dict(labels)["trust"]: value for (name, labels), value in shown(registered).items() if "trust" in name}
    assert trust == {each: each == Trust.EXACT for each in Trust}


def test_of_a_pod_that_is_gone_nothing_is_shown(mirror: Mirror, fleet: Fleet) -> None:
    registered = Registered()
    metrics = IndexMetrics(mirror, PrometheusInstruments(MODEL, registered))
    domain = fleet.join_plain("a")
    eventually(lambda: mirror.pods() == ["a"], 10)
    metrics.flush()
    assert any(("pod", "a") in labels for _, labels in shown(registered))
    fleet.writer.leave(domain.id, domain.epoch)
    fleet.writer.flush()
    eventually(lambda: not mirror.domains(), 10)
    metrics.flush()
    assert not any(("pod", "a") in labels for _, labels in shown(registered))


def test_a_replica_that_is_gone_makes_place_for_another() -> None:
    registered = Registered()
    router = RouterMetrics(PrometheusInstruments("m", registered))
    actual = Actual(100, 60, 0.0, 0.1)
    for number in range(NAMED_MAX + 1):
        router.served(Receipt("id", 0.0, "r", "hit", "prefix", f"p{number}", 0.0, 100, 64, actual=actual))
    router.flush()

    def replicas() -> set[str]:
        return {dict(labels)["replica"] for _, labels in shown(registered) if "replica" in dict(labels)}

    assert replicas() == {f"p{number}" for number in range(NAMED_MAX)} | {"other"}
    router.keep_only([f"p{number}" for number in range(10)])
    assert replicas() == {f"p{number}" for number in range(10)} | {"other"}


def test_the_index_is_stale_since_the_start_until_redis_answers(redis_url: str) -> None:
    registered = Registered()
    IndexMetrics(Mirror(redis_url, ModelId(MODEL)), PrometheusInstruments(MODEL, registered)).flush()
    (stale,) = (value for (name, _), value in shown(registered).items() if name == table.STALE.name)
    assert 0 <= stale < float("inf")
