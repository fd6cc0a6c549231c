"""What a Redis peer may have written, by mistake or on purpose: left out and counted, and harms nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import redis

from serve_app.events.engine_blocks import EngineBlocks
from serve_app.events.wire import BlockStored
from serve_app.index.keyspace import LOG_FIELD, DomainRecord, HeartbeatRecord, Keyspace, LogRecord, encode
from serve_app.index.memory import TIERS_MAX
from serve_app.index.mirror import LEFT_OUT_MAX, VERDICTS_MAX, Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.types import GPU, DomainId, PodId, Tier
from tests.helpers import MODEL, eventually, following, keys, pod

KEYS = Keyspace(MODEL)
GOOD, BAD = pod("good"), pod("bad")
RECORD: list[Any] = msgspec.msgpack.decode(encode(DomainRecord.of(BAD)))
ENTRY: list[Any] = msgspec.msgpack.decode(encode(LogRecord("route", "bad", 0, keys=keys(1), router="r", tokens=4)))
BEAT: list[Any] = msgspec.msgpack.decode(encode(HeartbeatRecord(BAD.epoch)))


def with_field(fields: list[Any], at: int, value: Any) -> bytes:
    return msgspec.msgpack.encode([*fields[:at], value, *fields[at + 1 :]])


JUNK = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "cut": encode(DomainRecord.of(BAD))[:-3],
    "a number": msgspec.msgpack.encode(7),
    "a map": msgspec.msgpack.encode({"epoch": 1}),
    "an empty list": msgspec.msgpack.encode([]),
    "deep": b"\x91" * 2000 + b"\x00",
    "json": b'{"epoch": 1}',
    "long": msgspec.msgpack.encode(["x" * 100_000]),
}
RECORDS = JUNK | {
    f"field {at} is {value!r}": with_field(RECORD, at, value)
    for at, value in [
        *((0, None), (0, "one"), (1, 5), (3, b"model"), (4, -16), (4, 0), (4, "16"), (5, None), (8, 3)),
        *((14, 99), (15, [["of next year", 16]]), (15, [["sliding_window", 16, -1]]), (15, 7), (18, "zero")),
    ]
}
ENTRIES = JUNK | {
    f"field {at} is {value!r}"[:60]: with_field(ENTRY, at, value)
    for at, value in [
        *((0, None), (0, "of next year"), (0, "x" * 5000), (1, 7), (1, "y" * 5000), (2, -1), (2, 2**60), (2, "1")),
        *((3, -1), (4, 5), (5, b"12345"), (5, "text"), (6, [1]), (7, -5), (8, [["r", -1, 0, 0.0, 0.0]])),
        *((8, [["r", 1, 5, 0.0, 0.0]]), (8, [["r", 9, 5, -1.0, 0.0]]), (9, "z" * 5000), (10, -7), (10, 2**62)),
    ]
}
BEATS = JUNK | {"an epoch in words": with_field(BEAT, 0, "one"), "skipped is a list": with_field(BEAT, 5, [1])}


@pytest.fixture
def writer(redis_url: str) -> Iterator[RedisWriter]:
    writer = RedisWriter(redis_url, MODEL, lease_ttl_s=60)
    writer.join(GOOD)
    writer.add(GOOD.id, GOOD.epoch, GPU, keys(1))
    writer.flush()
    writer.heartbeat(GOOD.id, HeartbeatRecord(GOOD.epoch))
    yield writer
    writer.close()


def check(redis_url: str, writer: RedisWriter, mirror: Mirror) -> None:
    """The mirror that runs goes on, a new one starts, and both know what is good."""
    writer.add(GOOD.id, GOOD.epoch, GPU, keys(2))
    writer.flush()
    good = GOOD.pod
    assert good is not None
    eventually(lambda: mirror.match(keys(1, 2), [good])[good].total_tokens == 8)
    assert mirror.counters["errors"] == 0
    with following(redis_url, MODEL) as new:
        assert new.match(keys(1, 2), [good])[good].total_tokens == 8
        assert new.counters["errors"] == 0
        assert len(new.counters) < 20


def test_records_of_domains(redis_url: str, writer: RedisWriter) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for name, raw in RECORDS.items():
            client.hset(KEYS.domains, name, raw)
            client.set(KEYS.lease(DomainId(name)), encode(HeartbeatRecord(BAD.epoch)))
        client.hset(KEYS.domains, b"\xff no name", encode(DomainRecord.of(BAD)))
    with following(redis_url, MODEL) as mirror:
        assert mirror.pods() == [GOOD.pod]
        left_out = sum(count for name, count in mirror.counters.items() if name.startswith("left_out"))
        assert left_out == len(RECORDS) + 1
        assert sum(mirror.left_out().values()) == left_out
        check(redis_url, writer, mirror)


def test_entries_of_the_log(redis_url: str, writer: RedisWriter) -> None:
    with following(redis_url, MODEL) as mirror:
        with redis.Redis.from_url(redis_url) as client:
            for raw in ENTRIES.values():
                client.xadd(KEYS.log, {LOG_FIELD: raw})
            client.xadd(KEYS.log, {b"other": b"?"})
        check(redis_url, writer, mirror)
        assert mirror.counters["left_out_malformed"] + mirror.counters["unknown_op"] == len(ENTRIES) + 1
        assert mirror.counters["loads"] == 1


@pytest.mark.parametrize("running", [False, True])
def test_joins_in_the_log(redis_url: str, writer: RedisWriter, running: bool) -> None:
    """Of a domain that was well until then: it is left out from then on."""
    writer.join(BAD)
    writer.flush()
    writer.heartbeat(BAD.id, HeartbeatRecord(BAD.epoch))
    with following(redis_url, MODEL) as mirror:
        eventually(lambda: set(mirror.pods()) == {GOOD.pod, BAD.pod})
        with redis.Redis.from_url(redis_url) as client:
            record = msgspec.msgpack.decode(RECORDS["field 14 is 99"])
            entry = msgspec.msgpack.decode(encode(LogRecord("join", "bad", BAD.epoch)))
            client.hset(KEYS.domains, "bad", RECORDS["field 14 is 99"])
            client.xadd(KEYS.log, {LOG_FIELD: msgspec.msgpack.encode([*entry[:6], record, *entry[7:]])})
        if running:
            eventually(lambda: mirror.pods() == [GOOD.pod])
        check(redis_url, writer, mirror)


def test_leases(redis_url: str, writer: RedisWriter) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for name, raw in BEATS.items():
            client.hset(KEYS.domains, name, encode(DomainRecord.of(replace(BAD, pod=PodId(name)))))
            client.set(KEYS.lease(DomainId(name)), raw)
    with following(redis_url, MODEL) as mirror:
        assert mirror.pods() == [GOOD.pod]
        check(redis_url, writer, mirror)


def test_numbers_of_last_entries(redis_url: str, writer: RedisWriter) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for name, raw in JUNK.items():
            client.hset(KEYS.seqs, name, raw)
    with following(redis_url, MODEL) as mirror:
        check(redis_url, writer, mirror)
        assert mirror.counters["gaps"] == 0


def test_names_that_a_peer_makes_up_are_bounded(redis_url: str, writer: RedisWriter) -> None:
    for number in range(2 * TIERS_MAX):
        writer.add(GOOD.id, GOOD.epoch, Tier(f"tier {number}"), keys(3))
    writer.flush()
    with following(redis_url, MODEL) as mirror:
        check(redis_url, writer, mirror)
        assert len(mirror.block_counts()) == TIERS_MAX
        with redis.Redis.from_url(redis_url) as client, client.pipeline(transaction=False) as pipeline:
            for number in range(10_000):
                record = LogRecord("verdict", "good", GOOD.epoch, router=f"r{number}", cause="?")
                pipeline.xadd(KEYS.log, {LOG_FIELD: encode(record)})
            pipeline.execute()
        eventually(lambda: mirror.counters["verdict"] == 10_000, 20)
        assert sum(map(len, mirror._verdicts.values())) <= VERDICTS_MAX
    with redis.Redis.from_url(redis_url) as client:
        client.hset(KEYS.domains, mapping={f"stranger {number}": b"?" for number in range(LEFT_OUT_MAX + 100)})
    with following(redis_url, MODEL) as new:
        assert new.counters["left_out_malformed"] == LEFT_OUT_MAX + 100
        assert len(new.left_out()) == LEFT_OUT_MAX


def test_tiers_that_an_engine_makes_up_are_bounded() -> None:
    blocks = EngineBlocks(MODEL, 4)
    for number in range(100):
        blocks.apply([BlockStored([number], None, list(range(8)), 8, medium=f"tier {number}")])
    assert len(blocks.snapshot()) <= 16
    assert blocks.skipped["many_tiers"] >= 84
