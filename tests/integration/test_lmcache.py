"""configs/quickstart-lmcache.yaml: two real vLLM replicas and the real LMCache server that they share."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from serve_app import local_stack
from serve_app.model import fast_dtype
from tests.helpers import eventually
from tests.integration.conftest import Start, config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

MODEL = "smollm2-135m-instruct"
HEADER = "x-kvcache-replica"
BLOCK, CHUNK = 32, 64
EVICTED_WITHIN_S = 2.0  # from LMCache's eviction to every index; see docs/architecture.md
VOID_WITHIN_S = 5.0  # from the death of the server


@dataclass(frozen=True)
class Replica:
    """One replica, spoken to directly, past HAProxy."""

    name: str
    url: str

    def ask(self, text: str) -> tuple[int, int]:
        """Prompt tokens and cached tokens, as the engine counts them."""
        body = {"model": MODEL, "prompt": text, "max_tokens": 2, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"] or 0

    def reset(self) -> None:
        """Empty its GPU's prefix cache, and let the engine say so, which it does with its next request."""
        assert httpx.post(f"{self.url}/reset_prefix_cache", timeout=30).status_code == 200
        self.ask("again")


def replicas_of(running: local_stack.Running) -> list[Replica]:
    """Found by the ports that the replicas' processes listen on: the answer's header names them."""
    found: dict[str, Replica] = {}
    for process in psutil.Process(running.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "VLLM" not in "".join(process.cmdline()) and "ServeReplica:llm" not in "".join(process.cmdline()):
                continue
            for connection in process.net_connections("tcp"):
                if connection.status != psutil.CONN_LISTEN:
                    continue
                url = f"http://127.0.0.1:{connection.laddr.port}"
                with contextlib.suppress(httpx.HTTPError):
                    name = httpx.get(f"{url}/v1/models", timeout=2).headers.get(HEADER)
                    if name:
                        found[name] = Replica(name, url)
    return list(found.values())


def story(name: str, sentences: int = 40) -> str:
    return " ".join(f"{name} counted {i} ships before breakfast." for i in range(sentences))


class Stack:
    def __init__(self, running: local_stack.Running) -> None:
        self.url = running.url
        self.pid = running.pid
        self.graph = f"{running.url}{running.graph}"
        self.a, self.b = replicas_of(running)

    def matched(self, text: str) -> dict[str, dict[str, int]]:
        answer = httpx.post(f"{self.graph}/v1/score", json={"model": MODEL, "prompt": text}, timeout=60)
        return {pod: score["matched_tokens"] for pod, score in answer.json()["pods"].items()}

    def shared(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.graph}/v1/pods", timeout=60).json()["shared"]
        return found

    def servers(self) -> list[psutil.Process]:
        """Running `lmcache server` processes of this stack."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "lmcache.cli.main" in process.cmdline() and process.cmdline()[0] != "setpriv":
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def stack(start_stack: Start) -> Stack:
    loaded = config("quickstart-lmcache.yaml")
    args = loaded["applications"][1]["args"]
    args["llm"]["runtime_env"]["env_vars"]["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
    # Some 2,500 tokens of this model, in either kind of numbers.
    args["lmcache"]["size_gb"] = 0.12 if fast_dtype() == "float32" else 0.06
    return Stack(start_stack(loaded, direct=True))


def test_one_server_for_both_replicas(stack: Stack) -> None:
    assert len(stack.servers()) == 1
    (domain,) = stack.shared()
    assert (domain["live"], domain["chunk_size"]) == (True, CHUNK)


def test_what_one_has_computed_both_can_load(stack: Stack) -> None:
    text = story("Ada")
    tokens, cached = stack.a.ask(text)
    assert cached == 0
    whole_blocks, whole_chunks = tokens // BLOCK * BLOCK, tokens // CHUNK * CHUNK
    eventually(
        lambda: stack.matched(text) == {stack.a.name: {"gpu": whole_blocks}, stack.b.name: {"lmcache": whole_chunks}},
        10,
    )
    stack.a.reset()
    eventually(lambda: stack.matched(text)[stack.a.name] == {"lmcache": whole_chunks}, 10)

    for replica in (stack.a, stack.b):
        predicted = sum(stack.matched(text)[replica.name].values())
        assert predicted == whole_chunks
        _, cached = replica.ask(text)
        assert abs(cached - predicted) <= BLOCK
        assert cached > 0


def test_only_whole_chunks_count(stack: Stack) -> None:
    """A prompt that ends in the middle of a chunk which LMCache has: the chunk cannot be loaded."""
    text = story("Bo")
    stack.a.ask(text)
    eventually(lambda: stack.matched(text)[stack.b.name].get("lmcache", 0) > 0, 10)
    seen = set()
    for length in range(200, 600, 29):
        part = text[:length]
        stack.b.reset()
        eventually(lambda part=part: "gpu" not in stack.matched(part)[stack.b.name], 10)  # type: ignore[misc]
        predicted = sum(stack.matched(part)[stack.b.name].values())
        assert predicted % CHUNK == 0
        tokens, cached = stack.b.ask(part)
        assert abs(cached - predicted) <= BLOCK, (tokens, predicted, cached)
        seen.add(tokens // BLOCK % 2)
    assert seen == {0, 1}  # some ended in a chunk's first half


def test_evictions_leave_the_index(stack: Stack) -> None:
    """More prompts than the server holds: what the index says of each is what an empty replica then finds."""
    texts = [story(f"Keeper {i}") for i in range(8)]
    for text in texts:
        stack.a.ask(text)
        time.sleep(0.5)
    time.sleep(EVICTED_WITHIN_S)
    stack.b.reset()
    predictions = [stack.matched(text)[stack.b.name].get("lmcache", 0) for text in texts]
    assert 0 in predictions  # there was pressure
    assert max(predictions) > 4 * CHUNK  # and not everything went
    for text in reversed(texts):
        predicted = sum(stack.matched(text)[stack.b.name].values())
        _, cached = stack.b.ask(text)
        assert abs(cached - predicted) <= BLOCK, predictions
        time.sleep(EVICTED_WITHIN_S)  # what was not there has been stored, and may have evicted others


def test_a_killed_server_is_void_and_comes_back(stack: Stack) -> None:
    text = story("Cy")
    stack.a.ask(text)
    eventually(lambda: stack.matched(text)[stack.b.name].get("lmcache", 0) > 0, 10)
    (server,) = stack.servers()
    epoch = stack.shared()[0]["epoch"]
    killed_s = time.monotonic()
    server.kill()
    eventually(lambda: stack.matched(text)[stack.b.name] == {}, VOID_WITHIN_S)
    print(f"void after {time.monotonic() - killed_s:.2f} s")
    tokens, cached = stack.b.ask(text)  # requests go on being served
    assert (tokens > 0, cached) == (True, 0)

    eventually(lambda: any(domain["live"] and domain["epoch"] > epoch for domain in stack.shared()), 120)
    assert len(stack.servers()) == 1

    def stored_again() -> bool:
        """Engines use the server again when their own heartbeat has seen it."""
        again = story(f"Di {time.monotonic()}")
        stack.a.ask(again)
        time.sleep(1)
        return stack.matched(again)[stack.b.name].get("lmcache", 0) > 0

    eventually(stored_again, 120)
