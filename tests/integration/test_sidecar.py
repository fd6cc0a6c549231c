"""A real vLLM server, and beside it `kvcache publish` with nothing but --server and --redis, through a restart."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from serve_app.events.plan import EVENTS_PORT, REPLAY_PORT
from serve_app.index.mirror import Mirror
from serve_app.ports import free_port
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.identity import PROBES
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import Domain, PodId
from tests.helpers import eventually, following
from tests.vllm_server import ALIAS, BLOCK, MODEL, Vllm

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

UP_S = 600.0
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "word " * 300}], "max_tokens": 2}


def ports() -> tuple[tuple[int, int, int], bool]:
    """Of the API, the events and the replay: vLLM's usual ones, if they are free. Whether the server must tell them."""
    for port in (EVENTS_PORT, REPLAY_PORT):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return (free_port(), free_port(), free_port()), True
    return (free_port(), EVENTS_PORT, REPLAY_PORT), False


class Sidecar:
    def __init__(self, redis_url: str, url: str, log: Path) -> None:
        self.health, self.log = free_port(), log
        command = [sys.executable, "-m", "serve_app.cli", "publish", "--server", url, "--redis", redis_url]
        with log.open("wb") as file:
            self.process = subprocess.Popen([*command, "--listen", f"127.0.0.1:{self.health}"], stderr=file)

    def ready(self) -> bool:
        assert self.process.poll() is None
        try:
            return httpx.get(f"http://127.0.0.1:{self.health}/readyz", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False


@pytest.fixture
def mirror(redis_url: str) -> Iterator[Mirror]:
    with following(redis_url, MODEL) as mirror:
        yield mirror


def record(mirror: Mirror) -> Domain:
    (found,) = [domain for domain, live, _ in mirror.domains() if live]
    return found


def check_match(mirror: Mirror, vllm: Vllm, pod: PodId, block: int) -> None:
    """The index predicts the engine's own figure, with the record as all that is known of the engine."""
    (prompt,) = PromptEncoder(record(mirror).spec, PrefixStore(1 << 24)).encode(BODY)
    expected = (prompt.token_count - 1) // block * block
    assert vllm.ask(BODY)[1] == 0
    eventually(lambda: mirror.match(prompt.block_keys, [pod])[pod].total_tokens >= expected, 30)
    assert vllm.ask(BODY) == (prompt.token_count, expected)


def test_a_server_its_load_and_its_restart(
    model_path: str, redis_url: str, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POD_IP", "10.0.3.7")
    chosen, tells = ports()
    sidecar = Sidecar(redis_url, f"http://127.0.0.1:{chosen[0]}", tmp_path / "sidecar.log")
    vllm = Vllm(model_path, tmp_path / "vllm.log", ports=chosen, developer=tells)
    try:
        eventually(vllm.is_up, UP_S)
        eventually(sidecar.ready, 60)
        pod = PodId(f"10.0.3.7:{chosen[0]}")
        eventually(lambda: mirror.pods() == [pod], 30)
        found = record(mirror)
        assert (found.address, found.capacity, found.spec.block_size) == (pod, 160, BLOCK)
        assert (found.spec.tokenizer, found.spec.served_names) == (model_path, (ALIAS,))
        assert {part for part, _ in found.spec.identity} == {f"probe:{name}" for name in PROBES}
        assert PromptEncoder(found.spec, PrefixStore(1 << 20)).differing() == []
        assert f"replay tcp://127.0.0.1:{chosen[2]}" in sidecar.log.read_text()
        check_match(mirror, vllm, pod, BLOCK)
        check_load(mirror, vllm, pod)

        vllm.kill()
        eventually(lambda: mirror.pods() == [], 15)
        eventually(lambda: not sidecar.ready(), 15)

        other = ("--block-size", str(2 * BLOCK), "--num-gpu-blocks-override", "100", "--served-model-name", MODEL)
        vllm = Vllm(model_path, tmp_path / "vllm-2.log", *other, ports=chosen, developer=tells)
        eventually(vllm.is_up, UP_S)
        eventually(sidecar.ready, 60)
        eventually(lambda: mirror.pods() == [pod], 30)
        again = record(mirror)
        assert again.epoch > found.epoch
        assert (again.capacity, again.spec.block_size, again.spec.served_names) == (100, 2 * BLOCK, ())
        assert again.spec.identity == found.spec.identity
        check_match(mirror, vllm, pod, 2 * BLOCK)
    finally:
        if vllm.process.poll() is None:
            vllm.kill()
        sidecar.process.terminate()
        ended = sidecar.process.wait(20)
        print(sidecar.log.read_text())
    assert ended == 0


def check_load(mirror: Mirror, vllm: Vllm, pod: PodId) -> None:
    """Requests are in flight while they are, and what they have cost is told when they have ended."""
    list(mirror.served())
    asked = [BODY | {"messages": [{"role": "user", "content": f"{n} " * 300}], "max_tokens": 64} for n in (7, 8)]

    def in_flight() -> int:
        load = mirror.load(pod)
        return -1 if load is None or time.monotonic() > load.received_at_s + 2.0 else load.in_flight

    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(vllm.ask, body | {"ignore_eos": True}) for body in asked]
        eventually(lambda: in_flight() == 2, 60)
        assert [answer.result()[1] for answer in answers] == [0, 0]
    eventually(lambda: in_flight() == 0, 20)
    served = [one for _, several in mirror.served() for one in several]
    assert served
    assert all(one.request_id == "" and one.prompt_tokens > 300 and one.prefill_s > 0 for one in served)
