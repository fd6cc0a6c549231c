"""`kvcache serve-scores` as a process: how it starts, ends, reads its configuration again, and is several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from serve_app.access import hash_key
from serve_app.client import KVCacheClient, ServiceError
from serve_app.ports import free_port, free_ports
from tests.contract.serve_router import MODEL, SIZE, TOKENS, Fleet

PROMPT = {"model": MODEL, "prompt": TOKENS}


class Command:
    def __init__(self, *options: str, home: Path | None = None) -> None:
        self.http, self.grpc = free_ports(2)
        at = ["--http", f"127.0.0.1:{self.http}", "--grpc", f"127.0.0.1:{self.grpc}"]
        environ = {**os.environ, **({"KVCACHE_HOME": str(home)} if home else {})}
        command = [sys.executable, "-m", "serve_app.cli", "serve-scores", *at, *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
        self.url = f"http://127.0.0.1:{self.http}"

    def until(self, check: Callable[[], bool], timeout_s: float = 120.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            try:
                if check():
                    return
            except (httpx.TransportError, ServiceError):
                pass
            assert time.monotonic() < deadline_s
            time.sleep(0.05)

    def is_ready(self) -> bool:
        return httpx.get(f"{self.url}/readyz").status_code == 200

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def config(path: Path, redis_url: str, **more: Any) -> str:
    path.write_text(yaml.safe_dump({"redis_url": redis_url, "models": [{"model": MODEL}], "drain_s": 2, **more}))
    return str(path)


def test_sighup_reads_again_and_sigterm_ends_it(
    redis_url: str, fleet: Fleet, tmp_path: Path, commands: list[Command]
) -> None:
    fleet.join_plain("a", holds=3)
    path = tmp_path / "score.yaml"
    running = Command("--config", config(path, redis_url))
    commands.append(running)
    running.until(running.is_ready)
    with KVCacheClient(running.url, key="secret") as kv, KVCacheClient(running.url, key="") as nobody:
        assert nobody.score(PROMPT).pods["a"].matched_tokens == {"gpu": 3 * SIZE}
        keys = tmp_path / "keys"
        keys.write_text(yaml.safe_dump({"keys": [{"name": "x", "sha256": hash_key("secret")}]}))
        config(path, redis_url, auth={"keys_file": str(keys)}, score_strategy="coverage")
        running.process.send_signal(signal.SIGHUP)
        running.until(lambda: kv.score(PROMPT).strategy == "coverage")
        with pytest.raises(ServiceError, match="wants a key"):
            nobody.score(PROMPT)
        path.write_text("models: []")
        running.process.send_signal(signal.SIGHUP)  # is wrong: all stays
        time.sleep(0.3)
        assert kv.score(PROMPT).strategy == "coverage"
    assert running.end() == 0


def test_several_workers_answer_at_one_port_and_a_killed_one_comes_back(
    redis_url: str, fleet: Fleet, tmp_path: Path, commands: list[Command]
) -> None:
    fleet.join_plain("a", holds=3)
    running = Command("--config", config(tmp_path / "score.yaml", redis_url), "--workers", "2")
    commands.append(running)
    parent = psutil.Process(running.process.pid)
    running.until(lambda: len(listening(parent, running.http)) == 2)
    running.until(running.is_ready)
    killed = listening(parent, running.http)[0]
    killed.kill()
    with KVCacheClient(running.url) as kv:
        for _ in range(20):
            assert kv.score(PROMPT).pods["a"].matched_tokens == {"gpu": 3 * SIZE}, "the other one answers"
    running.until(lambda: len(listening(parent, running.http)) == 2)
    workers = listening(parent, running.http)
    assert killed not in workers
    assert running.end() == 0
    assert not psutil.wait_procs(workers, timeout=10)[1]


def listening(parent: psutil.Process, port: int) -> list[psutil.Process]:
    found = []
    for child in parent.children():
        if any(one.laddr.port == port and one.status == "LISTEN" for one in child.net_connections()):
            found.append(child)
    return found


def test_embedded_needs_nothing_else(tmp_path: Path, commands: list[Command]) -> None:
    running = Command("--embedded", "--model", MODEL, home=tmp_path / "home")
    commands.append(running)
    running.until(lambda: httpx.get(f"{running.url}/healthz").status_code == 200)
    answer = httpx.post(f"{running.url}/v1/score", json=PROMPT)
    assert answer.status_code == 503
    fleet = Fleet(f"unix://{tmp_path}/home/scores/valkey.sock", "no-tokenizer")
    fleet.join_plain("a")
    with KVCacheClient(running.url) as kv:
        running.until(lambda: len(kv.pods()["pods"]) == 1)
    fleet.writer.close()
    assert running.end() == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": []}, "models"),
        ({"models": [{"model": "m"}], "htpp": "127.0.0.1:1"}, "htpp"),
        ({"models": [{"model": "m"}, {"model": "m"}]}, "twice"),
        ({"models": [{"model": "m"}], "http": "8100"}, "http"),
        ({"models": [{"model": "m"}, {"model": "n"}], "picker": "127.0.0.1:9002"}, "picker"),
        ({"models": [{"model": "m"}], "discovery": {"static": ["a:1"], "dns": "b:1"}}, "one of"),
        ({"models": [{"model": "m"}], "workers": 2, "grpc": "127.0.0.1:0"}, "workers"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    path = tmp_path / "score.yaml"
    path.write_text(yaml.safe_dump({"redis_url": "redis://127.0.0.1:1", **given}))
    command = [sys.executable, "-m", "serve_app.cli", "serve-scores", "--config", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("option", ["--http", "--grpc", "--picker"])
def test_a_port_that_is_taken_is_said(redis_url: str, commands: list[Command], option: str) -> None:
    """Also one that another service has: it would share the questions, of another fleet maybe."""
    picker = free_port()
    running = Command("--model", MODEL, "--redis", redis_url, "--picker", f"127.0.0.1:{picker}")
    commands.append(running)
    running.until(lambda: httpx.get(f"{running.url}/healthz").status_code == 200)
    free = dict(zip(("--http", "--grpc", "--picker"), free_ports(3), strict=True))
    taken = {"--http": running.http, "--grpc": running.grpc, "--picker": picker}[option]
    ports = free | {option: taken}
    options = ["--model", MODEL, "--redis", redis_url, *(f"{name}=127.0.0.1:{port}" for name, port in ports.items())]
    command = [sys.executable, "-m", "serve_app.cli", "serve-scores", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"127.0.0.1:{taken}" in ended.stderr
    assert "Traceback" not in ended.stderr
