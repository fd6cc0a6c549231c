"""A real Prometheus scrapes a score service under load, and a publisher: panels have data, rules are evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve_app.client import KVCacheClient
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.ports import free_port, free_ports
from tests import prometheus
from tests.contract.serve_router import MODEL, TOKENS, Fleet
from tests.contract.test_sidecar import START_S, Sidecar, Start, api, engine, start  # noqa: F401  # fixtures
from tests.engine import Engine
from tests.helpers import eventually
from tests.vllm_api import Api

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).parents[2] / "serve_app/dashboards"
# Counted by what is not here: Ray's HAProxy, Envoy, an LMCache server, a tier beyond the GPU, a cap that is reached.
NOT_HERE = ("kvcache_replica_", "kvcache_picker_", 'pod=~"node:', "unindexed_tiers", 'tier!="gpu"', "evicted_blocks")

TOKENIZER_S = 120.0  # what loads it is imported first; on a busy machine that takes long


class Prometheus:
    def __init__(self, folder: Path, *targets: str) -> None:
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(FOLDER / "rules.yaml")],
            "scrape_configs": [{"job_name": "kvcache", "static_configs": [{"targets": list(targets)}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_port()}"
        options = {
            "config.file": folder / "prometheus.yml",
            "storage.tsdb.path": folder / "data",
            "web.listen-address": self.address,
            "log.level": "warn",
        }
        program = prometheus.folder() / "prometheus"
        self.process = subprocess.Popen([program, *(f"--{name}={value}" for name, value in options.items())])

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"http://{self.address}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def ask(self, query: str) -> list[dict[str, Any]]:
        return list(self.get("query", query=query)["result"])

    def is_up(self, targets: int) -> bool:
        try:
            return len([one for one in self.ask("up") if one["value"][1] == "1"]) == targets
        except httpx.TransportError:
            return False


@pytest.fixture
def scores(redis_url: str, tmp_path: Path) -> Iterator[str]:
    """host:port of a score service."""
    http, grpc = free_ports(2)
    listen = ["--http", f"127.0.0.1:{http}", "--grpc", f"127.0.0.1:{grpc}"]
    options = ["-m", "serve_app.cli", "serve-scores", "--model", MODEL, "--redis", redis_url, *listen]
    with (tmp_path / "scores.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *options], stderr=log)
    yield f"127.0.0.1:{http}"
    process.terminate()
    process.wait(20)


def is_ready(scores: str) -> bool:
    try:
        return httpx.get(f"http://{scores}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def load(fleet: Fleet, scores: str, seconds: float) -> None:
    """Choices, and what came of them; every third cannot be read. One pod loses events."""
    pods = [fleet.join_plain(name, holds=3) for name in ("a", "b")]
    fleet.writer.join(replace(pods[0], degraded=True, doubt="events were lost"))
    fleet.writer.flush()

    def beat(number: int) -> bool:
        for pod in pods:
            counted = HeartbeatRecord(pod.epoch, events_applied=number, events_lost=number, beat=number)
            fleet.writer.heartbeat(pod.id, counted)
        return True

    eventually(lambda: beat(0) and is_ready(scores), TOKENIZER_S)
    until, number = time.monotonic() + seconds, 0
    with KVCacheClient(f"http://{scores}") as kv:
        while time.monotonic() < until:
            number += 1
            request = {"model": MODEL, "prompt": TOKENS} if number % 3 else {"model": MODEL, "messages": "none"}
            chosen = kv.choose(request, request_id=f"r{number}")
            kv.done(f"r{number}", chosen.chosen.pod, prompt_tokens=len(TOKENS), cached_tokens=8)
            beat(number)
            time.sleep(0.05)


def test_panels_have_data_and_rules_are_evaluated(
    fleet: Fleet,
    scores: str,
    tmp_path: Path,
    api: Api,  # noqa: F811
    engine: Engine,  # noqa: F811
    start: Start,  # noqa: F811
) -> None:
    api.start()
    sidecar: Sidecar = start(api.url, "--model", "alias")  # another model: the score service does not know it
    watching = Prometheus(tmp_path, scores, sidecar.health)
    try:
        eventually(lambda: watching.is_up(2) and sidecar.is_ready(), START_S)
        engine.store(range(16))
        load(fleet, scores, 8)
        asked = [query for query in panel_queries() if not any(part in query for part in NOT_HERE)]
        assert [query for query in asked if not watching.ask(query)] == []
        rules = watching.get("rules")["groups"][0]["rules"]
        assert {rule["name"]: rule["health"] for rule in rules} == {rule["name"]: "ok" for rule in rules}
        active = {rule["name"] for rule in rules if rule["state"] in {"pending", "firing"}}
        assert active >= {"KVCacheFallbacks", "KVCacheTrustNotExact", "KVCacheEventsLost", "KVCachePredictionWrong"}
        for exporter in (scores, sidecar.health):
            check_by_the_rules_of_prometheus(httpx.get(f"http://{exporter}/metrics").text)
    finally:
        watching.process.terminate()
        watching.process.wait(20)


def panel_queries() -> list[str]:
    boards = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    targets = [target for board in boards for panel in board["panels"] for target in panel["targets"]]
    return [each["expr"].replace("$__rate_interval", "10s").replace("$model", ".*") for each in targets]


def check_by_the_rules_of_prometheus(text: str) -> None:
    program = prometheus.folder() / "promtool"
    done = subprocess.run([program, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0
