"""Dashboards and alerts name metrics that there are, and an alert fires when it must, by Prometheus' own rules."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.metric_table import TABLE, WITH_MODEL, Kind
from tests import prometheus

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "serve_app/dashboards"
BOARDS = sorted(FOLDER.glob("*.json"))
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"][0]["rules"]
SERIES = {name: metric for metric in TABLE for name in metric.series}
_SELECTOR = re.compile(r'\{__name__=~"\(ray_\)\?(kvcache_\w+)"([^}]*)\}|(kvcache_\w+)')


def written_by_the_script() -> dict[Path, str]:
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "scripts/dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files: dict[Path, str] = module.files()
    return files


def panels(board: Path) -> list[dict[str, Any]]:
    return list(json.loads(board.read_text())["panels"])


def queries() -> list[str]:
    asked = [target["expr"] for board in BOARDS for panel in panels(board) for target in panel["targets"]]
    return [*asked, *(rule["expr"] for rule in RULES)]


def test_what_is_generated_is_up_to_date() -> None:
    written = written_by_the_script()
    assert [str(path) for path, text in written.items() if path.read_text() != text] == [], "run: make docs"
    assert set(BOARDS) == {path for path in written if path.suffix == ".json"}


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_metrics_that_there_are_and_labels_that_they_have(query: str) -> None:
    asked = [(found[1] or found[3], found[2] or "") for found in _SELECTOR.finditer(query)]
    assert asked
    labels = {"le", "model", "job", "instance"}
    for name, matchers in asked:
        metric = SERIES[name]
        has = {*metric.labels, *(["model"] if metric in WITH_MODEL else [])}
        assert set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', matchers)) <= has
        if metric.kind is not Kind.GAUGE:
            assert re.search(rf"(rate|increase)\(\{{[^{{]*{name}", query), f"{name} only rises"
        labels |= set(metric.labels)
    grouped = {each.strip() for found in re.findall(r" by \(([^)]*)\)", query) for each in found.split(",")}
    assert grouped <= labels


def test_every_metric_is_seen_somewhere() -> None:
    seen = {found[1] or found[3] for query in queries() for found in _SELECTOR.finditer(query)}
    assert [metric.name for metric in TABLE if not seen & set(metric.series)] == [
        "kvcache_publisher_engine_lives_total",
        "kvcache_publisher_joined",
        "kvcache_publisher_degraded",
    ]  # what they tell is in `joins`, `ready` and `kvcache_index_pod_trust`


def test_names_are_by_prometheus_rules() -> None:
    for metric in TABLE:
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert metric.text.endswith("."), metric.name
        assert not re.search(r"_(ms|milliseconds|minutes|count|gauge)(_|$)", metric.name)
        assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM)
    assert len({metric.name for metric in TABLE}) == len(TABLE)


def test_an_alert_says_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
    prometheus.promtool("check", "rules", FOLDER / "rules.yaml")


M = 'model="m"'
CACHED, DECIDED = "kvcache_router_cached_tokens_total", "kvcache_router_decisions_total"
EVENTS, TRUST = "kvcache_index_pod_events_total", "kvcache_index_pod_trust"
READY = 'kvcache_publisher_ready{job="p",instance="a"}'
# Alert -> series of 30 minutes, one value a minute, with which it fires at the end; and with which it does not.
FIRES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "KVCacheIndexStale": (
        {f"kvcache_index_stale_seconds{{{M}}}": "0x25 20 80 140 200 260"},
        {f"kvcache_index_stale_seconds{{{M}}}": "0x29 30"},
    ),
    "KVCacheLogLag": (
        {f"ray_kvcache_index_log_lag_seconds{{{M}}}": "3x30"},
        {f"ray_kvcache_index_log_lag_seconds{{{M}}}": "0.1x30"},
    ),
    "KVCacheTrustNotExact": (
        {f'{TRUST}{{{M},pod="p",trust="degraded"}}': "1x30", f'{TRUST}{{{M},pod="p",trust="exact"}}': "0x30"},
        {f'{TRUST}{{{M},pod="p",trust="degraded"}}': "0x30", f'{TRUST}{{{M},pod="p",trust="exact"}}': "1x30"},
    ),
    "KVCachePredictionWrong": (
        {f'{CACHED}{{{M},kind="predicted"}}': "0+120x30", f'{CACHED}{{{M},kind="actual"}}': "0+100x30"},
        {f'{CACHED}{{{M},kind="predicted"}}': "0+104x30", f'{CACHED}{{{M},kind="actual"}}': "0+100x30"},
    ),
    "KVCacheFallbacks": (
        {f'ray_{DECIDED}{{{M},outcome="fallback"}}': "0+20x30", f'ray_{DECIDED}{{{M},outcome="hit"}}': "0+80x30"},
        {f'ray_{DECIDED}{{{M},outcome="fallback"}}': "0+5x30", f'ray_{DECIDED}{{{M},outcome="hit"}}': "0+95x30"},
    ),
    "KVCacheRouterLoopHeld": (
        {f"kvcache_router_loop_lag_seconds{{{M}}}": "0.4x30"},
        {f"kvcache_router_loop_lag_seconds{{{M}}}": "0.1x28 0.4x2"},
    ),
    "KVCacheEventsLost": (
        {f'{EVENTS}{{{M},pod="p",result="lost"}}': "0x25 3x5"},
        {f'{EVENTS}{{{M},pod="p",result="lost"}}': "3x30"},
    ),
    "KVCacheEventsSkipped": (
        {f'{EVENTS}{{{M},pod="p",result="unknown"}}': "0+1x30"},
        {f'{EVENTS}{{{M},pod="p",result="applied"}}': "0+1x30"},
    ),
    "KVCachePublisherNotReady": ({READY: "0x30"}, {READY: "0x5 1x25"}),
    "KVCacheNoPods": ({f"kvcache_index_pods{{{M}}}": "0x30"}, {f"kvcache_index_pods{{{M}}}": "0x10 8x20"}),
    "KVCacheUnrouted": (
        {f'ray_kvcache_replica_unrouted_requests_total{{{M},reason="r"}}': "0+60x30"},
        {f'ray_kvcache_replica_unrouted_requests_total{{{M},reason="r"}}': "0+1x30"},
    ),
}


def test_alerts_fire_when_they_must(tmp_path: Path) -> None:
    assert set(FIRES) == {rule["alert"] for rule in RULES}
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                    "eval_time": "30m",
                    "exp_samples": [{"value": int(fires)}],
                }
            ],
        }
        for alert, cases in FIRES.items()
        for series, fires in zip(cases, (True, False), strict=True)
    ]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(FOLDER / "rules.yaml")], "tests": tests}))
    assert "SUCCESS" in prometheus.promtool("test", "rules", file)
