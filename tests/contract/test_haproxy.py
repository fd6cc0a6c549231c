"""`kvcache-haproxy`: Ray's own configuration and Lua, the real HAProxy, and routers that fail in every way."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from ray.serve._private import haproxy as ray_haproxy_module
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig

from serve_app import haproxy
from tests.answering import Answering
from tests.helpers import eventually
from tests.servers import free_port

HAPROXY = Path(sys.executable).with_name("kvcache-haproxy")
TIMEOUT_S = 0.4
BODY: dict[str, object] = {"model": "m", "prompt": "hello"}


class Server:
    """An HTTP server of one purpose. `requests` are what it was asked: path, headers, body."""

    def __init__(self, answer: Callable[[str], tuple[int, dict[str, object]] | None]) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answer = answer  # None: it never answers
        self._release = threading.Event()
        outer = self

        class Handler(Answering, BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.say(200, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.requests.append((self.path, headers, body))
                answer = outer.answer(self.path)
                if answer is None:
                    outer._release.wait(10)
                    return
                self.say(*answer)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()


class Stack:
    """Two replicas `r0`, `r1`, a second application at /kvcache, and two routers that choose `r1`."""

    def __init__(self) -> None:
        self.replicas = [Server(lambda _, name=name: (200, {"by": name})) for name in ("r0", "r1")]  # type: ignore[misc]
        self.graph = Server(lambda _: (200, {"by": "graph"}))
        self.routers = [Server(lambda _: (200, {"replica_id": "id-1"})) for _ in range(2)]
        self.port = free_port()

    @property
    def asked(self) -> int:
        return sum(len(router.requests) for router in self.routers)

    def post(self, path: str = "/v1/completions", body: dict[str, object] = BODY, **headers: str) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{self.port}{path}", json=body, headers=headers, timeout=20)

    def asked_of(self, body: dict[str, object], **headers: str) -> int:
        """Which router is asked about it."""
        before = [len(router.requests) for router in self.routers]
        self.post(body=body, **headers).raise_for_status()
        ((place, _),) = [
            (i, now) for i, router in enumerate(self.routers) if (now := len(router.requests)) != before[i]
        ]
        return place

    def own(self) -> tuple[Server, Server]:
        """The router that is asked about `BODY`, and the other one."""
        first = self.asked_of(BODY)
        for router in self.routers:
            router.requests.clear()
        return self.routers[first], self.routers[1 - first]

    def by(self, count: int) -> list[str]:
        """Who answered so many requests; none of them may fail."""
        return [self.post().raise_for_status().json()["by"] for _ in range(count)]

    def close(self) -> None:
        for server in (*self.replicas, *self.routers, self.graph):
            with contextlib.suppress(OSError):
                server.close()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stack, Path]]:
    """A stack, and the configuration that Ray writes for it."""
    monkeypatch.setattr(ray_haproxy_module, "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY", True)
    stack = Stack()
    replicas = [
        ServerConfig(f"r{i}", "127.0.0.1", server.port, replica_id=f"id-{i}") for i, server in enumerate(stack.replicas)
    ]
    local = ray_haproxy_module.get_localhost_ip()  # type: ignore[attr-defined]  # Ray does not export it
    routers = [ServerConfig(f"router{i}", local, server.port) for i, server in enumerate(stack.routers)]
    backends = {
        "llm": BackendConfig("llm", "/", servers=replicas, ingress_request_router_servers=routers, app_name="llm"),
        "kvcache": BackendConfig(
            "kvcache", "/kvcache", servers=[ServerConfig("g", "127.0.0.1", stack.graph.port)], app_name="kvcache"
        ),
    }
    settings = HAProxyConfig(
        socket_path=str(tmp_path / "admin.sock"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "server-state"),
        metrics_port=free_port(),
        stats_port=free_port(),
        nbthread=1,  # each thread finds out for itself that a router does not answer
    )
    settings.http_options.host, settings.http_options.port = "127.0.0.1", stack.port
    path = tmp_path / "haproxy.cfg"
    api = HAProxyApi(settings, backends, str(path))
    api._generate_config_file_internal()
    with contextlib.closing(stack):
        yield stack, path


@pytest.fixture
def stack(
    config: tuple[Stack, Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Stack]:
    stack, path = config
    monkeypatch.setenv(haproxy.TIMEOUT_VARIABLE, str(getattr(request, "param", TIMEOUT_S)))
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(HAPROXY))
    with ExitStack() as processes:
        process = subprocess.Popen([str(HAPROXY), "-db", "-f", str(path)])
        processes.callback(process.wait)
        processes.callback(process.kill)

        def is_up() -> bool:
            assert process.poll() is None
            with contextlib.suppress(httpx.HTTPError):
                return stack.post().status_code == 200
            return False

        eventually(is_up)
        for server in (*stack.replicas, *stack.routers):
            server.requests.clear()
        yield stack


def test_a_router_is_asked_with_the_body_and_the_path(stack: Stack) -> None:
    answer = stack.post("/v1/completions?x=1", BODY, **{"x-request-id": "abc", "x-session-id": "s"})
    assert answer.json() == {"by": "r1"}
    ((path, headers, body),) = [request for router in stack.routers for request in router.requests]
    assert (path, json.loads(body)) == ("/internal/route", BODY)
    assert (headers["x-request-id"], headers["x-session-id"]) == ("abc", "s")
    assert headers["x-kvcache-path"] == "/v1/completions"


def test_routers_may_set_headers(stack: Stack) -> None:
    for router in stack.routers:
        router.answer = lambda _: (200, {"replica_id": "id-0", "request_headers": {"x-data-parallel-rank": "3"}})
    assert stack.by(4) == ["r0"] * 4
    assert {headers["x-data-parallel-rank"] for _, headers, _ in stack.replicas[0].requests} == {"3"}


def chat(first: str, *more: str, **fields: object) -> dict[str, object]:
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, (first, *more))]  # noqa: B905
    return {"model": "m", "messages": [{"role": "system", "content": "Be brief. " * 100}, *turns], **fields}


def test_a_conversation_has_its_router_and_conversations_are_spread(stack: Stack) -> None:
    places = []
    for number in range(32):
        first = f"Question {number} of a long conversation."
        turns = [
            chat(first),
            chat(first, "Well.", "And then?"),
            chat(first, "Well.", "Now?", max_tokens=5, stream=False),
        ]
        (place,) = {stack.asked_of(body) for body in turns}
        places.append(place)
    assert 6 <= sum(places) <= 26
    assert len({stack.asked_of(chat(f"{i}"), **{"x-session-id": "s"}) for i in range(16)}) == 1
    prompts = [f"{i} is the number of a text that goes on." for i in range(32)]
    assert 6 <= sum(stack.asked_of({"model": "m", "prompt": prompt}) for prompt in prompts) <= 26


@pytest.mark.parametrize("body", [{}, {"messages": []}, chat(""), chat("\x00\u20ac" * 300), chat("x" * 100_000)])
def test_any_body_has_a_router(stack: Stack, body: dict[str, object]) -> None:
    assert stack.asked_of(body) == stack.asked_of(body)


def test_another_application_is_none_of_the_routers_business(stack: Stack) -> None:
    assert stack.post("/kvcache/v1/score").json() == {"by": "graph"}
    assert stack.asked == 0


@pytest.mark.parametrize("stack", [5], indirect=True, ids=["patient"])
def test_one_router_gone_nobody_waits(stack: Stack) -> None:
    own, other = stack.own()
    own.close()
    waits_s = []
    for _ in range(20):
        started_s = time.monotonic()
        assert stack.by(1) == ["r1"]
        waits_s.append(time.monotonic() - started_s)
    assert max(waits_s) < 2.9  # it was three seconds and more; a busy machine takes two
    assert len(other.requests) == 20


def test_both_routers_gone_requests_are_balanced_plainly(stack: Stack) -> None:
    for router in stack.routers:
        router.close()
    assert set(stack.by(20)) == {"r0", "r1"}
    why = {headers[haproxy.UNROUTED_HEADER] for replica in stack.replicas for _, headers, _ in replica.requests}
    assert why == {"router_unreachable"}


def test_a_hanging_router_is_asked_once_in_a_while(stack: Stack) -> None:
    own, _ = stack.own()
    own.answer = lambda _: None
    started_s = time.monotonic()
    assert stack.by(12) == ["r1"] * 12
    rests = (time.monotonic() - started_s) / haproxy.REST_S
    assert len(own.requests) <= 2 + rests  # the clock's second may end in between


def test_a_router_that_is_back_is_asked_again(stack: Stack) -> None:
    own, other = stack.own()
    own.answer = lambda _: (500, {})
    assert stack.by(4) == ["r1"] * 4
    assert len(other.requests) == 4
    own.answer = lambda _: (200, {"replica_id": "id-0"})
    own.requests.clear()

    def is_asked() -> bool:
        stack.by(2)
        return bool(own.requests)

    eventually(is_asked)


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [
        (500, {"replica_id": "id-1"}, "router_non_200"),
        (200, {"replica": "id-1"}, "unparseable_replica_id"),
        (200, {"replica_id": "id-7"}, "unknown_replica_id"),
    ],
)
def test_an_answer_that_names_nobody(stack: Stack, status: int, answer: dict[str, object], why: str) -> None:
    for router in stack.routers:
        router.answer = lambda _: (status, answer)
    assert set(stack.by(10)) == {"r0", "r1"}
    last = [replica.requests[0][1] for replica in stack.replicas]
    # After a 500 both are left alone, so the second request finds none to ask.
    assert {headers[haproxy.UNROUTED_HEADER] for headers in last} <= {why, "router_unreachable"}
    assert why in {headers[haproxy.UNROUTED_HEADER] for headers in last}


def test_rays_own_files_are_left_as_they_are(config: tuple[Stack, Path]) -> None:
    _, path = config
    lua = path.with_name("ingress_request_router.lua")
    before = path.read_text(), lua.read_text()
    changed = haproxy.edited_arguments(["-db", "-f", str(path), "-sf", "1"], 1.0)
    assert changed == ["-db", "-f", str(path.with_name("haproxy.kvcache.cfg")), "-sf", "1"]
    assert (path.read_text(), lua.read_text()) == before


@pytest.mark.parametrize("place", range(len(haproxy.lua_edits(1.0))))
def test_a_lua_file_that_is_not_as_known_is_not_touched(config: tuple[Stack, Path], place: int) -> None:
    _, path = config
    text = path.with_name("ingress_request_router.lua").read_text()
    edit = haproxy.lua_edits(1.0)[place]
    for changed in (text.replace(edit.old, ""), text + edit.old):
        with pytest.raises(haproxy.NotAsKnownError):
            haproxy.edit_lua(changed, 1.0)


def test_without_a_known_lua_file_ray_s_own_is_used(
    config: tuple[Stack, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    _, path = config
    lua = path.with_name("ingress_request_router.lua")
    lua.write_text(lua.read_text().replace("router_non_200", "router_says_no"))
    check = [sys.executable, "-m", "serve_app.haproxy", "-c", "-f", str(path)]
    assert subprocess.run(check, check=False, timeout=30).returncode == 0
    assert "Ray's HAProxy files are used as they are" in capfd.readouterr().err
