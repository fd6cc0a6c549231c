"""The page's two endpoints and its files, on a Valkey that publishers and routers have written to."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis
import yaml

from serve_app.access import hash_key
from serve_app.client import AsyncKVCacheClient
from serve_app.index.keyspace import LOG_FIELD, HeartbeatRecord, Keyspace
from serve_app.routing.receipts import Receipt
from serve_app.service import fleet as fleet_module
from serve_app.service import recent as recent_module
from tests.contract.score_server import PROMPT, Service
from tests.contract.serve_router import MODEL, SIZE, TOKENS, Fleet

RECEIPTS = Keyspace(MODEL).receipts


@pytest.fixture(autouse=True)
def looks_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a second in use; here each question is to see what there is."""
    for module in (fleet_module, recent_module):
        monkeypatch.setattr(module, "LOOK_S", 0.0)


class Asked:
    """Asks one service."""

    def __init__(self, service: Service, prefix: str = "") -> None:
        self._at = f"{service.url}{prefix}/v1/"

    async def get(self, name: str, **query: str) -> Any:
        async with httpx.AsyncClient() as client:
            answer = await client.get(self._at + name, params=query)
            assert answer.status_code == 200, answer.text
            return answer.json()

    async def until_decided(self, count: int, **query: str) -> Any:
        """So many complete decisions."""
        for _ in range(300):
            found = await self.get("decisions", **query)
            if len(found["decisions"]) == count:
                return found
            await asyncio.sleep(0.02)
        raise AssertionError(f"{len(found['decisions'])} decisions, not {count}")


async def serve(kv: AsyncKVCacheClient, request_id: str, tokens: list[int], cached: int) -> str:
    """A request that was chosen a pod for, and that has ended. Returns the pod."""
    chosen = (await kv.choose({**PROMPT, "prompt": tokens}, request_id=request_id)).chosen.pod
    assert await kv.done(request_id, prompt_tokens=len(tokens), cached_tokens=cached)
    return chosen


async def test_a_fleet_at_a_glance(service: Service, kv: AsyncKVCacheClient, fleet: Fleet) -> None:
    await kv.choose(PROMPT, request_id="open", pods=["b"])
    seen = await Asked(service).get("overview")
    replicas = {one["pod"]: one for one in seen["fleet"]["replicas"]}
    assert {pod: one.get("held_blocks", {}) for pod, one in replicas.items()} == {
        "a": {"gpu": 6},
        "b": {"gpu": 2},
        "c": {},
    }
    assert {one["trust"] for one in replicas.values()} == {"exact"}
    assert all(one["live"] for one in replicas.values())
    # b computes the 8 of 10 blocks that it does not hold
    assert (replicas["b"]["in_flight"], replicas["b"]["waiting"], replicas["b"]["queued_tokens"]) == (1, 1, 8 * SIZE)
    assert replicas["a"]["address"] == "10.0.0.97:8000"
    assert seen["fleet"]["blocks"] == {"gpu": 6}
    assert (seen["fleet"]["block_size"], seen["fleet"]["left_out"]) == (SIZE, 0)
    assert set(seen["fleet"]["loops"].values()) == {""}
    assert "error" not in seen["fleet"]["redis"]
    assert (seen["model"], seen["models"]) == (MODEL, [MODEL])
    while not seen["fleet"]["routers"]:  # it announces itself once a second
        seen = await Asked(service).get("overview")


async def test_what_a_publisher_says_of_itself(service: Service, fleet: Fleet) -> None:
    domain = fleet.join_plain("d", holds=3)
    beat = HeartbeatRecord(domain.epoch, 1, 3, events_applied=9, events_lost=2, events_skipped={"medium": 4}, beat=1)
    for _ in range(200):
        fleet.writer.heartbeat(domain.id, beat)
        seen = await Asked(service).get("overview")
        found = [one for one in seen["fleet"]["replicas"] if one["pod"] == "d" and "events_lost" in one]
        if found:
            break
        await asyncio.sleep(0.05)
    assert (found[0]["events_applied"], found[0]["events_lost"], found[0]["events_skipped"]) == (9, 2, 4)


async def test_decisions_are_told_once_and_the_newest_first(service: Service, kv: AsyncKVCacheClient) -> None:
    asked = Asked(service)
    await serve(kv, "one", TOKENS, 24)
    first = await asked.until_decided(1)
    await serve(kv, "two", TOKENS, 20)
    news = await asked.until_decided(1, after=first["last"])
    assert [one["receipt"]["request_id"] for one in news["decisions"]] == ["two"]
    both = await asked.get("decisions")
    assert [one["receipt"]["request_id"] for one in both["decisions"]] == ["two", "one"]
    receipt = both["decisions"][1]["receipt"]
    assert (receipt["chosen"], receipt["predicted_cached_tokens"], receipt["actual"]["cached_tokens"]) == ("a", 24, 24)
    assert receipt["replicas"]["a"]["cost_s"].keys() >= {"compute_s", "queue_s", "displace_s"}
    assert (await asked.get("decisions", after=news["last"]))["decisions"] == []
    assert len((await asked.get("decisions", limit="1"))["decisions"]) == 1


async def test_one_that_no_engine_has_told_of_is_there_at_once(service: Service, kv: AsyncKVCacheClient) -> None:
    await kv.choose(PROMPT, request_id="open")
    found = await Asked(service).get("decisions")
    assert [(one["receipt"]["request_id"], one["receipt"].get("actual")) for one in found["open"]] == [("open", None)]
    assert found["decisions"] == []


async def test_a_conversation_is_found_again_by_its_blocks(service: Service, kv: AsyncKVCacheClient) -> None:
    other = [token + 700 for token in TOKENS]
    await serve(kv, "first", TOKENS, 0)
    await serve(kv, "other", other, 0)
    await serve(kv, "second", [*TOKENS, *range(900, 930)], 40)
    await serve(kv, "third", [*TOKENS, *range(900, 930), *range(600, 620)], 64)
    found = await Asked(service).until_decided(4)
    ways = {one["receipt"]["request_id"]: one["conversation"] for one in found["decisions"]}
    assert ways == {"first": "first", "second": "first", "third": "first", "other": "other"}


async def test_branches_that_prompts_share_with_who_holds_them(service: Service, kv: AsyncKVCacheClient) -> None:
    for i in range(3):  # the first 8 blocks in common
        await serve(kv, f"r{i}", [*TOKENS[:32], *range(700 + 50 * i, 740 + 50 * i)], 0)
    await Asked(service).until_decided(3)
    branches = (await Asked(service).get("overview"))["branches"]
    # Of the 8 blocks a holds 6: the eighth is nobody's, and the shorter ones have no more requests.
    assert [(one["blocks"], one["requests"], one["holders"]) for one in branches] == [(8, 3, [])]
    for i in range(2):  # and two that share the first 4 only
        await serve(kv, f"s{i}", [*TOKENS[:16], *range(300 + 50 * i, 340 + 50 * i)], 0)
    await Asked(service).until_decided(5)
    branches = (await Asked(service).get("overview"))["branches"]
    assert [(one["blocks"], one["requests"], one["holders"], one["parent"]) for one in branches] == [
        (4, 5, ["a"], -1),
        (8, 3, [], 0),
    ]


async def test_hit_rate_and_error_of_each_replica(service: Service, kv: AsyncKVCacheClient) -> None:
    assert await serve(kv, "exact", TOKENS, 24) == "a"
    assert await serve(kv, "off", TOKENS, 20) == "a"
    await Asked(service).until_decided(2)
    seen = await Asked(service).get("overview")
    assert seen["by_replica"].keys() == {"a"}
    assert seen["traffic"] == {
        "requests": 2,
        "compared": 2,
        "prompt_tokens": 80,
        "cached_tokens": 44,
        "exact": 1,
        "error_tokens": seen["traffic"]["error_tokens"],
    }
    assert seen["traffic"]["error_tokens"] > 0


async def test_a_receipt_that_cannot_be_read_hides_no_other(
    service: Service,
    kv: AsyncKVCacheClient,
    redis_url: str,
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for bad in (b"{", b"\xff", b'{"request_id": 1}', b"[]"):
            client.xadd(RECEIPTS, {LOG_FIELD: bad})
    await serve(kv, "good", TOKENS, 24)
    found = await Asked(service).until_decided(1)
    assert found["decisions"][0]["receipt"]["request_id"] == "good"


async def test_answers_are_bounded_in_a_large_fleet(redis_url: str, fleet: Fleet) -> None:
    """300 replicas and more receipts than are kept: the 256 that matter, 100 decisions."""
    for i in range(300):
        fleet.join_plain(f"r{i:03}", holds=1)
    receipt = Receipt("x", time.time(), "elsewhere", "hit", "prefix", "r001", 0.001, prompt_tokens=40)
    with redis.Redis.from_url(redis_url) as client, client.pipeline() as pipeline:
        for i in range(400):
            one = msgspec.structs.replace(receipt, request_id=f"{i}")
            pipeline.xadd(RECEIPTS, {LOG_FIELD: msgspec.json.encode(one)})
        pipeline.execute()
    service = Service(redis_url)
    await service.ready(pods=300)
    found = await Asked(service).get("decisions", limit="100")
    assert [one["receipt"]["request_id"] for one in found["decisions"]] == [str(i) for i in range(399, 299, -1)]
    seen = await Asked(service).get("overview")
    assert (len(seen["fleet"]["replicas"]), seen["fleet"]["left_out"]) == (256, 44)
    assert seen["traffic"]["requests"] == 256
    assert len(msgspec.json.encode(seen)) < 80_000
    await service.close()


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("after=x", "after"),
        ("after=1-", "after"),
        ("after=1-2-3", "after"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
    ],
)
async def test_a_wrong_question_is_told_which_field(service: Service, query: str, field: str) -> None:
    async with httpx.AsyncClient(base_url=service.url) as client:
        answer = await client.get(f"/v1/decisions?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, field)
        assert (await client.get("/v1/overview?model=other")).status_code == 404


async def test_what_redis_refuses_is_said(service: Service, kv: AsyncKVCacheClient, redis_url: str) -> None:
    """A user that may not ask for sizes: what the publishers say of themselves is shown instead."""
    with redis.Redis.from_url(redis_url) as admin:
        admin.acl_setuser("narrow", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-scard"])
    narrow = Service(redis_url.replace("redis://", "redis://narrow:pw@"))
    await narrow.ready(pods=3)
    seen = await Asked(narrow).get("overview")
    assert "cluster/redis/users.acl" in seen["fleet"]["redis"]["error"]
    assert {one["pod"] for one in seen["fleet"]["replicas"]} == {"a", "b", "c"}
    await narrow.close()


@pytest.mark.parametrize("at", ["/", "/kvcache/"])
async def test_the_page_and_its_parts_load_nothing_from_elsewhere(service: Service, at: str) -> None:
    async with httpx.AsyncClient(base_url=service.url + at) as client:
        page = await client.get("")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        parts = [part.split('"')[0] for part in page.text.replace('src="', 'href="').split('href="')[1:]]
        assert {"page/app.js", "page/page.css", "page/icon.svg"} <= set(parts)
        for part in parts:
            if part.startswith("#"):
                continue
            answer = await client.get(part)
            assert answer.status_code == 200, part
            assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", ""), part
            assert answer.headers["x-content-type-options"] == "nosniff"
        again = await client.get(
            "page/app.js", headers={"if-none-match": (await client.get("page/app.js")).headers["etag"]}
        )
        assert again.status_code == 304
        assert (await client.get("v1/overview")).status_code == 200
        assert (await client.get("page/../http.py")).status_code == 404


async def test_the_page_is_open_and_its_data_is_not(redis_url: str, fleet: Fleet, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    of_whom = [{"name": name, "sha256": hash_key(name), "admin": name == "admin"} for name in ("admin", "scheduler")]
    keys.write_text(yaml.safe_dump({"keys": of_whom}))
    service = Service(redis_url, auth={"keys_file": str(keys)})
    await service.started()
    async with httpx.AsyncClient(base_url=service.url) as client:
        assert (await client.get("/kvcache/")).status_code == 200
        assert (await client.get("/kvcache", follow_redirects=True)).status_code == 200
        for path in ("/v1/overview", "/kvcache/v1/overview", "/v1/decisions"):
            for key, status in (("", 401), ("wrong", 401), ("scheduler", 403), ("admin", 200)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                assert (await client.get(path, headers=headers)).status_code == status, (path, key)
    await service.close()
