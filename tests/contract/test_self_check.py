"""A publisher's own check: what it believes of an engine against vLLM's figure of blocks in use, and its capacity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from serve_app.events.engine_groups import plain_layout
from serve_app.events.publisher import Feed
from serve_app.events.self_check import LASTING_S, SelfCheck
from serve_app.events.wire import BlockRemoved, BlockStored, Event
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.mirror import Mirror
from serve_app.types import Trust
from tests.contract.test_hybrid_layouts import LAYOUTS, Followed, conversations
from tests.engine import POD, Engine, PublisherProcess, matched
from tests.helpers import eventually
from tests.vllm_engine import BLOCK_SIZE, VLLMEngine

POOL = 400  # blocks for each KV cache group


@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
def test_what_vllm_has_in_use_never_contradicts_what_is_right(groups: Sequence[KVCacheSpec]) -> None:
    followed = Followed(VLLMEngine(groups, POOL * len(groups)))
    engine = followed.engine
    check = SelfCheck(followed.blocks.groups, engine.capacity)
    running: list[Request] = []
    compared = 0

    def hear(events: list[Event]) -> None:
        nonlocal compared
        followed.hear(events)
        copies = followed.blocks.copies
        assert check.capacity(copies) == ""
        for now_s in (0.0, LASTING_S):  # nor for a moment
            assert check.in_use(copies, engine.used_blocks, len(running), now_s) == ""
        compared += engine.used_blocks > 0

    for tokens in conversations(4, 60):
        if sum(request.num_tokens for request in running) + len(tokens) > (POOL - 130) * BLOCK_SIZE:
            engine.manager.free(running.pop(0))
            continue
        running.append(engine.request(tokens))
        engine.serve(running[-1], hear, free=False)
    assert compared > 20


def test_an_engine_of_more_groups_than_are_known_contradicts() -> None:
    """Gemma 3's layout, and all that is heard is group 0: what requests have in use cannot be what is known."""
    followed = Followed(VLLMEngine(LAYOUTS["five sliding to one full"], POOL))
    check = SelfCheck(plain_layout(BLOCK_SIZE), POOL)
    engine, heard = followed.engine, 0

    def hear(events: list[Event]) -> None:
        nonlocal heard
        stored = (event for event in events if isinstance(event, BlockStored | BlockRemoved) and not event.group_idx)
        heard += sum(len(event.block_hashes) for event in stored)

    for tokens in (list(range(700)), list(range(1000, 1600))):
        engine.serve(engine.request(tokens), hear, free=False)
    assert check.in_use(heard, engine.used_blocks, 2, 0.0) == ""
    assert "in use by 2 requests" in check.in_use(heard, engine.used_blocks, 2, LASTING_S)
    assert check.in_use(heard, heard, 2, LASTING_S) == ""
    assert check.in_use(heard, engine.used_blocks, 2, LASTING_S + 1) == ""  # it must last again


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.stop()


def skipped(mirror: Mirror) -> dict[str, int]:
    return (mirror.domains()[0][2] or HeartbeatRecord(0)).events_skipped


def test_blocks_in_use_that_were_never_heard_of_are_said(engine: Engine, redis_url: str, mirror: Mirror) -> None:
    publisher = PublisherProcess(engine, redis_url, capacity=101)
    engine.store(range(80))
    publisher.tell(msgspec.json.encode(Feed(2, usage=0.2)))
    eventually(lambda: matched(mirror, range(80)) == 80)
    assert mirror.trust(POD) is Trust.EXACT
    publisher.tell(msgspec.json.encode(Feed(2, usage=0.6)))
    eventually(lambda: mirror.trust(POD) is Trust.DEGRADED, 2 * LASTING_S)
    assert "60 blocks are in use by 2 requests, and 20 are known" in mirror.domains()[0][0].doubt
    eventually(lambda: skipped(mirror).get("not_heard") == 1)
    publisher.kill()


def test_more_blocks_than_the_engine_has_are_not_believed(engine: Engine, redis_url: str, mirror: Mirror) -> None:
    publisher = PublisherProcess(engine, redis_url, capacity=21)
    engine.store(range(80))
    eventually(lambda: matched(mirror, range(80)) == 80)
    assert mirror.trust(POD) is Trust.EXACT
    engine.store(range(80, 88))
    eventually(lambda: mirror.trust(POD) is Trust.DEGRADED)
    eventually(lambda: skipped(mirror).get("over_capacity") == 1)
    publisher.kill()
