"""Ray's request router class with data parallel ranks: records in Valkey -> decision -> what the engine is told."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve._private.common import (
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest

from serve_app.deployments import rank_header, routed
from serve_app.deployments.request_router import KVCacheAwareRouter
from serve_app.types import DomainId, PodId, pod_of_rank
from tests.contract.serve_router import MAX_ONGOING, MODEL, TOKENS, Fleet, Replica, know


def request(number: int, *more: object) -> PendingRequest:
    metadata = RequestMetadata(f"request-{number}", f"internal-{number}")
    return PendingRequest([SimpleNamespace(model=MODEL, prompt=TOKENS, max_tokens=1), *more], {}, metadata)


def of_client(**headers: str) -> RawRequestInfo:
    """As the OpenAI ingress hands it on beside the body."""
    return RawRequestInfo(headers=dict(headers))


async def choose(router: KVCacheAwareRouter, pending: PendingRequest) -> list[str]:
    """Replicas, best first."""
    ranked = await router.choose_replicas([Replica("a"), Replica("b")], pending)
    return [replica.replica_id.unique_id for (replica,) in ranked]


def told(headers: dict[str, str], replica: str) -> str | None:
    """The rank that vLLM reads, if this replica takes the request."""
    mine = dict(headers)
    rank_header.take(mine, replica)
    assert set(mine) <= {rank_header.ENGINE_HEADER}
    return mine.get(rank_header.ENGINE_HEADER)


async def test_the_rank_that_holds_the_prompt_gets_it(router: KVCacheAwareRouter, fleet: Fleet) -> None:
    for replica, rank, holds in (("a", 0, 0), ("a", 1, 2), ("b", 0, 0), ("b", 1, 0), ("b", 2, 8)):
        fleet.join(replica, rank, holds=holds)
    await know(router, 5)
    info = of_client()
    assert await choose(router, request(1, info)) == ["b", "a"]
    assert told(info.headers, "b") == "2"
    assert told(info.headers, "a") == "1"  # if the first one is full, and this one takes it


async def test_a_rank_that_a_client_names_is_not_the_one_that_was_chosen(
    router: KVCacheAwareRouter, fleet: Fleet
) -> None:
    fleet.join("a", 0)
    fleet.join("a", 1, holds=8)
    await know(router, 2)
    info = of_client(**{rank_header.ENGINE_HEADER: "0"})
    await choose(router, request(1, info))
    assert told(info.headers, "a") == "1"


async def test_where_a_rank_cannot_be_named_the_replica_counts_as_its_best(
    router: KVCacheAwareRouter, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.join("a", 0, holds=2)
    fleet.join("b", 0)
    fleet.join("b", 1, holds=8)
    await know(router, 3)
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    try:
        for number in (1, 2):
            assert await choose(router, request(number)) == ["b", "a"]
    finally:
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert sum("cannot be named" in record.message for record in caplog.records) == 1


async def test_who_got_it_is_known_by_its_rank(router: KVCacheAwareRouter, fleet: Fleet) -> None:
    for replica, rank, holds in (("a", 0, 0), ("a", 1, 8), ("b", 0, 0), ("b", 1, 3)):
        fleet.join(replica, rank, holds=holds)
    await know(router, 4)
    first, second = request(1, of_client()), request(2, of_client())
    for pending, taker, expected in ((first, "a", "a#1"), (second, "b", "b#1")):
        assert (await choose(router, pending))[0] == "a"
        router.on_request_routed(pending, Replica(taker).replica_id, None)  # type: ignore[arg-type]  # unused
        assert routed.replica_of(pending.metadata.request_id) == expected
    now_s = time.monotonic()
    assert [router.decider.chooser.in_flight.count(pod_of_rank(*pod), now_s) for pod in (("a", 1), ("b", 1))] == [1, 1]


async def test_a_replica_is_full_when_its_ranks_together_are(router: KVCacheAwareRouter, fleet: Fleet) -> None:
    ranks = [fleet.join("a", 0, holds=8), fleet.join("a", 1), fleet.join("b", 0)]
    await know(router, 3)
    assert (await choose(router, request(1, of_client())))[0] == "a"
    for rank, in_flight in zip(ranks, (MAX_ONGOING // 2, MAX_ONGOING // 2, 0), strict=True):
        fleet.writer.report_load(rank.id, rank.epoch, in_flight)
    fleet.writer.flush()
    await asyncio.sleep(0.4)
    assert await choose(router, request(2, of_client())) == ["b", "a"]


async def test_ranks_may_join_before_serve_tells_of_their_replica(router: KVCacheAwareRouter, fleet: Fleet) -> None:
    fleet.join("a", 0)
    fleet.join("c", 0)
    fleet.join("c", 1, holds=8)
    await know(router, 3)
    await choose(router, request(1, of_client()))
    router.update_replicas([Replica("a"), Replica("b")])  # c is not there yet
    router.update_replicas([Replica("a"), Replica("b"), Replica("c")])
    info = of_client()
    ranked = await router.choose_replicas([Replica("a"), Replica("c")], request(2, info))
    assert [replica.replica_id.unique_id for (replica,) in ranked] == ["c", "a"]
    assert told(info.headers, "c") == "1"


async def test_replicas_without_ranks_are_told_nothing(router: KVCacheAwareRouter, fleet: Fleet) -> None:
    rank = fleet.join("a", 0)
    fleet.publish(replace(rank, id=DomainId("b"), pod=PodId("b"), rank=1, replica="b"))  # a gang's: it is the rank
    fleet.publish(replace(rank, id=DomainId("c"), pod=PodId("c"), rank=None, replica=""))
    await know(router, 3)
    router.update_replicas([Replica("b"), Replica("c")])
    info = of_client(accept="json")
    ranked = await router.choose_replicas([Replica("b"), Replica("c")], request(1, info))
    assert {replica.replica_id.unique_id for (replica,) in ranked} == {"b", "c"}
    assert info.headers == {"accept": "json"}


@pytest.mark.parametrize("said", ["", "{", "[1]", '{"a": "x"}', '{"a": 1.5}', '{"b": 1}'])
def test_what_a_client_makes_up_is_dropped(said: str) -> None:
    assert told({"x-kvcache-ranks": said}, "a") is None


@pytest.mark.parametrize(
    ("ranks", "named", "expected"),
    [(None, "1", "a"), (range(2), None, "a"), (range(2), "1", "a#1"), (range(2), "2", "a"), (range(2), "one", "a")],
)
def test_an_answer_names_the_rank_if_the_engine_was_told_one(
    ranks: range | None, named: str | None, expected: str
) -> None:
    assert rank_header.served_by("a", ranks, named) == expected
