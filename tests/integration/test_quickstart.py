"""configs/quickstart.yaml as `make up` runs it: HAProxy, two real vLLM replicas, embedded Valkey, the graph."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import psutil
import pytest
import redis
from typer.testing import CliRunner

from serve_app import local_stack
from serve_app.cli import app
from serve_app.index.keyspace import LOG_FIELD, Keyspace
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import Domain, DomainId, ModelId
from tests.helpers import eventually
from tests.integration.conftest import Start, config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

MODEL = "smollm2-135m-instruct"
HEADER = "x-kvcache-replica"


@pytest.fixture(scope="module")
def stack(start_stack: Start) -> local_stack.Running:
    """The file, with caches so small that they evict; and one stage that is in threads in the other configs' tests."""
    loaded = config("quickstart.yaml", num_gpu_blocks_override=160, max_model_len=4096)
    loaded["applications"][1]["args"]["routing"]["tokenization"] = "deployment"
    return start_stack(loaded, direct=True)


@pytest.fixture(scope="module")
def http(stack: local_stack.Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def openai_client(stack: local_stack.Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="module")
def valkey_url(stack: local_stack.Running) -> str:
    """The embedded Valkey's socket, found as any process of the Ray session finds it."""
    return f"unix://{session_folder(stack)}/kvcache-valkey/socket"


def session_folder(stack: local_stack.Running) -> str:
    commands = (" ".join(child.cmdline()) for child in psutil.Process(stack.pid).children(recursive=True))
    session = re.search(r"/tmp/ray/session_[\w-]+", " ".join(commands))
    assert session is not None
    return session.group()


def story(name: str, words: int = 300) -> str:
    return f"The story of {name}. " + " ".join(
        f"{name} went {i} steps along the river and rested." for i in range(words // 9)
    )


def ask(client: openai.OpenAI, messages: list[Any], **more: Any) -> tuple[str, Any]:
    """Replica and answer of a chat request."""
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0, **more
    )
    return raw.headers[HEADER], raw.parse()


def score(http: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post("/kvcache/v1/score", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_conversations_stay_with_the_replica_that_holds_them(openai_client: openai.OpenAI) -> None:
    replicas = set()
    for name in ("Ada", "Bo", "Cy", "Di"):
        messages: list[Any] = [{"role": "system", "content": story(name)}]
        homes = []
        for turn in range(3):
            messages.append({"role": "user", "content": f"Question {turn}?"})
            replica, answer = ask(openai_client, messages)
            homes.append(replica)
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert turn == 0 or cached >= answer.usage.prompt_tokens - 96
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            time.sleep(0.3)  # let the blocks reach the index
        assert len(set(homes)) == 1
        replicas.add(homes[0])
    assert len(replicas) == 2  # and cold ones are spread


def test_long_cold_text_comes_back_from_the_tokenizer_deployment(
    http: httpx.Client, openai_client: openai.OpenAI
) -> None:
    score(http, {"model": MODEL, "prompt": "It loads its tokenizer at its first call."})
    messages = [{"role": "user", "content": story("Ida", 1000)}]
    homes = set()
    for _ in range(3):
        replica, answer = ask(openai_client, messages)
        homes.add(replica)
        time.sleep(0.5)
    assert len(homes) == 1
    assert answer.usage.prompt_tokens_details.cached_tokens > 1000


def test_score_finds_the_blocks_of_the_same_request(http: httpx.Client, openai_client: openai.OpenAI) -> None:
    """OpenAI request -> vLLM's events -> Valkey -> index -> the same request again."""
    messages = [{"role": "user", "content": story("Eve")}]
    body = {"model": MODEL, "messages": messages}
    assert set(score(http, body)["scores"].values()) <= {0, 32}  # the system prompt's block at most
    replica, answer = ask(openai_client, messages)
    eventually(lambda: score(http, body)["scores"][replica] > 100)
    found = score(http, body)
    assert found["prompt_tokens"] == answer.usage.prompt_tokens
    full_blocks = answer.usage.prompt_tokens // 32 * 32
    assert found["pods"][replica]["matched_tokens"] == {"gpu": full_blocks}
    others = [value for pod, value in found["scores"].items() if pod != replica]
    assert max(others) <= 32
    only = {**body, "pods": [replica, "nobody"]}  # scores dip while a busy machine's heartbeat is late: not `exact`
    eventually(lambda: score(http, only)["scores"] == {replica: full_blocks, "nobody": 0})
    for strategy, expected in (
        ("highest_block_hit", full_blocks / 32),
        ("coverage", full_blocks / found["prompt_tokens"]),
    ):
        asked = {**body, "strategy": strategy}
        eventually(lambda: score(http, asked)["scores"][replica] == pytest.approx(expected))  # noqa: B023  # at once


def test_completions_and_token_ids_are_scored_alike(http: httpx.Client, openai_client: openai.OpenAI) -> None:
    text = story("Fay")
    raw = openai_client.completions.with_raw_response.create(model=MODEL, prompt=text, max_tokens=2)
    replica = raw.headers[HEADER]
    ids = http.post("/tokenize", json={"model": MODEL, "prompt": text}).json()["tokens"]
    expected = len(ids) // 32 * 32
    eventually(lambda: score(http, {"model": MODEL, "prompt": text})["scores"][replica] == expected)
    eventually(lambda: score(http, {"model": MODEL, "prompt": ids})["scores"][replica] == expected)
    eventually(lambda: score(http, {"model": MODEL, "prompt": [text, text]})["scores"][replica] == 2 * expected)
    raw = openai_client.completions.with_raw_response.create(model=MODEL, prompt=ids, max_tokens=2)
    assert raw.headers[HEADER] == replica


def test_streaming_names_the_replica_and_reports_usage(openai_client: openai.OpenAI) -> None:
    raw = openai_client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Count to three."}],
        max_tokens=24,  # on a busy machine several tokens come in one chunk
        stream=True,
        stream_options={"include_usage": True},
    )
    assert raw.headers[HEADER]
    chunks = list(raw.parse())
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 2
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b'{"model": ', 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", json.dumps({"model": MODEL, "messages": "hello"}).encode(), 400),
        ("/v1/chat/completions", json.dumps({"model": MODEL, "messages": []}).encode(), 400),
        ("/v1/chat/completions", json.dumps({"model": MODEL, "messages": [{"role": 1}]}).encode(), 400),
        (
            "/v1/chat/completions",
            json.dumps({"model": "nobody", "messages": [{"role": "user", "content": "x"}]}).encode(),
            404,
        ),
        ("/v1/completions", json.dumps({"model": MODEL, "prompt": "word " * 20_000}).encode(), 400),
        ("/v1/completions", json.dumps({"model": MODEL, "prompt": [[1, 2], "x"]}).encode(), 400),
        ("/v1/completions", json.dumps({"model": MODEL, "prompt": [-1, 2**40]}).encode(), 400),
        ("/v1/completions", json.dumps({"model": MODEL, "prompt": {"a": 1}}).encode(), 400),
        ("/kvcache/v1/score", b"[1]", 400),
        ("/kvcache/v1/score", b"{", 400),
        ("/kvcache/v1/score", json.dumps({"model": MODEL}).encode(), 400),
        ("/kvcache/v1/score", json.dumps({"model": MODEL, "prompt": "x", "strategy": "best"}).encode(), 422),
        ("/kvcache/v1/score", json.dumps({"model": MODEL, "prompt": "x", "pods": "a"}).encode(), 422),
        (
            "/kvcache/v1/score",
            json.dumps({"model": MODEL, "messages": [{"role": "user", "content": {"a": 1}}]}).encode(),
            400,
        ),
    ],
)
def test_bad_input_is_a_clear_4xx_and_harms_nothing(
    http: httpx.Client, openai_client: openai.OpenAI, path: str, body: bytes, status: int
) -> None:
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    ask(openai_client, [{"role": "user", "content": "Still well?"}])


def test_models_and_tokenize_are_vllms(http: httpx.Client) -> None:
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [MODEL]
    assert http.post("/tokenize", json={"model": MODEL, "prompt": "hello"}).json()["count"] >= 1


def test_a_receipt_tells_what_was_known_and_what_came_of_it(http: httpx.Client, openai_client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": story("Lou", 1500)}]
    first, _ = ask(openai_client, messages)
    body = {"model": MODEL, "messages": messages}
    eventually(lambda: score(http, body)["scores"][first] > 100)

    def computes_least() -> bool:
        answer = score(http, {**body, "strategy": "expected_ttft"})
        compute_s = {pod: found["cost_s"]["compute_s"] for pod, found in answer["pods"].items()}
        best = max(answer["scores"], key=answer["scores"].__getitem__)
        return len(compute_s) == 2 and best == first == min(compute_s, key=compute_s.__getitem__)

    eventually(computes_least)
    replica, answer = ask(openai_client, messages, extra_headers={"x-request-id": "lou-again"})
    assert replica == first

    def receipts() -> list[dict[str, Any]]:
        return [one for one in http.get("/kvcache/v1/receipts").json() if one["request_id"] == "lou-again"]

    eventually(receipts, 10)
    (receipt,) = receipts()
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert (receipt["chosen"], receipt["outcome"], receipt["reason"]) == (replica, "hit", "prefix")
    assert receipt["predicted_cached_tokens"] == receipt["actual"]["cached_tokens"] == cached
    assert receipt["prompt_tokens"] == receipt["actual"]["prompt_tokens"] == answer.usage.prompt_tokens
    assert receipt["actual"]["prefill_s"] > 0
    assert len(receipt["replicas"]) == 2
    url = f"{str(http.base_url).rstrip('/')}/kvcache/v1/receipts"
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["receipts", "--url", url])
    assert shown.exit_code == 0
    assert re.search(rf"lou-again .* {replica} .* hit: prefix .* {cached} ", shown.stdout)


def test_the_live_page_is_below_the_graphs_prefix(http: httpx.Client) -> None:
    page = http.get("/kvcache", follow_redirects=True)
    assert "<title>KVCache Manager</title>" in page.text
    assert page.url.path == "/kvcache/"
    assert http.get("/kvcache/page/app.js").headers["content-security-policy"].startswith("default-src 'none'")
    seen = http.get("/kvcache/v1/overview").json()
    replicas = [replica for replica in seen["fleet"]["replicas"] if replica["live"]]
    assert sum(replica["held_blocks"].get("gpu", 0) for replica in replicas) > 0
    assert seen["traffic"]["compared"] > 0  # the tests before have asked
    decisions = http.get("/kvcache/v1/decisions", params={"limit": "5"}).json()["decisions"]
    assert {one["receipt"]["chosen"] for one in decisions} <= {replica["pod"] for replica in seen["fleet"]["replicas"]}


def test_long_bodies(http: httpx.Client, openai_client: openai.OpenAI) -> None:
    """1 MiB is routed by its prefix; 9 MiB is more than the router gets to see, and is answered all the same."""
    messages = [{"role": "user", "content": story("Gil")}]
    replica, _ = ask(openai_client, messages)
    time.sleep(0.5)
    for size, routed in ((2**20, True), (9 * 2**20, False)):
        body = {"model": MODEL, "messages": messages, "max_tokens": 2, "user": "x" * size}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text[:300]
        assert answer.json()["usage"]["prompt_tokens"] > 100
        if routed:
            assert answer.headers[HEADER] == replica


def test_status_names_what_is_not_understood(stack: local_stack.Running, valkey_url: str) -> None:
    with redis.Redis.from_url(valkey_url) as client:
        client.xadd(Keyspace(ModelId(MODEL)).log, {LOG_FIELD: b"of another version"})

    def shown() -> str:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["status"])
        assert done.exit_code == 0
        return done.output

    eventually(lambda: "left out of log: malformed, 1 times" in shown(), 20)
    assert stack.url in shown()


def audit(stack: local_stack.Running, output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and audit.json of `kvcache audit`."""
    done = CliRunner().invoke(app, ["audit", "--url", stack.url, "--output", str(output), *options])
    print(done.output)
    return done.exit_code, json.loads(output.read_text())


def test_the_audit_finds_the_index_right_under_eviction(stack: local_stack.Running, tmp_path: Path) -> None:
    """More conversations than both caches hold, each request right after the answer before, or shortly after."""
    size = ("--count", "48", "--conversations", "24", "--tokens", "900")
    status, found = audit(stack, tmp_path / "audit.json", *size, "--require", "0.99")
    assert found["skipped"] == {}
    assert found["requests"] == 48
    assert status == 0
    assert found["within_one_block"] >= 0.99
    assert found["traffic"]["evicted"] > 0
    assert found["traffic"]["into_answers"] > 0
    assert found["traffic"]["cached_tokens"] > 0.2 * found["traffic"]["prompt_tokens"]


def test_the_audit_replays_a_file_and_says_what_it_cannot_compare(stack: local_stack.Running, tmp_path: Path) -> None:
    text = story("Lea")
    bodies = [
        {"prompt": text, "max_tokens": 1},
        {"prompt": text, "max_tokens": 1, "stream": True},
        {"prompt": text, "max_tokens": 1, "prompt_logprobs": 0},  # vLLM has it in its cache, and does not look
        {"prompt": [text, text], "max_tokens": 1},
        {"model": "nobody", "prompt": text},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    status, found = audit(stack, tmp_path / "audit.json", "--requests", str(path))
    assert status == 0
    cold, warm, unread = found["compared"]
    assert [one["error_blocks"] for one in found["compared"]] == [0, 0, 0]
    assert (cold["actual_tokens"], unread["actual_tokens"]) == (0, 0)
    assert warm["actual_tokens"] > 100
    assert sorted(found["skipped"].values()) == [1, 1]
    assert "gateway: status 404" in found["skipped"]

    path.write_text(json.dumps(bodies[-1]))
    status, found = audit(stack, tmp_path / "audit.json", "--requests", str(path))
    assert (status, found["requests"]) == (1, 0)


def exported(stack: local_stack.Running) -> str:
    """What Ray's Prometheus endpoints say."""
    path = Path(f"{session_folder(stack)}/prom_metrics_service_discovery.json")
    targets = json.loads(path.read_text())[0]["targets"]
    return "".join(httpx.get(f"http://{target}/metrics", timeout=10).text for target in targets)


def test_metrics_are_on_rays_prometheus_endpoint(stack: local_stack.Running) -> None:
    for name in (
        'kvcache_router_decisions_total{.*outcome="hit"',
        'kvcache_router_decisions_total{.*outcome="miss"',
        'kvcache_router_decisions_total{.*outcome="fallback"',
        "kvcache_router_prompt_tokens_total{",
        'kvcache_router_matched_tokens_total{.*tier="gpu"',
        'kvcache_router_stage_latency_seconds_bucket{.*stage="prompt"',
        'kvcache_index_blocks{.*tier="gpu"',
        "kvcache_index_log_lag_seconds{",
        'kvcache_index_pod_events_total{.*result="applied"',
        'kvcache_router_cached_tokens_total{.*kind="actual"',
        "kvcache_router_prediction_error_tokens_bucket{",
        "kvcache_router_loop_lag_seconds{",
        "kvcache_router_ttft_seconds_bucket{",
    ):
        eventually(lambda: re.search(name, exported(stack)), 30)  # noqa: B023  # at once


def test_a_tier_that_is_not_indexed_is_in_the_metrics(stack: local_stack.Running, valkey_url: str) -> None:
    mirror = Mirror(valkey_url, ModelId(MODEL))
    mirror.start()
    assert mirror.wait_ready(5)
    spec = mirror.spec()
    assert spec is not None
    mirror.close()
    writer = RedisWriter(valkey_url, ModelId(MODEL))
    node = Domain(DomainId("node:elsewhere"), writer.next_epoch(DomainId("node:elsewhere")), spec)
    writer.join(replace(node, unindexed={"cpu": "the engine does not say what it keeps there"}))
    writer.flush()
    gauge = r'kvcache_index_unindexed_tiers{.*pod="node:elsewhere",.*tier="cpu".*} '
    eventually(lambda: re.search(gauge + "1", exported(stack)), 30)
    writer.leave(node.id, node.epoch)
    writer.flush()
    eventually(lambda: re.search(gauge + "0", exported(stack)), 30)
    writer.close()


def test_a_mirror_that_starts_late_holds_the_full_index(
    valkey_url: str, http: httpx.Client, openai_client: openai.OpenAI, model_path: str
) -> None:
    messages = [{"role": "user", "content": story("Hal")}]
    replica, answer = ask(openai_client, messages)
    body = {"model": MODEL, "messages": messages}
    eventually(lambda: score(http, body)["scores"][replica] > 100)
    late = Mirror(valkey_url, ModelId(MODEL))
    late.start()
    assert late.wait_ready(5)
    spec = late.spec()
    assert spec is not None
    (encoded,) = PromptEncoder(spec, PrefixStore(1 << 20)).encode(body)
    assert encoded.token_count == answer.usage.prompt_tokens
    found = {pod: match.total_tokens for pod, match in late.match(encoded.block_keys).items()}
    late.close()
    eventually(lambda: found == score(http, body)["scores"])


def test_without_redis_requests_are_served_and_the_index_heals(
    stack: local_stack.Running, valkey_url: str, http: httpx.Client, openai_client: openai.OpenAI
) -> None:
    def epochs() -> dict[str, int]:
        return {pod["pod"]: pod["epoch"] for pod in http.get("/kvcache/v1/pods").json()["pods"]}

    messages = [{"role": "user", "content": story("Ivy")}]
    replica, _ = ask(openai_client, messages)
    body = {"model": MODEL, "messages": messages}
    eventually(lambda: score(http, body)["scores"][replica] > 100)
    before = epochs()
    with redis.Redis.from_url(valkey_url) as client:
        client.shutdown(nosave=True)
    assert ask(openai_client, messages)[0] == replica  # mirrors serve on as they were
    while_away = [{"role": "user", "content": story("Jan")}]
    other, _ = ask(openai_client, while_away)
    # Serve starts Valkey again, empty; the publishers join again and publish all, what came meanwhile included.
    eventually(lambda: all(epochs().get(pod, 0) > epoch for pod, epoch in before.items()), 60)
    eventually(lambda: score(http, body)["scores"].get(replica, 0) > 100)
    eventually(lambda: score(http, {"model": MODEL, "messages": while_away})["scores"].get(other, 0) > 100)


def test_routers_may_be_killed_and_frozen_and_no_request_fails(
    stack: local_stack.Running, http: httpx.Client, openai_client: openai.OpenAI
) -> None:
    """One of the two, then both: HAProxy asks the other, then balances plainly until Serve has started new ones."""

    def routers() -> list[psutil.Process]:
        processes = psutil.Process(stack.pid).children(recursive=True)
        return [one for one in processes if _title(one).startswith("ray::ServeReplica:llm:IngressRouter")]

    messages = [{"role": "user", "content": story("Lee")}]
    ask(openai_client, messages)
    time.sleep(0.5)
    with _Load(stack.url) as load:
        first, second = routers()
        time.sleep(1)
        first.kill()
        time.sleep(2)
        assert load.failed == []
        second.suspend()
        time.sleep(2)
        second.resume()
        for router in routers():
            router.kill()
        time.sleep(3)
    print(sorted(round(took_s, 1) for took_s in load.took_s))
    assert load.failed == []
    assert len(load.took_s) > 20
    # Each of HAProxy's four threads finds out for itself; here it waits three seconds (conftest), by default one.
    assert sum(took_s > 3 for took_s in load.took_s) <= 16
    assert max(load.took_s) < 8
    eventually(lambda: len(routers()) == 2, 120)
    # Meanwhile both replicas may have got it, so either may be its home now; but then it stays there.
    eventually(lambda: len({ask(openai_client, messages)[0] for _ in range(8)}) == 1, 60)


def test_a_killed_replica_is_gone_from_the_index_and_requests_go_on(
    stack: local_stack.Running, http: httpx.Client, openai_client: openai.OpenAI
) -> None:
    messages = [{"role": "user", "content": story("Kim")}]
    replica, _ = ask(openai_client, messages)
    body = {"model": MODEL, "messages": messages}
    eventually(lambda: score(http, body)["scores"][replica] > 100)
    victim = _replica_process(stack, replica)
    victim.kill()
    eventually(lambda: replica not in score(http, body)["scores"], 5)
    eventually(lambda: _answers(http, body), 60)
    eventually(lambda: len(http.get("/kvcache/v1/pods").json()["pods"]) == 2, 240)  # Serve has replaced it


def _answers(http: httpx.Client, body: dict[str, Any]) -> bool:
    return http.post("/v1/chat/completions", json={**body, "max_tokens": 2}).status_code == 200


class _Load:
    """Short requests of eight clients, each some two a second, on connections of their own."""

    def __init__(self, url: str) -> None:
        self.failed: list[str] = []
        self.took_s: list[float] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(8)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, client_number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            for number in itertools.count():
                if self._stop.wait(0.4):
                    return
                body = {"model": MODEL, "prompt": f"{client_number} and {number} are numbers", "max_tokens": 1}
                started_s = time.monotonic()
                try:
                    answer = client.post("/v1/completions", json=body)
                    if answer.status_code != 200:
                        self.failed.append(f"{answer.status_code} {answer.text[:200]}")
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))
                self.took_s.append(time.monotonic() - started_s)


def _title(process: psutil.Process) -> str:
    """What Ray calls it; it may end meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _replica_process(stack: local_stack.Running, replica: str) -> psutil.Process:
    """The Serve replica's process: the parent of the publisher that publishes under its name."""
    log = Path(stack.log).read_text()
    found = re.search(rf"pid=(\d+)\)[^\n]*joined {MODEL} as {replica} ", log)
    assert found is not None
    return psutil.Process(int(found.group(1)))
