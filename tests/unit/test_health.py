"""What a sidecar says of itself over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.errors import ConfigError
from serve_app.events.health import ALIVE_S, FRESH_S, QUIET_S, HealthServer, Pod, Snapshot
from serve_app.events.publisher import Report

REPORT = Report(True, True, False, 7, 20, 1, {"never_removed": 3}, 2, 0.5)
WELL = Snapshot(100.0, True, "", 1, {"ok": 5, "refused": 2}, (Pod('p"1', REPORT, 100.0),))


@pytest.mark.parametrize(
    ("snapshot", "now_s", "why"),
    [
        (WELL, 101.0, ""),
        (replace(WELL, up=False, pods=()), 101.0, ""),  # an engine that is away is no reason for a restart
        (WELL, 101.0 + ALIVE_S, "the loop has not turned"),
        (replace(WELL, turned_at_s=101.0 + QUIET_S), 101.0 + QUIET_S, "nothing was heard of the publishers of p"),
    ],
)
def test_sick(snapshot: Snapshot, now_s: float, why: str) -> None:
    assert why in snapshot.sick(now_s)
    assert bool(snapshot.sick(now_s)) == bool(why)


@pytest.mark.parametrize(
    ("report", "now_s", "why"),
    [
        (REPORT, 101.0, ""),
        (REPORT, 101.0 + FRESH_S, "has not said anything"),
        (None, 101.0, "has not said anything"),
        (Report(False, False, False, 0, 0, 0, {}, 0, -1.0), 101.0, "nobody sends the events"),
        (Report(True, False, False, 0, 0, 0, {}, 0, -1.0), 101.0, "is not in Redis yet"),
    ],
)
def test_missing(report: Report | None, now_s: float, why: str) -> None:
    missing = replace(WELL, pods=(*WELL.pods, Pod("other", report, 100.0))).missing(now_s)
    assert why in missing
    assert bool(missing) == bool(why)
    assert replace(WELL, up=False, waiting_for="the engine at U").missing(101.0) == "waiting for the engine at U"


class Served:
    def __init__(self) -> None:
        self.snapshot = replace(WELL, turned_at_s=time.monotonic(), pods=(Pod('p"1', REPORT, time.monotonic()),))
        self.server = HealthServer("127.0.0.1:0", lambda: self.snapshot)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.server.port}{path}", trust_env=False)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.server.close()


def test_probes(served: Served) -> None:
    for path in ("/healthz", "/readyz"):
        assert (served.get(path).status_code, served.get(path).text) == (200, "ok\n")
    served.snapshot = replace(served.snapshot, up=False, waiting_for="the engine at U")
    assert served.get("/healthz").status_code == 200
    assert (served.get("/readyz").status_code, served.get("/readyz").text) == (503, "waiting for the engine at U\n")
    served.snapshot = replace(served.snapshot, turned_at_s=time.monotonic() - 2 * ALIVE_S)
    assert served.get("/healthz").status_code == 503
    assert served.get("/other").status_code == 404


def test_metrics(served: Served) -> None:
    answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    got = {
        (sample.name.removeprefix("kvcache_publisher_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    age_s = got.pop(("heartbeat_age_seconds", 'p"1'))
    assert 0.5 <= age_s < 60
    assert got == {
        ("engine_up",): 1,
        ("ready",): 1,
        ("engine_lives_total",): 1,
        ("scrapes_total", "ok"): 5,
        ("scrapes_total", "refused"): 2,
        ("events_total", "applied", 'p"1'): 20,
        ("events_total", "lost", 'p"1'): 1,
        ("events_total", "never_removed", 'p"1'): 3,
        ("joins_total", 'p"1'): 2,
        ("blocks", 'p"1'): 7,
        ("joined", 'p"1'): 1,
        ("degraded", 'p"1'): 0,
    }


@pytest.mark.parametrize("listen", ["9411", "host", ":9411", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:x"])
def test_what_is_no_address(listen: str) -> None:
    with pytest.raises(ConfigError, match="write HOST:PORT"):
        HealthServer(listen, lambda: WELL)


def test_a_port_that_is_taken(served: Served) -> None:
    with pytest.raises(ConfigError, match="cannot be listened on"):
        HealthServer(f"127.0.0.1:{served.server.port}", lambda: WELL)
