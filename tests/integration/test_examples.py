"""Every folder of examples/ that needs engines, run as its README says, and the endpoint picker's acceptance.

One pair of real vLLM servers for all: those that `make run` of examples/envoy-gateway starts, with its Valkey and its
publishers. Services and gateways that a test kills are started beside it, on the same Valkey.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from serve_app.client import AsyncKVCacheClient, KVCacheClient
from serve_app.config import REASON_HEADER
from serve_app.model import cache_home
from serve_app.ports import free_port, free_ports
from tests.gateway import HOST, Envoy
from tests.helpers import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODEL = "smollm2-135m-instruct"
BLOCK = 32  # tokens
CHAT = "/v1/chat/completions"
AT_A_TIME = 4
CONVERSATIONS, TURNS = 20, 10
KILLED_AFTER, WITH_A_KILL = 12, 40  # requests
BURSTS = 3


def story(name: str) -> str:
    """Some 250 tokens."""
    return " ".join(f"{name} counted {i} ships before breakfast." for i in range(25))


def chat(messages: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0, **more}


def opening(name: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": story(name)}, {"role": "user", "content": "How many ships?"}]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_example(script: str, *arguments: str, before: str = "", after: str = "") -> str:
    """What an example prints, and what is printed after it in the same process."""
    code = f"import runpy, sys\nsys.argv = sys.argv[1:]\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    command = [sys.executable, "-c", f"{code}{after}", str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Stack:
    """`make run` in examples/envoy-gateway."""

    def __init__(self, home: Path) -> None:
        ports = list(map(str, free_ports(11)))
        engines = [":".join(ports[0:3]), ":".join(ports[3:6])]
        named = zip(("port", "admin", "picker", "http", "grpc"), ports[6:], strict=True)
        self.engines = [f"{HOST}:{ports[0]}", f"{HOST}:{ports[3]}"]
        self.gateway = f"http://{HOST}:{ports[6]}"
        self.scores, self.grpc = f"http://{HOST}:{ports[9]}", f"{HOST}:{ports[10]}"
        self.redis_url = f"unix://{home}/scores/valkey.sock"
        self.log = home / "run.log"
        options = [*(f"--engine {ports}" for ports in engines), *(f"--{name} {port}" for name, port in named)]
        self.command = ["make", "-C", str(EXAMPLES / "envoy-gateway"), "run", f"PYTHON={sys.executable}"]
        self.command.append(f"ARGS={' '.join(options)}")
        self.env = {**environment(), "KVCACHE_HOME": str(home)}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command, env=self.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return "ready: " in self.log.read_text()

    def served(self) -> list[int]:
        """Requests that each engine has answered."""
        counts = []
        for engine in self.engines:
            lines = httpx.get(f"http://{engine}/metrics", timeout=30).text.splitlines()
            found = [line for line in lines if line.startswith("vllm:request_success_total{")]
            counts.append(round(sum(float(line.rpartition(" ")[2]) for line in found)))
        return counts

    def press_ctrl_c(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(60)


@pytest.fixture(scope="module")
def stack(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("home")
    (home / "models").symlink_to(cache_home() / "models")
    stack = Stack(home)
    try:
        eventually(stack.is_ready, 400)
        yield stack
    finally:
        stack.press_ctrl_c()


class Service:
    """`kvcache serve-scores --picker`, beside the stack's own."""

    def __init__(self, redis_url: str, log: Path) -> None:
        http, self.grpc_port, self.picker_port = free_ports(3)
        self.url = f"http://{HOST}:{http}"
        self._command = [
            *(sys.executable, "-m", "serve_app.cli", "serve-scores", "--redis", redis_url, "--model", MODEL),
            *("--http", f"{HOST}:{http}", "--grpc", f"{HOST}:{self.grpc_port}"),
            *("--picker", f"{HOST}:{self.picker_port}"),
        ]
        self._log = log
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(self._command, env=environment(), stdout=out, stderr=out)
        eventually(self.is_ready, 60)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        return False

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL: it says goodbye to nobody."""
        self.process.kill()
        self.process.wait(10)


class Gateway(NamedTuple):
    service: Service
    envoy: Envoy


@pytest.fixture(scope="module")
def gateways(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Gateway]]:
    """Two Envoys, each with a picker of its own, in front of the same engines."""
    with contextlib.ExitStack() as ends:
        made = []
        for name in ("one", "two"):
            folder = tmp_path_factory.mktemp(name)
            service = Service(stack.redis_url, folder / "service.log")
            ends.callback(service.kill)
            envoy = Envoy(folder, "envoy.yaml", stack.engines, service.picker_port)
            ends.callback(envoy.stop)
            made.append(Gateway(service, envoy))
        for gateway in made:
            eventually(gateway.envoy.is_ready, 30)
        yield made


class Answer(NamedTuple):
    reason: str  # empty: it was not scored
    prompt_tokens: int
    cached_tokens: int


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    answer = await client.post(CHAT, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"] or 0
    return Answer(answer.headers.get(REASON_HEADER, ""), usage["prompt_tokens"], cached)


class Conversation:
    """One whose prompts go on from each other."""

    def __init__(self, name: str) -> None:
        self.messages = opening(name)
        self.answers: list[Answer] = []

    async def turn(self, client: httpx.AsyncClient) -> Answer:
        self.answers.append(await ask(client, chat(self.messages)))
        self.messages += [{"role": "assistant", "content": "Many."}, {"role": "user", "content": "And the next day?"}]
        return self.answers[-1]

    def hits(self) -> list[bool]:
        """Of each follow-up: whether the engine had all whole blocks of the prompt before, or all but one."""
        pairs = zip(self.answers, self.answers[1:], strict=False)
        return [now.cached_tokens >= before.prompt_tokens // BLOCK * BLOCK - BLOCK for before, now in pairs]


class TestScoreAsLibrary:
    def test_the_pod_that_has_the_chat_is_named_and_ray_is_not_loaded(self, stack: Stack) -> None:
        system, question = (one["content"] for one in opening("Ada"))
        body = chat([{"role": "system", "content": system}, {"role": "user", "content": question}])
        answer = httpx.post(f"http://{stack.engines[0]}{CHAT}", json=body, timeout=120).raise_for_status()
        held = answer.json()["usage"]["prompt_tokens"] // BLOCK * BLOCK
        wait_until_indexed(stack, body, held)
        loaded = "\nprint('loaded:', *sorted({'ray', 'vllm', 'grpc'} & sys.modules.keys()))"
        printed = run_example("score-as-library/score.py", stack.redis_url, MODEL, system, question, after=loaded)
        first, second, third, last = printed.splitlines()
        assert first.endswith("block size 32")
        assert second == f"{stack.engines[0]}  score {held}  matched {{'gpu': {held}}}  exact"
        assert third.startswith(f"{stack.engines[1]}  score 0 ")
        assert last == "loaded:"


def wait_until_indexed(stack: Stack, body: dict[str, Any], tokens: int) -> None:
    with KVCacheClient(stack.scores) as kv:
        eventually(lambda: max(kv.score(body).scores.values()) >= tokens, 20)


class TestLlmDClient:
    def test_the_pod_that_has_the_prompt_comes_first(self, stack: Stack) -> None:
        body = {"model": MODEL, "prompt": story("Bo"), "max_tokens": 2}
        answer = httpx.post(f"http://{stack.engines[1]}/v1/completions", json=body, timeout=120).raise_for_status()
        held = answer.json()["usage"]["prompt_tokens"] // BLOCK * BLOCK
        wait_until_indexed(stack, body, held)
        asked = ("--service", stack.grpc, "--model", MODEL, story("Bo"))
        printed = run_example("llm-d-client/client.py", *asked)
        assert printed.splitlines() == [f"{stack.engines[1]}  {held}", f"{stack.engines[0]}  0"]
        assert run_example("llm-d-client/client.py", *asked, "nobody") == "nobody  0\n"


class TestCustomScheduler:
    @pytest.fixture
    def url(self, stack: Stack, gateways: list[Gateway], tmp_path: Path) -> Iterator[str]:
        port = free_port()
        command = [sys.executable, str(EXAMPLES / "custom-scheduler/gateway.py"), "--port", str(port), "--model", MODEL]
        command += ["--service", f"{HOST}:{gateways[1].service.grpc_port}", *stack.engines]
        with (tmp_path / "log").open("wb") as out:
            process = subprocess.Popen(command, env=environment(), stdout=out, stderr=out)
        url = f"http://{HOST}:{port}"

        def is_up() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(url).status_code == 405
            return False

        eventually(is_up, 30)
        yield url
        process.terminate()
        process.wait(20)

    def asked(self, url: str, name: str, request_id: str = "") -> tuple[str, int, int]:
        """Pod, pieces of the streamed answer, and cached tokens."""
        body = chat(opening(name), stream=True, stream_options={"include_usage": True})
        with httpx.stream(
            "POST", f"{url}{CHAT}", json=body, headers={"x-request-id": request_id}, timeout=120
        ) as answer:
            assert answer.status_code == 200
            data = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
        usage = json.loads(data[-1])["usage"]
        return answer.headers["x-pod"], len(data), usage["prompt_tokens_details"]["cached_tokens"] or 0

    def test_it_streams_and_says_what_became_of_the_request(self, url: str, gateways: list[Gateway]) -> None:
        pod, pieces, cached = self.asked(url, "Cy", "first-of-Cy")
        assert pieces > 2
        assert cached < BLOCK * 2
        again, _, cached = self.asked(url, "Cy", "second-of-Cy")
        assert again == pod
        assert cached > 200
        scores = gateways[1].service.url

        def receipts() -> dict[str, Any]:
            said = httpx.get(f"{scores}/v1/receipts?limit=100", timeout=10).json()
            return {one["request_id"]: one for one in said if one.get("actual")}

        eventually(lambda: {"first-of-Cy", "second-of-Cy"} <= receipts().keys(), 10)
        assert receipts()["second-of-Cy"]["actual"]["cached_tokens"] == cached
        assert receipts()["second-of-Cy"]["predicted_cached_tokens"] == cached
        with KVCacheClient(scores) as kv:
            eventually(lambda: set(kv.explain(chat(opening("Cy"))).in_flight.values()) == {0}, 10)

    def test_a_client_that_goes_ends_its_request(self, url: str, gateways: list[Gateway]) -> None:
        body = chat(opening("Fay"), stream=True, max_tokens=1000)
        headers = {"x-request-id": "gone"}
        with KVCacheClient(gateways[1].service.url) as kv:
            with httpx.stream("POST", f"{url}{CHAT}", json=body, headers=headers, timeout=120) as answer:
                next(answer.iter_lines())
                assert kv.first_token("gone")
            eventually(lambda: not kv.first_token("gone"), 10)

    def test_pods_take_turns_while_the_service_is_away(self, url: str, stack: Stack, gateways: list[Gateway]) -> None:
        gateways[1].service.kill()
        try:
            assert [self.asked(url, "Di")[0] for _ in range(4)] == stack.engines * 2
        finally:
            gateways[1].service.start()
        eventually(lambda: len({self.asked(url, "Di")[0] for _ in range(3)}) == 1, 20)


class TestEnvoyGateway:
    async def test_a_follow_up_goes_where_its_beginning_is(self, stack: Stack) -> None:
        async with httpx.AsyncClient(base_url=stack.gateway) as client:
            conversation = Conversation("Ed")
            for _ in range(4):
                assert (await conversation.turn(client)).reason
        assert conversation.hits() == [True] * 3

    def test_a_second_start_starts_nothing(self, stack: Stack) -> None:
        done = subprocess.run(stack.command, env=stack.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "it is running already" in done.stdout
        assert httpx.get(f"{stack.gateway}/v1/models", timeout=10).status_code == 200

    def test_a_port_that_is_taken_is_named(self, stack: Stack, tmp_path: Path) -> None:
        elsewhere = {**stack.env, "KVCACHE_HOME": str(tmp_path)}
        done = subprocess.run(stack.command, env=elsewhere, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0
        assert f"port {stack.gateway.rpartition(':')[2]} is taken: give another one with --port" in done.stdout


class TestPicker:
    """A real Envoy, our picker, two real engines."""

    async def test_follow_ups_of_many_conversations_hit(self, stack: Stack, gateways: list[Gateway]) -> None:
        conversations = [Conversation(f"Conversation {number}") for number in range(CONVERSATIONS)]
        waiting = deque(conversations)
        before = stack.served()
        async with gateways[0].envoy.client() as client:

            async def converse() -> None:
                while waiting:
                    conversation = waiting.popleft()
                    await conversation.turn(client)
                    if len(conversation.answers) < TURNS:
                        waiting.append(conversation)

            await asyncio.gather(*(converse() for _ in range(AT_A_TIME)))
        assert sum(len(one.answers) for one in conversations) == CONVERSATIONS * TURNS
        assert all(answer.reason for one in conversations for answer in one.answers)
        hits = [hit for one in conversations for hit in one.hits()]
        print(f"{sum(hits)} of {len(hits)} follow-ups hit")
        assert sum(hits) >= 0.9 * len(hits)
        shares = [after - earlier for after, earlier in zip(stack.served(), before, strict=True)]
        print(f"requests of the engines: {shares}")
        assert sum(shares) == CONVERSATIONS * TURNS
        assert min(shares) >= 0.2 * sum(shares)  # they hit although both engines work

    async def test_a_picker_that_is_killed_and_started_again(self, gateways: list[Gateway]) -> None:
        gateway = gateways[0]
        conversations = [Conversation(f"Killed {number}") for number in range(AT_A_TIME)]
        scored: list[tuple[bool, bool]] = []  # whether the picker was alive when it was sent, and whether it was scored
        async with gateway.envoy.client() as client:

            async def converse(conversation: Conversation) -> None:
                for _ in range(WITH_A_KILL // AT_A_TIME):
                    if len(scored) == KILLED_AFTER and gateway.service.is_alive():
                        gateway.service.kill()
                    alive = gateway.service.is_alive()
                    scored.append((alive, bool((await conversation.turn(client)).reason)))

            await asyncio.gather(*map(converse, conversations))
            assert len(scored) == WITH_A_KILL  # and every one was answered 200
            assert [one for _, one in scored[:KILLED_AFTER]] == [True] * KILLED_AFTER
            assert [one for alive, one in scored if not alive] == [False] * sum(not alive for alive, _ in scored)
            await asyncio.to_thread(gateway.service.start)
            deadline_s = time.monotonic() + 20
            while not (await conversations[0].turn(client)).reason:
                assert time.monotonic() < deadline_s, "Envoy does not ask the picker that was started again"
                await asyncio.sleep(0.2)
            answers = [await conversations[1].turn(client) for _ in range(3)]
        assert {answer.reason for answer in answers} == {"prefix"}
        assert conversations[1].hits()[-2:] == [True] * 2

    async def test_two_pickers_keep_a_burst_together(self, stack: Stack, gateways: list[Gateway]) -> None:
        """The second picker hears of the first one's route in the log, before the engine has said anything."""
        one, two = gateways
        async with (
            one.envoy.client() as first,
            two.envoy.client() as second,
            AsyncKVCacheClient(two.service.url) as kv,
        ):
            for number in range(BURSTS):
                before = stack.served()
                prefix = opening(f"Burst {number}")
                running = asyncio.create_task(ask(first, chat(prefix, max_tokens=24)))
                while sum((await kv.explain(chat(prefix))).in_flight.values()) == 0:
                    assert not running.done(), "the second picker has not heard of it"
                questions = [chat([*prefix, {"role": "user", "content": f"Question {i}?"}]) for i in range(4)]
                asked = [ask((first, second)[i % 2], body) for i, body in enumerate(questions)]
                answers = await asyncio.gather(*asked, running)
                shares = sorted(after - earlier for after, earlier in zip(stack.served(), before, strict=True))
                assert shares == [0, 5], f"burst {number}: {shares}, {answers}"


class TestEnd:
    def test_ctrl_c_ends_what_make_run_has_started(self, stack: Stack) -> None:
        """Last in the module: the engines end with it."""
        started = psutil.Process(stack.process.pid).children(recursive=True)
        names = " ".join(" ".join(process.cmdline()) for process in started)
        for part in ("serve-scores", "valkey", "api_server", "publish", "envoy"):
            assert re.search(part, names), part
        stack.press_ctrl_c()
        gone, alive = psutil.wait_procs(started, timeout=10)
        assert not alive
        assert len(gone) >= 7
        assert stack.log.read_text().rstrip().splitlines()[-1].startswith(("ended", "make:"))
