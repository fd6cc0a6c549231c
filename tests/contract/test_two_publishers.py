"""Two publishers of one domain, by mistake (the same --pod twice) or because the former one is not quite gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from serve_app.errors import DomainTaken
from serve_app.index.keyspace import LOG_FIELD, HeartbeatRecord, Keyspace, LogRecord, decode_domain, encode
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.types import GPU, DomainId, Epoch
from tests.engine import MODEL, POD, Engine, PublisherProcess, matched
from tests.helpers import eventually, keys, pod

KEYS = Keyspace(MODEL)
ID = DomainId(POD)


@pytest.fixture
def former_and_new(redis_url: str) -> Iterator[tuple[RedisWriter, RedisWriter]]:
    """Both have published; epochs 1 and 2."""
    writers = RedisWriter(redis_url, MODEL, lease_ttl_s=0.5), RedisWriter(redis_url, MODEL)
    for epoch, writer in enumerate(writers, 1):
        writer.join(pod(POD, epoch))
        writer.add(ID, Epoch(epoch), GPU, keys(epoch))
        writer.flush()
        assert writer.heartbeat(ID, HeartbeatRecord(epoch))
    yield writers
    for writer in writers:
        writer.close()


def test_who_leaves_late_takes_nothing_from_its_successor(
    former_and_new: tuple[RedisWriter, RedisWriter], mirror: Mirror, redis_url: str
) -> None:
    former, new = former_and_new
    former.leave(ID, Epoch(1))
    former.flush()
    assert new.heartbeat(ID, HeartbeatRecord(2))
    with redis.Redis.from_url(redis_url) as client:  # as publishers of earlier versions did
        client.xadd(KEYS.log, {LOG_FIELD: encode(LogRecord("leave", POD, 1, 3))})
        assert client.exists(KEYS.blocks(ID, Epoch(1), GPU), KEYS.blocks(ID, Epoch(2), GPU)) == 1
    new.add(ID, Epoch(2), GPU, keys(3))
    new.flush()
    eventually(lambda: mirror.held([POD, POD, POD], keys(1, 2, 3)) == [False, True, True])
    assert mirror.counters["gaps"] == 0


def test_who_is_displaced_joins_again_only_when_the_lease_has_ended(
    former_and_new: tuple[RedisWriter, RedisWriter],
) -> None:
    former, new = former_and_new
    with pytest.raises(DomainTaken, match="--pod"):
        former.heartbeat(ID, HeartbeatRecord(1))
    assert new.heartbeat(ID, HeartbeatRecord(2))
    with pytest.raises(DomainTaken, match="--pod"):
        former.join(pod(POD, 3))
    new.leave(ID, Epoch(2))
    new.flush()
    former.join(pod(POD, 3))
    former.flush()
    assert former.heartbeat(ID, HeartbeatRecord(3))


def test_of_two_publishers_one_stands_by(tmp_path: Path, redis_url: str, mirror: Mirror) -> None:
    engines, publishers = [], []
    for name, tokens in (("former", range(8)), ("new", range(100, 108))):
        (tmp_path / name).mkdir()
        engines.append(Engine(tmp_path / name))
        engines[-1].store(tokens)
        publishers.append(PublisherProcess(engines[-1], redis_url, log=tmp_path / f"{name}.log"))
        eventually(lambda: matched(mirror, tokens) == 8, 15)  # noqa: B023  # it is called at once
    log = tmp_path / "former.log"
    eventually(lambda: "another publisher has joined" in log.read_text(), 10)
    time.sleep(1.5)  # what the former one wrote until then may have the new one publish again, once
    with redis.Redis.from_url(redis_url) as client:

        def epoch() -> int:
            stored = client.hget(KEYS.domains, POD)
            return decode_domain(stored).epoch if isinstance(stored, bytes) else 0

        before = epoch()
        time.sleep(7)  # it has looked again twice
        assert epoch() == before
    assert matched(mirror, range(100, 108)) == 8
    assert log.read_text().count("another publisher has joined") == 1
    publishers[1].kill()
    eventually(lambda: matched(mirror, range(8)) == 8, 15)
    for engine in engines:
        engine.stop()


@pytest.mark.parametrize("field", ["domains", "seqs"])
def test_a_record_that_somebody_spoils_is_written_anew(redis_url: str, field: str) -> None:
    writer = RedisWriter(redis_url, MODEL)
    domain = replace(pod("a"), epoch=writer.next_epoch(DomainId("a")))
    writer.join(domain)
    writer.flush()
    assert writer.heartbeat(domain.id, HeartbeatRecord(domain.epoch))
    with redis.Redis.from_url(redis_url) as client:
        client.hset(getattr(KEYS, field), domain.id, b"\xc1 no record")
    assert not writer.heartbeat(domain.id, HeartbeatRecord(domain.epoch))  # the publisher joins again
    again = replace(domain, epoch=writer.next_epoch(domain.id, domain.epoch))
    writer.join(again)
    writer.flush()
    assert writer.heartbeat(domain.id, HeartbeatRecord(again.epoch))
    writer.close()
