"""`kvcache publish --server` beside an engine: its HTTP endpoints are played, its event sockets are vLLM's own."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve_app.errors import EngineAway
from serve_app.events.server import EngineServer
from serve_app.events.source import answers_replay
from serve_app.index.mirror import Mirror
from serve_app.ports import free_port, free_ports
from serve_app.types import Domain, PodId
from tests.engine import MODEL, SIZE, Engine, prompt
from tests.helpers import collected, eventually
from tests.vllm_api import Answer, Api, model_list, with_labels, with_values

START_S = 30.0  # for two Python processes on a busy machine


def same(answer: Answer, _: Any) -> Answer:
    return answer


def late(seconds: float, _: Any) -> Answer:
    time.sleep(seconds)
    return 200, b""


class Sidecar:
    """The command, with its log and its own HTTP server."""

    def __init__(self, folder: Path, redis_url: str, url: str, *options: str) -> None:
        self.health = f"127.0.0.1:{free_port()}"
        self._log = folder / "sidecar.log"
        command = [sys.executable, "-m", "serve_app.cli", "publish", "--redis", redis_url, "--server", url]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([*command, "--listen", self.health, *options], stderr=log)

    @property
    def log(self) -> str:
        return " ".join(self._log.read_text().split())  # errors are wrapped to the terminal's width

    def get(self, path: str) -> tuple[int, str]:
        try:
            answer = httpx.get(f"http://{self.health}{path}", trust_env=False, timeout=5)
        except httpx.HTTPError:
            return 0, ""
        return answer.status_code, answer.text

    def is_ready(self) -> bool:
        return self.get("/readyz")[0] == 200

    def metric(self, line: str) -> bool:
        return f"\nkvcache_publisher_{line}" in self.get("/metrics")[1]

    def ends(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


Start = Callable[..., Sidecar]


@pytest.fixture
def engine() -> Iterator[Engine]:
    events, replay = free_ports(2)
    engine = Engine(config={"endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{replay}"})
    yield engine
    engine.stop()


@pytest.fixture
def api(engine: Engine) -> Iterator[Api]:
    api = Api(MODEL, "alias", block_size=SIZE, num_gpu_blocks=100)
    config = {"enable_kv_cache_events": True, "endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint}
    told = json.dumps({"vllm_config": {"kv_events_config": config}}).encode()
    api.answers["/server_info"] = lambda _: (200, told)
    yield api
    api.stop()


@pytest.fixture
def start(tmp_path: Path, redis_url: str) -> Iterator[Start]:
    running: list[Sidecar] = []

    def start(url: str, *options: str) -> Sidecar:
        running.append(Sidecar(tmp_path, redis_url, url, *options))
        return running[-1]

    yield start
    for sidecar in running:
        if sidecar.process.poll() is None:
            sidecar.ends()


def record(mirror: Mirror) -> Domain | None:
    """Of the only pod; None, if there is not exactly one."""
    alive = [domain for domain, live, _ in mirror.domains() if live]
    return alive[0] if len(alive) == 1 else None


def held(mirror: Mirror, tokens: range) -> dict[PodId, int]:
    return {pod: match.total_tokens for pod, match in mirror.match(prompt(tokens)).items() if match.total_tokens}


def in_flight(mirror: Mirror, pod: str) -> int | None:
    load = mirror.load(PodId(pod))
    return None if load is None else load.in_flight


def test_server_and_redis_are_enough(api: Api, engine: Engine, start: Start, mirror: Mirror) -> None:
    sidecar = start(api.url, "--address", "10.0.3.7")
    eventually(lambda: f"waiting for the engine at {api.url}: /health:" in sidecar.log, START_S)
    assert sidecar.get("/healthz")[0] == 200
    status, why = sidecar.get("/readyz")
    assert (status, why.startswith(f"waiting for the engine at {api.url}")) == (503, True)
    api.models = model_list(MODEL, "alias", root="org/model", adapters=("tuned",))
    api.start()
    eventually(sidecar.is_ready, START_S)
    pod = f"10.0.3.7:{api.port}"
    eventually(lambda: record(mirror) is not None and record(mirror).adapters == ("tuned",))  # type: ignore[union-attr]
    found = record(mirror)
    assert found is not None
    assert (found.pod, found.address, found.capacity, found.rank) == (pod, pod, 100, None)
    assert (found.spec.model, found.spec.block_size, found.spec.tokenizer) == (MODEL, SIZE, "org/model")
    assert found.spec.served_names == ("alias",)
    assert {part for part, _ in found.spec.identity} == {"probe:chat", "probe:text", "probe:tools", "probe:turns"}
    engine.store(range(16))
    eventually(lambda: held(mirror, range(16)) == {pod: 16})
    eventually(lambda: sidecar.metric(f'blocks{{pod="{pod}"}} 4.0'))
    assert sidecar.metric(f'events_total{{pod="{pod}",result="applied"}} 1.0')
    assert sidecar.metric("engine_up 1.0")
    assert "HTTP Request" not in sidecar.log  # two scrapes a second are no news
    assert sidecar.ends() == 0
    eventually(lambda: mirror.pods() == [])


def test_the_load_reaches_the_mirror(api: Api, start: Start, mirror: Mirror) -> None:
    api.start()
    sidecar = start(api.url, "--pod", "p")
    eventually(lambda: in_flight(mirror, "p") == 0, START_S)
    served: list[Any] = []
    ended = {
        "request_prefill_time_seconds_count": 2.0,
        "request_prefill_time_seconds_sum": 0.5,
        "request_queue_time_seconds_sum": 0.25,
        "request_prompt_tokens_sum": 3000.0,
        "request_prefill_kv_computed_tokens_sum": 1000.0,
    }
    api.metrics = with_values(api.metrics, num_requests_running=3.0, num_requests_waiting=2.0, **ended)
    eventually(lambda: in_flight(mirror, "p") == 5)
    eventually(lambda: collected(served, mirror.served))
    assert served == [("p", (("", 1500, 1000, 0.125, 0.25),))]

    def said_at_s() -> float:
        load = mirror.load(PodId("p"))
        assert load is not None
        return load.received_at_s

    before_s = said_at_s()
    eventually(lambda: said_at_s() > before_s)  # what has not changed is news too: nobody else says when it does
    # What fails is counted, and stops nothing. Old figures are not told again.
    for answer in ((500, b""), (200, b"<html>"), (404, b"")):
        api.answers["/metrics"] = partial(same, answer)
        time.sleep(1.2)
    before_s = said_at_s()
    assert record(mirror) is not None
    assert sidecar.is_ready()
    time.sleep(1.2)
    assert said_at_s() == before_s
    metrics = sidecar.get("/metrics")[1]
    for reason in ("no_answer", "not_understood", "status"):
        assert f'kvcache_publisher_scrapes_total{{result="{reason}"}}' in metrics
    assert "engine_lives_total 1.0" in metrics
    api.answers["/metrics"] = lambda _: (200, api.metrics.encode())
    eventually(lambda: said_at_s() > before_s)


def test_another_life_of_the_engine(api: Api, engine: Engine, start: Start, mirror: Mirror) -> None:
    api.start()
    sidecar = start(api.url, "--pod", "p")
    eventually(lambda: record(mirror) is not None, START_S)
    engine.store(range(16))
    eventually(lambda: held(mirror, range(16)) == {"p": 16})
    first = record(mirror)
    api.stop()
    engine.stop()
    eventually(lambda: mirror.pods() == [], 10)
    eventually(lambda: sidecar.get("/readyz")[0] == 503)
    assert sidecar.get("/healthz")[0] == 200
    eventually(lambda: sidecar.metric("engine_up 0.0"))
    time.sleep(2.0)
    assert sidecar.process.poll() is None

    api.models = model_list(MODEL, root="org/other")
    api.metrics = with_labels(api.metrics, block_size=2 * SIZE, num_gpu_blocks=50)
    api.vocabulary = 1000
    engine.start()
    api.restart()
    eventually(sidecar.is_ready, START_S)
    eventually(lambda: record(mirror) is not None)
    second = record(mirror)
    assert first is not None
    assert second is not None
    assert second.epoch > first.epoch
    assert (second.spec.tokenizer, second.spec.block_size, second.capacity) == ("org/other", 2 * SIZE, 50)
    assert (first.spec.served_names, second.spec.served_names) == (("alias",), ())
    assert dict(first.spec.identity).keys() == dict(second.spec.identity).keys()
    assert not set(first.spec.identity) & set(second.spec.identity)
    assert held(mirror, range(16)) == {}


def test_a_restart_that_nobody_saw(api: Api, start: Start, mirror: Mirror) -> None:
    api.start()
    sidecar = start(api.url, "--pod", "p")
    eventually(lambda: record(mirror) is not None, START_S)
    epoch = record(mirror).epoch  # type: ignore[union-attr]
    api.vocabulary = 1000
    api.metrics = with_values(api.metrics, process_start_time_seconds=time.time())
    eventually(lambda: sidecar.metric("engine_lives_total 2.0"), START_S)
    eventually(lambda: (found := record(mirror)) is not None and found.epoch > epoch, START_S)
    assert "it has begun another life" in sidecar.log


def test_other_models_of_the_same_life(api: Api, start: Start, mirror: Mirror) -> None:
    api.start()
    start(api.url, "--pod", "p")
    eventually(lambda: record(mirror) is not None, START_S)
    epoch = record(mirror).epoch  # type: ignore[union-attr]
    api.models = model_list(MODEL, "alias", adapters=("b", "a"))
    eventually(lambda: (found := record(mirror)) is not None and found.adapters == ("a", "b"), 15)
    assert record(mirror).epoch == epoch  # type: ignore[union-attr]
    api.models = model_list(MODEL, "alias", root="org/swapped")
    eventually(lambda: (found := record(mirror)) is not None and found.spec.tokenizer == "org/swapped", 30)


def test_a_new_life_that_contradicts_is_said_and_not_published(api: Api, start: Start, mirror: Mirror) -> None:
    api.start()
    sidecar = start(api.url, "--pod", "p")
    eventually(lambda: record(mirror) is not None, START_S)
    api.metrics, right = with_labels(api.metrics, enable_prefix_caching="False"), api.metrics
    api.restart()
    eventually(lambda: "prefix caching is off" in sidecar.get("/readyz")[1], START_S)
    assert "prefix caching is off" in sidecar.log
    assert mirror.pods() == []
    assert sidecar.get("/healthz")[0] == 200
    api.metrics = right
    api.restart()
    eventually(lambda: record(mirror) is not None, START_S)


def test_a_publisher_that_is_killed_is_started_again(api: Api, start: Start, mirror: Mirror) -> None:
    api.models = model_list(MODEL, adapters=("tuned",))
    api.start()
    sidecar = start(api.url, "--pod", "p")
    eventually(lambda: (found := record(mirror)) is not None and found.adapters == ("tuned",), START_S)
    epoch = record(mirror).epoch  # type: ignore[union-attr]
    (child,) = psutil.Process(sidecar.process.pid).children()
    child.kill()
    eventually(lambda: (found := record(mirror)) is not None and found.epoch > epoch, START_S)
    eventually(lambda: record(mirror).adapters == ("tuned",))  # type: ignore[union-attr]
    assert sidecar.process.poll() is None


def test_ranks_of_one_server(redis_url: str, start: Start, mirror: Mirror) -> None:
    ports = free_ports(4)
    config = {"endpoint": f"tcp://*:{ports[0]}", "replay_endpoint": f"tcp://*:{ports[2]}"}
    engines = [Engine(config=config, rank=rank) for rank in (0, 1)]
    api = Api(MODEL, block_size=SIZE)
    api.metrics += api.metrics.replace('engine="0"', 'engine="1"').replace("process_start_time_seconds", "other")
    api.start()
    try:
        ends = [f"tcp://127.0.0.1:{port}" for port in (ports[0], ports[2])]
        sidecar = start(api.url, "--pod", "p", "--engine", ends[0], "--replay", ends[1])
        eventually(lambda: sorted(mirror.pods()) == ["p#0", "p#1"], START_S)
        engines[1].store(range(16))
        eventually(lambda: held(mirror, range(16)) == {"p#1": 16})
        api.metrics = api.metrics.replace(
            'running{engine="1",model_name="smol"} 0.0', 'running{engine="1",model_name="smol"} 4.0'
        )
        eventually(lambda: (in_flight(mirror, "p#0"), in_flight(mirror, "p#1")) == (0, 4))
        eventually(sidecar.is_ready)
    finally:
        api.stop()
        for engine in engines:
            engine.stop()


@pytest.mark.parametrize(
    ("path", "answer", "expected"),
    [
        ("/health", (404, b""), "is no vLLM server: /health answers 404"),
        ("/v1/models", (404, b""), "is no vLLM server: /v1/models answers 404"),
        ("/v1/models", (200, b"<html>"), "is no vLLM server: /v1/models is no list of models"),
        ("/v1/models", (200, model_list("m", owned_by="sglang")), "lists models that are owned by 'sglang'"),
        ("/v1/models", (401, b"{}"), "wants a key: give it to this process in VLLM_API_KEY"),
        ("/metrics", (404, b""), "is no vLLM server: /metrics answers 404"),
        ("/tokenize", (404, b""), "/tokenize knows no model 'test-model', or is not there"),
        ("/tokenize", (200, b'{"tokens": "x"}'), "/tokenize does not answer as vLLM does"),
        ("/tokenize", (200, b"[]"), "/tokenize does not answer as vLLM does"),
    ],
)
def test_what_is_no_vllm_server(api: Api, start: Start, path: str, answer: tuple[int, bytes], expected: str) -> None:
    api.answers[path] = lambda _: answer
    api.start()
    sidecar = start(api.url)
    assert sidecar.process.wait(START_S) == 1
    assert expected in sidecar.log
    assert "Traceback" not in sidecar.log


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model", "other"), "--model 'other' is no name of the base model"),
        (("--block-size", "64"), f"--block-size 64: the engine's blocks have {SIZE} tokens"),
        (("--listen", "nowhere"), "--listen 'nowhere' is no address to listen on"),
    ],
)
def test_options_that_contradict(api: Api, start: Start, options: tuple[str, ...], expected: str) -> None:
    api.start()
    sidecar = start(api.url, *options)
    assert sidecar.process.wait(START_S) == 1
    assert expected in sidecar.log


def test_a_probe_that_the_engine_fails_at_is_left_out(api: Api, start: Start, mirror: Mirror) -> None:
    """A chat template that raises, say."""
    tokenize = api.answers["/tokenize"]
    api.answers["/tokenize"] = lambda body: (500, b"") if "tools" in body else tokenize(body)
    api.start()
    start(api.url, "--pod", "p")
    eventually(lambda: record(mirror) is not None, START_S)
    assert [part for part, _ in record(mirror).spec.identity] == ["probe:chat", "probe:text", "probe:turns"]  # type: ignore[union-attr]


def test_a_server_with_a_key(api: Api, start: Start, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    api.key = "secret"
    api.start()
    sidecar = start(api.url, "--pod", "p")
    assert sidecar.process.wait(START_S) == 1
    assert "wants a key" in sidecar.log
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    start(api.url, "--pod", "p")
    eventually(lambda: record(mirror) is not None, START_S)


def test_a_replay_socket_is_known_by_its_answer(engine: Engine) -> None:
    engine.store(range(16))
    assert answers_replay(engine.replay_endpoint.replace("*", "127.0.0.1"), 10.0)
    assert not answers_replay(f"tcp://127.0.0.1:{free_port()}", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:  # somebody else's
        assert not answers_replay(f"tcp://127.0.0.1:{other.getsockname()[1]}", 0.2)


def test_an_answer_has_a_limit_of_time_and_size() -> None:
    """Whatever the server does, a question ends."""

    def drip(client: socket.socket) -> None:
        for _ in range(100):
            client.sendall(b"x")
            time.sleep(0.05)

    def flood(client: socket.socket) -> None:
        while True:
            client.sendall(b"x" * 65536)

    for send, why in ((drip, "takes more than 0.5 s"), (flood, "answers more than 16 MiB")):
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def serve(listening: socket.socket = listening, send: Callable[..., None] = send) -> None:
                client, _ = listening.accept()
                with client, contextlib.suppress(OSError):
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    send(client)

            threading.Thread(target=serve, daemon=True).start()
            server = EngineServer(f"http://127.0.0.1:{listening.getsockname()[1]}")
            with pytest.raises(EngineAway, match=why):
                server.get("/metrics", 0.5 if send is drip else 30.0)
            server.close()


def test_a_slow_server_is_waited_for(api: Api, start: Start, mirror: Mirror) -> None:
    """One that answers 503, then takes its time, is one that is starting."""
    api.answers["/health"] = lambda _: (503, b"")
    api.start()
    sidecar = start(api.url, "--pod", "p")
    eventually(lambda: "/health answers 503" in sidecar.log, START_S)
    api.answers["/health"] = partial(late, 1.5)
    eventually(lambda: record(mirror) is not None, START_S)
    api.answers["/metrics"] = partial(late, 60)
    time.sleep(6.0)
    assert record(mirror) is not None
    assert sidecar.get("/healthz")[0] == 200
    assert sidecar.ends() == 0
