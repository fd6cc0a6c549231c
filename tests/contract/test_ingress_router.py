"""What HAProxy asks our ingress request router, and what it is answered: bytes in, bytes out, a real index between."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray
from ray.serve._private.constants import SERVE_SESSION_ID
from starlette.types import Message, Receive, Scope, Send

from serve_app.deployments import ingress_router, rank_header, routed
from serve_app.deployments.ingress_router import RouteEndpoint
from serve_app.deployments.request_router import KVCacheAwareRouter
from serve_app.errors import IndexUnavailable
from serve_app.types import PodId, request_tag
from tests.contract.serve_router import MODEL, TOKENS, Fleet, Replica, know

BODY: dict[str, Any] = {"model": MODEL, "prompt": TOKENS, "max_tokens": 1}
A, B = (Replica(name).replica_id.to_full_id_str() for name in "ab")


async def behind(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve's own request path."""
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b"serve"})


async def ask(body: bytes | Any = BODY, path: str = "/internal/route", **headers: str) -> dict[str, Any] | bytes:
    """The answer, as JSON if it is the router's own."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    half = len(content) // 2
    parts: list[Message] = [
        {"type": "http.request", "body": content[:half], "more_body": True},
        {"type": "http.request", "body": content[half:]},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return parts.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    named = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    await RouteEndpoint(behind)({"type": "http", "path": path, "method": "POST", "headers": named}, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    answer: bytes = sent[1]["body"]
    if sent[0]["status"] != 200:
        return answer
    found: dict[str, Any] = json.loads(answer)
    return found


def last(router: KVCacheAwareRouter) -> tuple[str, str]:
    """Outcome and reason of the last decision, as the metrics have them."""
    metrics = router.decider._metrics
    assert metrics is not None
    outcome = list(metrics._decisions)[-1]
    metrics._decisions.clear()
    return outcome


async def test_the_replica_that_holds_the_prompt_is_named(router: KVCacheAwareRouter, fleet: Fleet) -> None:
    fleet.join_plain("a")
    fleet.join_plain("b", holds=8)
    await know(router, 2)
    assert await ask(x_request_id="one") == {"replica_id": B}
    tags = router.decider.chooser.in_flight._on_the_way[PodId("b")]
    assert list(tags) == [request_tag("one")]


async def test_the_rank_travels_in_a_header(router: KVCacheAwareRouter, fleet: Fleet) -> None:
    fleet.join("a", 0)
    fleet.join("a", 1, holds=8)
    fleet.join("b", 0)
    await know(router, 3)
    assert await ask() == {"replica_id": A, "request_headers": {rank_header.ENGINE_HEADER: "1"}}


async def test_an_explanation_and_an_adapter_travel_in_headers(
    router: KVCacheAwareRouter, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.join_plain("a", holds=8)
    fleet.join_plain("b")
    await know(router, 2)
    router.explains = True
    answer = await ask()
    assert answer == {"replica_id": A, "request_headers": {"x-kvcache-matched": "32", "x-kvcache-reason": "prefix"}}
    monkeypatch.setattr(routed, "base_model", MODEL)
    answer = await ask({**BODY, "model": f"{MODEL}:tales"})
    assert isinstance(answer, dict)
    assert answer["request_headers"]["serve_multiplexed_model_id"] == f"{MODEL}:tales"
    for model in (MODEL, "other:tales", 7, None, f'{MODEL}:a","x-data-parallel-rank":"9', f"{MODEL}:}}"):
        answer = await ask({**BODY, "model": model})
        assert isinstance(answer, dict)
        assert "serve_multiplexed_model_id" not in answer["request_headers"]


async def test_a_request_goes_to_where_its_adapter_is(router: KVCacheAwareRouter, fleet: Fleet) -> None:
    """`tales` is at a; b holds the base's blocks of the prompt, and loads no adapter by itself."""
    fleet.join_plain("a", adapters=("tales", "poems"))
    fleet.join_plain("b", holds=8)
    await know(router, 2)
    for body in (BODY, {"messages": 7}, {"prompt": TOKENS[:2]}):
        assert await ask({**body, "model": "tales"}) == {"replica_id": A}
    assert await ask() == {"replica_id": B}
    assert await ask({**BODY, "model": "of nobody"}) != {"replica_id": "none"}  # vLLM answers that


@pytest.mark.parametrize("path", ["/tokenize", "/v1/load_lora_adapter", "/pause", "/kvcache/v1/anything"])
async def test_what_makes_no_tokens_is_nobodys_load(router: KVCacheAwareRouter, fleet: Fleet, path: str) -> None:
    fleet.join_plain("a", holds=8)
    fleet.join_plain("b")
    await know(router, 2)
    answers = [await ask(x_kvcache_path=path) for _ in range(4)]
    assert {answer["replica_id"] for answer in answers if isinstance(answer, dict)} == {A, B}  # in turns
    assert last(router) == ("fallback", "no_generation")
    assert not router.decider.chooser.in_flight._sent
    assert not any(router.decider.chooser.ledger._entries.values())


@pytest.mark.parametrize("path", ["/v1/completions", "/llm/v1/chat/completions", "/v1/responses/", "/v1/messages", ""])
async def test_what_makes_tokens_is_scored(router: KVCacheAwareRouter, fleet: Fleet, path: str) -> None:
    fleet.join_plain("a", holds=8)
    fleet.join_plain("b")
    await know(router, 2)
    assert await ask(x_kvcache_path=path) == {"replica_id": A}
    assert last(router) == ("hit", "prefix")


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (b"", {}, "no_body"),
        (b"{", {}, "no_body"),
        (b"[1]", {}, "no_body"),
        (b"\xff\xfe", {}, "no_body"),
        (b"[" * 100_000, {}, "no_body"),
        (b'{"model": "m", "prompt": ' + b"[" * 100_000, {}, "no_body"),
        (json.dumps(BODY).encode()[:-3], {"x_body_truncated": "10/12"}, "body_too_long"),
        (b'{"prompt": {"a": 1}}', {}, None),
        (b'{"messages": 7, "model": []}', {}, None),
        (json.dumps({**BODY, "prompt": ["x"] * 5000}).encode(), {}, None),
        (BODY, {"x_request_id": "\xfc" * 5000, "x_kvcache_path": "\xff" * 256}, "no_generation"),
    ],
)
async def test_whatever_comes_somebody_is_named(
    router: KVCacheAwareRouter, fleet: Fleet, body: Any, headers: dict[str, str], reason: str | None
) -> None:
    fleet.join_plain("a")
    await know(router, 1)
    answer = await ask(body, **headers)
    assert isinstance(answer, dict)
    assert answer["replica_id"] in {A, B}
    outcome, why = last(router)
    assert outcome == "fallback"
    assert reason is None or why == reason


async def test_a_session_stays_together_when_nothing_else_is_known(router: KVCacheAwareRouter) -> None:
    header = SERVE_SESSION_ID.replace("-", "_")
    first, second = [await ask(b"", **{header: "x"}) for _ in range(2)]
    assert first == second


async def test_everything_else_goes_to_serve(router: KVCacheAwareRouter) -> None:
    for path in ("/health", "/internal/route/", "/", "/-/healthz"):
        assert await ask(path=path) == b"serve"


async def test_without_replicas_or_a_router_haproxy_balances(
    router: KVCacheAwareRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    router.update_replicas([])
    assert await ask() == {"replica_id": "none"}
    monkeypatch.setattr(routed, "_router", None)
    assert await ask() == {"replica_id": "none"}


async def test_a_client_that_hangs_up_costs_nothing(router: KVCacheAwareRouter) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError("nobody listens")

    await RouteEndpoint(behind)({"type": "http", "path": "/internal/route", "headers": []}, receive, send)
    assert not router.decider.chooser.in_flight._sent


async def test_health_is_red_when_nothing_follows_the_index(router: KVCacheAwareRouter) -> None:
    router.decider.check_alive()
    mirror = router.decider.mirror
    assert mirror is not None
    await asyncio.to_thread(mirror.close)
    with pytest.raises(IndexUnavailable):
        router.decider.check_alive()


async def test_health_is_red_when_a_background_task_has_ended(router: KVCacheAwareRouter) -> None:
    for task in router.decider._background:
        task.cancel()
    await asyncio.sleep(0.05)
    with pytest.raises(IndexUnavailable):
        router.decider.check_alive()


def test_another_ray_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ingress_router.can_be_used() == ""
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    assert "2.61.0" in ingress_router.can_be_used()


async def test_a_decision_waits_for_nobody(router: KVCacheAwareRouter, fleet: Fleet) -> None:
    """Answers to 50 requests at once, none of which needs more than what is here, within a second."""
    fleet.join_plain("a", holds=8)
    await know(router, 1)
    call: Callable[[], Awaitable[Any]] = ask
    started_s = time.monotonic()
    answers = await asyncio.gather(*(call() for _ in range(50)))
    assert time.monotonic() - started_s < 1
    assert {answer["replica_id"] for answer in answers} <= {A, B}
