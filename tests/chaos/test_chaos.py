"""Every part dies, stands still, or is cut off, one after the other, under load on real engines.

Held to: no request fails but those in flight on a replica that dies; what the index calls `exact` is what the engines
have; all is right again in time. What came out is in benchmarks/results/chaos.json, and in docs/reliability.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from serve_app import local_stack
from serve_app.config import EMBEDDED
from tests.chaos.faults import FAULTS, SNAPSHOT, Fault
from tests.chaos.lanes import Lanes
from tests.chaos.target import Target
from tests.integration.conftest import Start, config
from tests.proxy import Proxy
from tests.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

MODEL = "smollm2-135m-instruct"
REPLICAS = 2
IN_A_ROW = 5  # right probes, so that it is no chance
CALM_S = 5.0  # of load before a fault
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "chaos.json"
CONFIGS = {"redis": "quickstart.yaml", "lmcache": "quickstart-lmcache.yaml"}


@pytest.fixture(scope="module")
def target(
    request: pytest.FixtureRequest, start_stack: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """Two real engines that evict, and a Valkey behind a proxy."""
    server = Server(tmp_path_factory.mktemp("valkey") / request.param, "--dbfilename", SNAPSHOT)
    proxy = Proxy(server.port)
    loaded = config(CONFIGS[request.param], num_gpu_blocks_override=160, max_model_len=4096)
    for app in loaded["applications"]:
        settings = app["args"].get("routing", app["args"])
        assert settings["redis_url"] == EMBEDDED
        settings["redis_url"] = proxy.url
    running = start_stack(loaded, direct=True)
    yield Target(running, server, proxy)
    local_stack.stop(running, on_progress=print)  # two HAProxys of Ray do not run at once
    proxy.close()
    server.kill()


@pytest.fixture(scope="module")
def lanes(target: Target) -> Iterator[Lanes]:
    url = target.running.url
    lanes = Lanes(url, f"{url}{target.running.graph}/v1/score", MODEL)
    lanes.start()
    yield lanes
    lanes.stop()


def write(row: dict[str, Any]) -> None:
    """Put it into the result file, in the place of the fault's row of before."""
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["faults"] if RESULT.exists() else []
    by_name = {each["fault"]: each for each in [*rows, row]}
    order = [fault.name for fault in FAULTS if fault.name in by_name]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(
        json.dumps({"command": "make chaos", "faults": [by_name[name] for name in order]}, indent=2) + "\n"
    )


@pytest.mark.parametrize(
    ("target", "fault"),
    [pytest.param(fault.needs, fault, id=fault.name) for fault in FAULTS],
    indirect=["target"],
    scope="module",
)
def test_fault(fault: Fault, target: Target, lanes: Lanes) -> None:
    _right_since(lanes, time.monotonic(), 60)
    time.sleep(CALM_S)
    began_s = fault.happen(target)
    mended_s = time.monotonic()
    right_s = _right_since(lanes, mended_s, fault.heals_s)
    time.sleep(1)
    failed = [r for r in lanes.failed(began_s) if not (fault.cuts and r.started_s <= began_s)]
    wrong, longest_s = lanes.wrong(began_s), round(lanes.longest_s(began_s), 2)
    row = {
        "fault": fault.name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "requests": len([r for r in list(lanes.requests) if r.ended_s >= began_s]),
        "failed": len(failed),
        "failed_in_flight": len(lanes.failed(began_s)) - len(failed),
        "longest_s": longest_s,
        "right_after_s": None if right_s is None else round(right_s - mended_s, 1),
        "wrong_exact": len(wrong),
        "compared": len([p for p in list(lanes.probes) if p.started_s >= began_s]),
    }
    write(row)
    print(f"\n{json.dumps(row)}", [(r.error, round(r.started_s - began_s, 2)) for r in failed][:20])
    print([(probe.error_blocks, round(probe.started_s - began_s, 2)) for probe in wrong])
    assert right_s is not None, f"not right within {fault.heals_s} s"
    assert longest_s <= fault.waits_s
    assert not failed
    assert not wrong


def _right_since(lanes: Lanes, since_s: float, within_s: float) -> float | None:
    """When it was right again; None: not within the time."""
    while time.monotonic() < since_s + within_s:
        if (right_s := lanes.right_since_s(since_s, REPLICAS, IN_A_ROW)) is not None:
            return right_s
        time.sleep(0.2)
    return None
