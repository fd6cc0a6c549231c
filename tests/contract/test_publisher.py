"""vLLM's own event publisher -> our publisher, as its own process -> Valkey -> mirror, through ordinary failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import redis
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from serve_app.events.publisher import FEED_LATE_S, HEARTBEAT_S, Feed, PublisherConfig
from serve_app.events.source import EventSource, Received
from serve_app.index.mirror import Mirror
from serve_app.types import Progress, Served, Trust
from tests.engine import MODEL, POD, SIZE, Engine, PublisherProcess, engine_hash, matched
from tests.helpers import collected, eventually

pytestmark = pytest.mark.usefixtures("a_stop_is_short")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.stop()


@pytest.fixture
def publisher(engine: Engine, redis_url: str, mirror: Mirror) -> Iterator[PublisherProcess]:
    publisher = PublisherProcess(engine, redis_url)
    eventually(lambda: mirror.pods() == [POD], 15)
    yield publisher
    publisher.kill()


def test_stored_removed_and_cleared_blocks(engine: Engine, publisher: PublisherProcess, mirror: Mirror) -> None:
    engine.store(range(16))
    eventually(lambda: matched(mirror, range(16)) == 16)
    engine.send(BlockRemoved(block_hashes=[engine_hash(8)], medium="GPU"))
    eventually(lambda: matched(mirror, range(16)) == 8)
    engine.send(AllBlocksCleared())
    eventually(lambda: matched(mirror, range(16)) == 0)
    engine.store(range(8))
    eventually(lambda: matched(mirror, range(16)) == 8)


def test_a_publisher_that_starts_late_publishes_what_was_before(engine: Engine, redis_url: str, mirror: Mirror) -> None:
    for start in range(0, 400, 4):
        engine.store(range(start, start + 4), parent=engine_hash(start - 4) if start else None)
    late = PublisherProcess(engine, redis_url, block_size=0)  # and learns the block size from the engine
    eventually(lambda: matched(mirror, range(400)) == 400, 15)
    spec = mirror.spec()
    assert spec is not None
    assert spec.block_size == SIZE
    late.kill()


def test_a_publisher_that_hears_nothing_says_once_why(engine: Engine, redis_url: str, tmp_path: Path) -> None:
    engine.stop()
    log = tmp_path / "log"
    publisher = PublisherProcess(engine, redis_url, block_size=0, log=log)
    eventually(lambda: f"no engine at {engine.endpoint}; check --engine" in log.read_text(), 20)
    engine.start()  # and has nothing to say
    eventually(lambda: "give --block-size" in log.read_text(), 20)
    engine.store(range(16))
    eventually(lambda: "joined" in log.read_text(), 20)
    assert log.read_text().count("WARNING") == 2
    publisher.kill()


def test_a_block_size_that_was_only_heard_of_gives_way_to_the_events(
    engine: Engine, redis_url: str, mirror: Mirror
) -> None:
    def size() -> int:
        return next((domain.spec.block_size for domain, live, _ in mirror.domains() if live), 0)

    config = PublisherConfig(
        redis_url, MODEL, POD, engine.endpoint, engine.replay_endpoint, block_size=6, block_size_is_learned=True
    )
    publisher = PublisherProcess(engine, redis_url, config=config)
    eventually(lambda: size() == 6, 15)
    engine.store(range(16))
    eventually(lambda: size() == SIZE and matched(mirror, range(16)) == 16)
    publisher.kill()


def test_load_reports_reach_the_mirror(publisher: PublisherProcess, mirror: Mirror) -> None:
    served = Served("cmpl-x-0", 900, 320, 0.01, 0.25)
    publisher.tell(msgspec.json.encode(Feed(3)))
    eventually(lambda: (load := mirror.load(POD)) is not None and load.in_flight == 3)
    publisher.tell(msgspec.json.encode(Feed(4)) + b"\n" + msgspec.json.encode(Feed(0, [served])))
    got: list[object] = []
    eventually(lambda: collected(got, mirror.served))
    assert got == [(POD, (served,))]
    eventually(lambda: (load := mirror.load(POD)) is not None and load.in_flight == 0)


def test_the_room_that_is_left_in_the_cache_reaches_the_mirror(engine: Engine, redis_url: str, mirror: Mirror) -> None:
    publisher = PublisherProcess(engine, redis_url, capacity=10)
    steps: list[tuple[Callable[[], object], int]] = [
        (lambda: engine.store(range(4 * SIZE)), 5),
        (lambda: engine.remove(range(SIZE)), 6),
        (lambda: engine.send(AllBlocksCleared()), 9),
        (lambda: engine.store(range(12 * SIZE)), 0),  # no less than none
    ]
    for act, unused in steps:
        publisher.tell(msgspec.json.encode(Feed(1)))  # and then only the cache changes
        act()
        eventually(lambda: (load := mirror.load(POD)) is not None and load.unused_blocks == unused)  # noqa: B023
    publisher.kill()


def test_what_becomes_of_requests_reaches_the_mirror(publisher: PublisherProcess, mirror: Mirror) -> None:
    one, two = b"one-----", b"two-----"
    told: list[tuple[object, Progress]] = []
    for progress in (Progress(accepted=one + two), Progress(prefilled=one), Progress(ended=one + two)):
        publisher.tell(msgspec.json.encode(Feed(1, progress=progress)))

    def all_told() -> bool:
        told.extend(mirror.progress())
        return bool(told) and told[-1][1].ended == one + two

    eventually(all_told)
    assert {pod for pod, _ in told} == {POD}
    assert [b"".join(parts) for parts in zip(*(progress for _, progress in told), strict=True)] == [
        one + two,
        one,
        one + two,
    ]


def test_a_stopped_replica_reports_no_load(publisher: PublisherProcess, mirror: Mirror) -> None:
    """Its publisher is a process of its own, and lives on: what it was told last is no news any more."""
    publisher.tell(msgspec.json.encode(Feed(3)))
    eventually(lambda: mirror.load(POD) is not None)
    time.sleep(FEED_LATE_S + HEARTBEAT_S)
    last = mirror.load(POD)
    assert last is not None
    assert time.monotonic() - last.received_at_s > HEARTBEAT_S
    assert mirror.trust(POD) is Trust.EXACT  # of what it holds nothing is in doubt
    publisher.tell(msgspec.json.encode(Feed(2)))
    eventually(lambda: (load := mirror.load(POD)) is not None and load.in_flight == 2)


def test_the_adapters_of_an_engine_are_in_its_record(publisher: PublisherProcess, mirror: Mirror) -> None:
    def adapters() -> tuple[str, ...]:
        return next((domain.adapters for domain, _, _ in mirror.domains()), ())

    before = [domain.epoch for domain, _, _ in mirror.domains()]
    for said, expected in ((("a", "b"), ("a", "b")), (None, ("a", "b")), ((), ())):
        publisher.tell(msgspec.json.encode(Feed(0, adapters=said)))
        eventually(lambda: adapters() == expected)  # noqa: B023
    assert [domain.epoch for domain, _, _ in mirror.domains()] == before  # the same life: its blocks are still there


def test_an_idle_publishers_heartbeat_goes_on_changing(publisher: PublisherProcess, mirror: Mirror) -> None:
    """By that a mirror tells a late one from one that has nothing new to say."""

    def beat() -> int:
        return max((heartbeat.beat for _, _, heartbeat in mirror.domains() if heartbeat is not None), default=0)

    eventually(beat)
    first = beat()
    eventually(lambda: beat() >= first + 2, 20)
    eventually(lambda: mirror.trust(POD) is Trust.EXACT, 20)


def test_a_restarted_engine_holds_nothing_of_its_former_life(
    engine: Engine, publisher: PublisherProcess, mirror: Mirror
) -> None:
    engine.store(range(16))
    engine.store(range(100, 108))
    eventually(lambda: matched(mirror, range(16)) == 16)
    engine.restart()
    engine.store(range(100, 104))
    eventually(lambda: matched(mirror, range(16)) == 0 and matched(mirror, range(100, 108)) == 4)


def test_a_restarted_engine_may_have_another_block_size(engine: Engine, redis_url: str, mirror: Mirror) -> None:
    publisher = PublisherProcess(engine, redis_url, block_size=0)
    engine.store(range(8))
    eventually(lambda: matched(mirror, range(8)) == 8)
    engine.restart()
    other = range(8 * SIZE)
    engine.send(
        BlockStored(
            block_hashes=[engine_hash(i) for i in range(4)],
            parent_block_hash=None,
            token_ids=list(other),
            block_size=2 * SIZE,
            lora_id=None,
            medium="GPU",
            lora_name=None,
        )
    )
    eventually(lambda: (spec := mirror.spec()) is not None and spec.block_size == 2 * SIZE)
    assert mirror.block_counts() == {"gpu": 4}
    publisher.kill()


def test_a_restart_that_hides_behind_higher_numbers_is_noticed(
    engine: Engine, publisher: PublisherProcess, mirror: Mirror
) -> None:
    engine.store(range(16))
    eventually(lambda: matched(mirror, range(16)) == 16)
    engine.stop()
    eventually(lambda: mirror.pods() == [])  # an engine that nobody hears is in no mirror
    engine.start()
    for start in range(100, 140, 4):
        engine.store(range(start, start + 4))
    eventually(lambda: matched(mirror, range(136, 140)) == 4, 10)
    assert matched(mirror, range(16)) == 0


def test_a_lost_connection_to_a_living_engine_costs_nothing(
    engine: Engine, publisher: PublisherProcess, mirror: Mirror
) -> None:
    engine.store(range(16))
    eventually(lambda: matched(mirror, range(16)) == 16)
    engine.reconnect()
    eventually(lambda: mirror.pods() == [])
    eventually(lambda: matched(mirror, range(16)) == 16, 10)


def test_the_end_of_the_replica_empties_every_mirror_at_once(
    engine: Engine, publisher: PublisherProcess, mirror: Mirror, redis_url: str
) -> None:
    engine.store(range(16))
    eventually(lambda: matched(mirror, range(16)) == 16)
    publisher.end_of_parent()
    eventually(lambda: mirror.pods() == [])
    with redis.Redis.from_url(redis_url) as client:
        assert set(client.keys()) == {f"kv:{{{MODEL}}}:log".encode()}  # nothing is left behind


def test_a_killed_publisher_is_gone_from_every_mirror_within_five_seconds(
    engine: Engine, publisher: PublisherProcess, mirror: Mirror, redis_url: str
) -> None:
    engine.store(range(16))
    eventually(lambda: matched(mirror, range(16)) == 16)
    publisher.kill()
    eventually(lambda: matched(mirror, range(16)) == 0, 5)
    late = Mirror(redis_url, MODEL)
    late.start()
    assert late.wait_ready(5)
    assert late.pods() == []
    late.close()
    again = PublisherProcess(engine, redis_url)  # replayed by the engine, under a new epoch
    eventually(lambda: matched(mirror, range(16)) == 16, 15)
    again.kill()


def test_everything_is_published_again_after_flushall(
    engine: Engine, publisher: PublisherProcess, mirror: Mirror, redis_url: str
) -> None:
    engine.store(range(16))
    eventually(lambda: matched(mirror, range(16)) == 16)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        eventually(lambda: client.exists(f"kv:{{{MODEL}}}:domains"))
    engine.store(range(16, 24), parent=engine_hash(12))
    eventually(lambda: matched(mirror, range(24)) == 24, 10)


def test_a_gap_is_replayed_in_order(engine: Engine) -> None:
    """A subscriber that joins late misses batches of the live stream; the replay socket has them."""
    engine.store_and_wait(5)
    source = EventSource(engine.endpoint, engine.replay_endpoint)
    seen: list[int] = []

    def read() -> bool:
        engine.store(range(20, 24))
        seen.extend(received.seq for received in source.read(100))
        return len(seen) > 8

    eventually(read)
    assert seen == list(range(len(seen)))
    source.close()


def test_without_a_replay_socket_the_loss_is_counted(engine: Engine) -> None:
    engine.store_and_wait(5)
    source = EventSource(engine.endpoint)
    received: list[Received] = []

    def read() -> bool:
        engine.store(range(20, 24))
        received.extend(source.read(100))
        return bool(received)

    eventually(read)
    assert received[0].lost == received[0].seq >= 5
    source.close()


def test_more_blocks_than_the_engine_has_are_never_exact(engine: Engine, redis_url: str, mirror: Mirror) -> None:
    publisher = PublisherProcess(engine, redis_url, capacity=5)
    engine.store(range(4 * SIZE))
    eventually(lambda: matched(mirror, range(4 * SIZE)) == 4 * SIZE, 15)
    assert mirror.trust(POD) is Trust.EXACT
    engine.store(range(100, 100 + 2 * SIZE))  # and nothing was removed
    eventually(lambda: mirror.trust(POD) is Trust.DEGRADED)
    publisher.kill()
