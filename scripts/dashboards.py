"""Writes serve_app/dashboards/*.json (Grafana) and docs/metrics.md: the panels below, and serve_app/metric_table.py.

    make docs

A query names metrics as `{NAME}`; what is written matches them with and without Ray's prefix, and of the chosen models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from serve_app import metric_table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "serve_app/dashboards"
_WITH_MODEL = {name for metric in metric_table.WITH_MODEL for name in metric.series}
_NAMED = re.compile(r"\{(\w+)(?:,([^}]*))?\}")
_PANEL_HEIGHT, _PANEL_WIDTH, _ROW_WIDTH = 8, 12, 24


class Panel(NamedTuple):
    title: str
    text: str  # what a reader learns from it
    unit: str  # as Grafana names it
    queries: Sequence[tuple[str, str]]  # PromQL, legend
    kind: str = "timeseries"


def _share(part: str, whole: str) -> str:
    return f"sum by (model) (rate({part}[$__rate_interval])) / sum by (model) (rate({whole}[$__rate_interval]))"


def _quantile(q: float, metric: str, by: str = "model") -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}[$__rate_interval])))"


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


_HIT_RATE = Panel(
    "Share of prompt tokens that the chosen replica held",
    "What prefix caching saves. Low: prompts have little in common, caches are too small, or see Index truth.",
    "percentunit",
    [(_share("{kvcache_router_matched_tokens_total}", "{kvcache_router_prompt_tokens_total}"), "{{model}}")],
)
_DECISIONS = Panel(
    "Requests by what the choice rested on",
    "hit: a replica held a part of the prompt. miss: none did. fallback: cache knowledge was missing.",
    "reqps",
    [(_rate("{kvcache_router_decisions_total}", "outcome"), "{{outcome}}")],
)
_FALLBACKS = Panel(
    "Fallbacks by reason",
    "Requests that went to the replica with the fewest requests, because the index could not be asked.",
    "reqps",
    [(_rate('{kvcache_router_decisions_total,outcome="fallback"}', "reason"), "{{reason}}")],
)
_TRUST = Panel(
    "Replicas by trust",
    "exact: what is known of a replica is right. degraded or stale: its matches count less.",
    "short",
    [("sum by (trust) (max by (model, pod, trust) ({kvcache_index_pod_trust}))", "{{trust}}")],
)
_STALE = Panel(
    "Since Redis last answered",
    "The index is served on when Redis is away, and grows old.",
    "s",
    [("max by (model) ({kvcache_index_stale_seconds})", "{{model}}")],
)
_DECISION_TIME = Panel(
    "Time of a decision",
    "From the request to the choice, in the router.",
    "s",
    [
        (_quantile(q, '{kvcache_router_stage_latency_seconds_bucket,stage="total"}'), f"p{q * 100:g} {{{{model}}}}")
        for q in (0.5, 0.99)
    ],
)
_PREDICTED = Panel(
    "Cached tokens: predicted, and as the engines say",
    "The two lines are one while the index is right.",
    "short",
    [(_rate("{kvcache_router_cached_tokens_total}", "kind"), "{{kind}}")],
)
_LOST = Panel(
    "KV events that were lost or not understood",
    "Lost: batches that no replay could bring. Others: by the reason why they were skipped.",
    "short",
    [
        (
            'sum by (pod, result) (increase({kvcache_index_pod_events_total,result!="applied"}[$__rate_interval]))',
            "{{pod}} {{result}}",
        )
    ],
)

BOARDS: dict[str, tuple[str, Sequence[Panel]]] = {
    "overview": (
        "KV cache: overview",
        [
            _HIT_RATE,
            _DECISIONS,
            Panel(
                "Live replicas",
                "That publish what they hold.",
                "short",
                [("max by (model) ({kvcache_index_pods})", "{{model}}")],
                "stat",
            ),
            Panel(
                "Blocks in the index by tier",
                "Distinct ones: a block that two replicas hold counts once.",
                "short",
                [("max by (model, tier) ({kvcache_index_blocks})", "{{model}} {{tier}}")],
            ),
            Panel(
                "Time to first token",
                "By the engines' figures: queue and prefill.",
                "s",
                [
                    (_quantile(q, "{kvcache_router_ttft_seconds_bucket}"), f"p{q * 100:g} {{{{model}}}}")
                    for q in (0.5, 0.9)
                ],
            ),
            _TRUST,
            _STALE,
            _DECISION_TIME,
        ],
    ),
    "routing": (
        "KV cache: routing",
        [
            _DECISIONS,
            _FALLBACKS,
            _DECISION_TIME,
            Panel(
                "Time by stage",
                "prompt: request to block keys. index: keys to matches. 99th percentile.",
                "s",
                [(_quantile(0.99, "{kvcache_router_stage_latency_seconds_bucket}", "stage"), "{{stage}}")],
            ),
            Panel(
                "How late the event loop was at worst",
                "Every request waits so long. The router's log says what held it.",
                "s",
                [("max by (model) ({kvcache_router_loop_lag_seconds})", "{{model}}")],
            ),
            Panel(
                "Matched tokens by tier",
                "Where what replicas held was.",
                "short",
                [(_rate("{kvcache_router_matched_tokens_total}", "tier"), "{{tier}}")],
            ),
            Panel(
                "Requests that no router saw",
                "HAProxy balanced them plainly (Ray), by reason.",
                "reqps",
                [(_rate("{kvcache_replica_unrouted_requests_total}", "reason"), "{{reason}}")],
            ),
            Panel(
                "Envoy's picker",
                "Requests, and what they met with.",
                "reqps",
                [(_rate("{kvcache_picker_requests_total}", "kind"), "{{kind}}")],
            ),
        ],
    ),
    "index-truth": (
        "KV cache: index truth",
        [
            _PREDICTED,
            Panel(
                "Error of a prediction by replica",
                "Tokens between predicted and actual, 90th percentile. Less than a block is right.",
                "short",
                [(_quantile(0.9, "{kvcache_router_prediction_error_tokens_bucket}", "replica"), "{{replica}}")],
            ),
            _TRUST,
            Panel(
                "Replicas that are not exact",
                "GET /v1/pods says the cause.",
                "short",
                [
                    (
                        'max by (model, pod, trust) ({kvcache_index_pod_trust,trust!="exact"}) == 1',
                        "{{pod}} {{trust}}",
                    )
                ],
            ),
            _STALE,
            Panel(
                "How late the index is",
                "From a record in Redis to the index.",
                "s",
                [("max by (model) ({kvcache_index_log_lag_seconds})", "{{model}}")],
            ),
            _LOST,
            Panel(
                "Loads, gaps and errors of the index",
                "A gap makes it load everything again.",
                "short",
                [
                    (
                        (
                            'sum by (kind) (increase({kvcache_index_log_entries_total,kind!~"add|remove|route|told"}'
                            "[$__rate_interval]))"
                        ),
                        "{{kind}}",
                    )
                ],
            ),
        ],
    ),
    "replicas": (
        "KV cache: replicas",
        [
            Panel(
                "Tokens from each replica's cache",
                "As the engine says.",
                "short",
                [(_rate('{kvcache_router_cached_tokens_total,kind="actual"}', "replica"), "{{replica}}")],
            ),
            Panel(
                "Time to first token by replica",
                "90th percentile of queue and prefill.",
                "s",
                [(_quantile(0.9, "{kvcache_router_ttft_seconds_bucket}", "replica"), "{{replica}}")],
            ),
            Panel(
                "Requests by replica",
                "Those that the engine has told of.",
                "reqps",
                [(_rate("{kvcache_router_ttft_seconds_count}", "replica"), "{{replica}}")],
            ),
            Panel(
                "Blocks that each engine holds",
                "Of publishers that are scraped (`kvcache publish --listen`).",
                "short",
                [("max by (pod) ({kvcache_publisher_blocks})", "{{pod}}")],
            ),
        ],
    ),
    "write-path": (
        "KV cache: write path",
        [
            Panel(
                "KV events by replica",
                "That were put into the index.",
                "short",
                [
                    (_rate('{kvcache_index_pod_events_total,result="applied"}', "pod"), "{{pod}}"),
                    (_rate('{kvcache_publisher_events_total,result="applied"}', "pod"), "{{pod}} by its publisher"),
                ],
            ),
            _LOST,
            Panel(
                "Publishers",
                "Whether the engine is there, and its record in Redis. /readyz says what is missing.",
                "short",
                [
                    ("min by (instance) ({kvcache_publisher_engine_up})", "engine {{instance}}"),
                    ("min by (instance) ({kvcache_publisher_ready})", "record {{instance}}"),
                ],
            ),
            Panel(
                "Since the last heartbeat",
                "That Redis has confirmed. Beyond 5 s the lease ends, and the replica leaves the index.",
                "s",
                [("max by (pod) ({kvcache_publisher_heartbeat_age_seconds})", "{{pod}}")],
            ),
            Panel(
                "Everything published again",
                "After a new life of the engine, or when Redis lost what it had.",
                "short",
                [("sum by (pod) (increase({kvcache_publisher_joins_total}[$__rate_interval]))", "{{pod}}")],
            ),
            Panel(
                "Scrapes of the engines by result",
                "What is not `ok` leaves the load unknown.",
                "short",
                [(_rate("{kvcache_publisher_scrapes_total}", "result"), "{{result}}")],
            ),
            Panel(
                "Log entries by kind",
                "What the index has applied.",
                "short",
                [(_rate("{kvcache_index_log_entries_total}", "kind"), "{{kind}}")],
            ),
            Panel(
                "Blocks evicted by the index's own cap",
                "More than none: raise max_blocks.",
                "short",
                [("sum by (model) (increase({kvcache_index_evicted_blocks_total}[$__rate_interval]))", "{{model}}")],
            ),
        ],
    ),
    "lmcache": (
        "KV cache: LMCache and offload",
        [
            Panel(
                "Blocks beyond the GPU",
                "Of native offload (cpu), LMCache and storage.",
                "short",
                [('max by (model, tier) ({kvcache_index_blocks,tier!="gpu"})', "{{model}} {{tier}}")],
            ),
            Panel(
                "Matched tokens beyond the GPU",
                "That were loaded and not computed.",
                "short",
                [(_rate('{kvcache_router_matched_tokens_total,tier!="gpu"}', "tier"), "{{tier}}")],
            ),
            Panel(
                "Share of matched tokens that is beyond the GPU",
                "High: GPU caches are small for the load, and offload carries it.",
                "percentunit",
                [
                    (
                        _share(
                            '{kvcache_router_matched_tokens_total,tier!="gpu"}', "{kvcache_router_matched_tokens_total}"
                        ),
                        "{{model}}",
                    )
                ],
            ),
            Panel(
                "Tiers that the index does not follow",
                "Engines offload there, and what they hold is not known. Its record says why.",
                "short",
                [("max by (pod, tier) ({kvcache_index_unindexed_tiers})", "{{pod}} {{tier}}")],
            ),
            Panel(
                "Events of LMCache servers",
                "By what became of them.",
                "short",
                [(_rate('{kvcache_index_pod_events_total,pod=~"node:.*"}', "pod, result"), "{{pod}} {{result}}")],
            ),
        ],
    ),
}


def promql(query: str) -> str:
    def selector(found: re.Match[str]) -> str:
        name, more = found.groups()
        model = ['model=~"$model"'] if name in _WITH_MODEL else []
        return "{" + ",".join([f'__name__=~"(ray_)?{name}"', *model, *([more] if more else [])]) + "}"

    return _NAMED.sub(selector, query)


def board(name: str) -> dict[str, Any]:
    title, panels = BOARDS[name]
    return {
        "uid": f"kvcache-{name}",
        "title": title,
        "tags": ["kvcache"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_DATASOURCE, _MODEL]},
        "links": [
            {"type": "dashboards", "tags": ["kvcache"], "title": "KV cache", "keepTime": True, "includeVars": True}
        ],
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_DATASOURCE = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
_MODEL = {
    "name": "model",
    "type": "query",
    "datasource": _SOURCE,
    "query": {"query": 'label_values({__name__=~"(ray_)?kvcache_index_pods"}, model)', "refId": "model"},
    "refresh": 2,
    "multi": True,
    "includeAll": True,
    "allValue": ".*",
    "current": {"text": "All", "value": "$__all"},
}


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    left, row = number * _PANEL_WIDTH % _ROW_WIDTH, number * _PANEL_WIDTH // _ROW_WIDTH
    return {
        "id": number + 1,
        "title": panel.title,
        "description": panel.text,
        "type": panel.kind,
        "datasource": _SOURCE,
        "gridPos": {"h": _PANEL_HEIGHT, "w": _PANEL_WIDTH, "x": left, "y": row * _PANEL_HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": promql(query), "legendFormat": legend}
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }


def files() -> dict[Path, str]:
    """All that is written."""
    boards = {FOLDER / f"{name}.json": json.dumps(board(name), indent=2) + "\n" for name in BOARDS}
    return {**boards, ROOT / "docs/metrics.md": metric_table.markdown() + "\n"}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
