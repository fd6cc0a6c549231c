"""A pod whose predictions do not hold is noticed by the router that asks it: through every part but Ray and the model.

vLLM's KVCacheManager, events -> publisher -> Valkey -> mirror -> choice, receipt -> the engine's figures by the
publisher's feed -> the check -> verdict in the log -> every mirror
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm.distributed.kv_events import BlockStored

from serve_app.blocks import block_keys, namespace_key, pack_tokens
from serve_app.events.publisher import Feed
from serve_app.index.mirror import Mirror
from serve_app.index.router_log import RouterLog
from serve_app.routing.chooser import Chooser
from serve_app.routing.desk import Desk
from serve_app.routing.receipts import last_expected, receipt
from serve_app.types import DomainId, EncodedKeys, Found, Served, Trust
from tests.contract.test_hybrid_layouts import LAYOUTS, conversations
from tests.engine import MODEL, POD, Engine, PublisherProcess
from tests.helpers import eventually, following
from tests.vllm_engine import BLOCK_SIZE, VLLMEngine

pytestmark = pytest.mark.usefixtures("a_stop_is_short")

CAPACITY = 4000
REQUESTS = 20


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.stop()


class Router:
    """What KVCacheAwareRouter does of a request, without Ray."""

    def __init__(self, mirror: Mirror, redis_url: str, name: str) -> None:
        self.mirror, self.name = mirror, name
        self.chooser = Chooser(mirror.held)
        self.desk = Desk(mirror, self.chooser, name)
        self.log = RouterLog(redis_url, MODEL, name)
        self.log.start()

    def route(self, request_id: str, tokens: list[int]) -> None:
        keys = block_keys(pack_tokens(tokens), BLOCK_SIZE, namespace_key(MODEL, BLOCK_SIZE))
        match = self.mirror.match(keys, [POD], prompt_tokens=len(tokens))
        found, now_s = Found([EncodedKeys(keys, len(tokens), 0)], [match], BLOCK_SIZE), time.monotonic()
        choice = self.chooser.choose([POD], found, now_s)
        self.chooser.sent(POD, found, choice, now_s)
        new = receipt(request_id, self.name, time.time(), 0.0, POD, choice, found)
        self.desk.receipts.open(new, last_expected(found, POD, choice))

    def catch_up(self) -> int:
        """Receipts that are complete now."""
        complete = self.desk.catch_up([POD])
        self.log.distrust(self.desk.distrusted())
        return len(complete)


def group_0_alone(events: list[Any]) -> list[Any]:
    """As a publisher heard an engine before it knew of KV cache groups."""
    kept = [event for event in events if not getattr(event, "group_idx", 0)]
    return [
        msgspec.structs.replace(
            event,
            group_idx=None,
            **({"kv_cache_spec_kind": None} if isinstance(event, BlockStored) else {}),
        )
        for event in kept
    ]


@pytest.mark.parametrize("groups_known", [False, True])
def test_gemmas_layout_is_believed_only_with_its_groups(engine: Engine, redis_url: str, groups_known: bool) -> None:
    vllm = VLLMEngine(LAYOUTS["five sliding to one full"], CAPACITY)
    publisher = PublisherProcess(engine, redis_url, block_size=0 if groups_known else BLOCK_SIZE)
    with following(redis_url, MODEL) as mirror, following(redis_url, MODEL) as elsewhere:
        router = Router(mirror, redis_url, "one")
        asked = noticed = 0
        for number, tokens in enumerate(conversations(7, REQUESTS)):
            request_id = f"r{number}"
            router.route(request_id, tokens)
            cached = vllm.serve(
                vllm.request(tokens),
                lambda _: None,
                raw=lambda events: engine.send(*(events if groups_known else group_0_alone(events))),
            )
            served = Served(f"cmpl-{request_id}-0", len(tokens), cached, 0.0, 0.05)
            publisher.tell(msgspec.json.encode(Feed(0, [served])))
            eventually(lambda: mirror.pods() == [POD], 15)
            eventually(lambda: router.catch_up() == 1)
            asked += 1
            if router.desk.check.causes:
                noticed = asked
                break
        if groups_known:
            assert (noticed, asked) == (0, REQUESTS)
            assert elsewhere.trust(POD) is Trust.EXACT
        else:
            assert 0 < noticed < REQUESTS
            eventually(lambda: elsewhere.trust(POD) is Trust.DEGRADED)
            assert "reused more than was predicted" in elsewhere.cause(DomainId(POD))
            with following(redis_url, MODEL) as new:  # a router that starts now is told within seconds
                eventually(lambda: new.trust(POD) is Trust.DEGRADED)
        router.log.close()
    publisher.kill()


def test_what_a_router_has_said_ends_with_it(engine: Engine, redis_url: str) -> None:
    """A verdict is renewed by its router alone: after a restart it earns its own."""
    publisher = PublisherProcess(engine, redis_url)
    with following(redis_url, MODEL) as mirror:
        eventually(lambda: mirror.pods() == [POD], 15)
        epoch = mirror.domains()[0][0].epoch
        router = Router(mirror, redis_url, "one")
        router.log.distrust({POD: (epoch, "removals are not heard")})
        eventually(lambda: mirror.trust(POD) is Trust.DEGRADED)
        router.log.close()
        successor = Router(mirror, redis_url, "two")
        eventually(lambda: mirror.trust(POD) is Trust.EXACT, 15)
        successor.log.close()
    publisher.kill()
