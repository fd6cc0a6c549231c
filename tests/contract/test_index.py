"""One behaviour suite over every index: in memory, and Redis followed by a mirror (from the start, or late)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.memory import MemoryIndex
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.types import CPU, GPU, BlockKeys, DomainId, Epoch, PodId, Tier
from tests.helpers import MODEL, eventually, keys, pod, shared

A, B = PodId("a"), PodId("b")


class InMemory:
    """The writer's calls, and a settled view of what readers see."""

    def __init__(self) -> None:
        self.writer: MemoryIndex | RedisWriter
        self.writer = self._index = MemoryIndex(tier_order=(GPU, CPU))

    def reader(self) -> MemoryIndex | Mirror:
        return self._index

    def matched(self, prompt: BlockKeys, *pods: PodId) -> dict[PodId, dict[Tier, int]]:
        found = self.reader().match(prompt, pods or None)
        return {pod: dict(match.tokens) for pod, match in found.items()}

    def hits(self, prompt: BlockKeys) -> dict[PodId, int]:
        return {pod: m.hit_blocks for pod, m in self.reader().match(prompt, count_hits=True).items()}


class ThroughRedis(InMemory):
    """A writer and a mirror that has followed since the beginning."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.writer = self._writer = RedisWriter(url, MODEL)
        self._mirror = self._start()

    def _start(self) -> Mirror:
        mirror = Mirror(self.url, MODEL, tier_order=(GPU, CPU))
        mirror.start()
        assert mirror.wait_ready(5)
        return mirror

    def reader(self) -> Mirror:
        self._writer.flush()
        for domain_id, published in self._writer._published.items():
            self._writer.heartbeat(domain_id, HeartbeatRecord(published.domain.epoch))
        self._settle()
        return self._mirror

    def _settle(self) -> None:
        """The mirror has applied the log's last entry."""
        tail = self._writer._redis.xrevrange(self._writer._keys.log, count=1)
        entry = tail[0][0] if tail else b"0-0"
        assert isinstance(entry, bytes)
        last = entry.decode()
        eventually(lambda: self._mirror._position == last)

    def close(self) -> None:
        self._mirror.close()
        self._writer.close()


class ThroughRedisLate(ThroughRedis):
    """Every question is asked of a mirror that has only just started, so the answer comes from the loaded state."""

    def _settle(self) -> None:
        self._mirror.close()
        self._mirror = self._start()


@pytest.fixture(params=["memory", "redis", "redis-late"])
def index(request: pytest.FixtureRequest) -> Iterator[InMemory]:
    if request.param == "memory":
        yield InMemory()
        return
    subject = (ThroughRedis if request.param == "redis" else ThroughRedisLate)(request.getfixturevalue("redis_url"))
    yield subject
    subject.close()


def test_prefix_is_counted_in_tokens_up_to_the_first_gap(index: InMemory) -> None:
    index.writer.join(pod("a"))
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1, 2, 4))
    assert index.matched(keys(1, 2, 3, 4)) == {A: {GPU: 8}}
    assert index.hits(keys(1, 2, 3, 4)) == {A: 3}


def test_pods_are_told_apart(index: InMemory) -> None:
    index.writer.join(pod("a"))
    index.writer.join(pod("b"))
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1, 2, 3))
    index.writer.add(DomainId("b"), Epoch(1), GPU, keys(1))
    assert index.matched(keys(1, 2, 3)) == {A: {GPU: 12}, B: {GPU: 4}}
    assert index.matched(keys(1, 2, 3), B) == {B: {GPU: 4}}
    assert index.matched(keys(9)) == {A: {}, B: {}}
    assert index.matched(b"") == {A: {}, B: {}}


def test_an_unknown_pod_matches_nothing(index: InMemory) -> None:
    index.writer.join(pod("a"))
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1))
    assert index.matched(keys(1), PodId("nobody")) == {PodId("nobody"): {}}


def test_a_slower_tier_goes_on_where_the_faster_ended(index: InMemory) -> None:
    index.writer.join(pod("a"))
    index.writer.add(DomainId("a"), Epoch(1), CPU, keys(1, 2, 3))
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1))
    assert index.matched(keys(1, 2, 3, 4)) == {A: {GPU: 4, CPU: 8}}
    index.writer.remove(DomainId("a"), Epoch(1), GPU, keys(1))
    assert index.matched(keys(1, 2, 3, 4)) == {A: {CPU: 12}}


def test_a_shared_domain_counts_for_the_pods_that_are_attached_to_it(index: InMemory) -> None:
    index.writer.join(pod("a", attached=("node",)))
    index.writer.join(pod("b", attached=("node",)))
    index.writer.join(pod("c"))
    index.writer.join(shared("node"))
    index.writer.add(DomainId("node"), Epoch(1), CPU, keys(1, 2, 3, 4))
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1))
    assert index.matched(keys(1, 2, 3, 9)) == {A: {GPU: 4, CPU: 4}, B: {CPU: 8}, PodId("c"): {}}
    assert index.hits(keys(1, 2, 3, 9)) == {A: 3, B: 3, PodId("c"): 0}
    index.writer.leave(DomainId("node"), Epoch(1))
    assert index.matched(keys(1, 2, 3, 9)) == {A: {GPU: 4}, B: {}, PodId("c"): {}}


def test_removed_blocks_are_gone_for_that_pod_only(index: InMemory) -> None:
    for name in ("a", "b"):
        index.writer.join(pod(name))
        index.writer.add(DomainId(name), Epoch(1), GPU, keys(1, 2))
    index.writer.remove(DomainId("a"), Epoch(1), GPU, keys(2, 77))
    assert index.matched(keys(1, 2)) == {A: {GPU: 4}, B: {GPU: 8}}


def test_cleared_domain_lives_on_empty(index: InMemory) -> None:
    index.writer.join(pod("a"))
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1, 2))
    index.writer.add(DomainId("a"), Epoch(1), CPU, keys(1, 2))
    index.writer.clear(DomainId("a"), Epoch(1))
    assert index.matched(keys(1, 2)) == {A: {}}
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1))
    assert index.matched(keys(1, 2)) == {A: {GPU: 4}}


def test_a_new_epoch_voids_the_old_blocks_and_late_changes_of_it(index: InMemory) -> None:
    index.writer.join(pod("a", epoch=1))
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1, 2))
    index.writer.join(pod("a", epoch=2))
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1, 2))
    assert index.matched(keys(1, 2)) == {A: {}}
    index.writer.add(DomainId("a"), Epoch(2), GPU, keys(1))
    index.writer.remove(DomainId("a"), Epoch(1), GPU, keys(1))
    index.writer.leave(DomainId("a"), Epoch(1))
    assert index.matched(keys(1, 2)) == {A: {GPU: 4}}


def test_a_pod_that_left_is_no_longer_answered_for(index: InMemory) -> None:
    index.writer.join(pod("a"))
    index.writer.join(pod("b"))
    index.writer.add(DomainId("a"), Epoch(1), GPU, keys(1))
    index.writer.leave(DomainId("a"), Epoch(1))
    assert index.matched(keys(1)) == {B: {}}
    index.writer.join(pod("a", epoch=2))
    assert index.matched(keys(1)) == {A: {}, B: {}}


def test_many_blocks(index: InMemory) -> None:
    many = keys(*range(25_000))
    index.writer.join(pod("a"))
    index.writer.add(DomainId("a"), Epoch(1), GPU, many)
    index.writer.remove(DomainId("a"), Epoch(1), GPU, many[20_000 * 8 :])
    assert index.matched(many) == {A: {GPU: 80_000}}
