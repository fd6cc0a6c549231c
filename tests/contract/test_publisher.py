"""vLLM's own event publisher -> our publisher, as its own process -> Valkey -> mirror, through ordinary failures."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from serve_app.blocks import block_keys, namespace_key, pack_tokens
from serve_app.events.publisher import Feed, PublisherConfig
from serve_app.events.source import EventSource
from serve_app.index.mirror import Mirror
from serve_app.types import BlockKeys, ModelId, PodId, Served, Trust
from tests.helpers import eventually

MODEL = ModelId("test-model")
POD = PodId("pod-1")
SIZE = 4


class Engine:
    """The part of vLLM that sends KV events, for real; the events are written by the test."""

    def __init__(self, folder: Path) -> None:
        self.endpoint, self.replay_endpoint = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        self._publisher: ZmqEventPublisher | None = None
        self.start()

    def start(self) -> None:
        self._publisher = ZmqEventPublisher(0, self.endpoint, self.replay_endpoint)

    def stop(self) -> None:
        if self._publisher is not None:
            self._publisher.shutdown()
            self._publisher = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def reconnect(self) -> None:
        """Cut the live stream's connections; the engine and its replay buffer live on."""
        assert self._publisher is not None
        assert self._publisher._pub is not None
        self._publisher._pub.unbind(self.endpoint)
        self._publisher._pub.close(linger=0)
        self._publisher._pub = None
        replay, self._publisher._replay_endpoint = self._publisher._replay_endpoint, None
        self._publisher._socket_setup()
        self._publisher._replay_endpoint = replay

    def send(self, *events: object) -> None:
        assert self._publisher is not None
        self._publisher.publish(KVEventBatch(ts=0.0, events=list(events)))

    def store_and_wait(self, batches: int) -> None:
        """Send some batches to nobody."""
        for start in range(0, 4 * batches, 4):
            self.store(range(start, start + 4))
        assert self._publisher is not None
        eventually(lambda: len(self._publisher._buffer) >= batches)  # type: ignore[union-attr]

    def store(self, tokens: range, parent: bytes | None = None) -> None:
        hashes = [_hash(tokens[i]) for i in range(0, len(tokens), SIZE)]
        self.send(
            BlockStored(
                block_hashes=hashes,
                parent_block_hash=parent,
                token_ids=list(tokens),
                block_size=SIZE,
                lora_id=None,
                medium="GPU",
                lora_name=None,
            )
        )


def _hash(first_token: int) -> bytes:
    return b"engine-%d" % first_token


def prompt(tokens: range) -> BlockKeys:
    return block_keys(pack_tokens(tokens), SIZE, namespace_key(MODEL, SIZE))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.stop()


@pytest.fixture
def mirror(redis_url: str) -> Iterator[Mirror]:
    mirror = Mirror(redis_url, MODEL)
    mirror.start()
    assert mirror.wait_ready(5)
    yield mirror
    mirror.close()


class PublisherProcess:
    """`python -m serve_app.events`, as a replica runs it."""

    def __init__(self, engine: Engine, redis_url: str, block_size: int = SIZE, log: Path | None = None) -> None:
        config = PublisherConfig(
            redis_url=redis_url,
            model=MODEL,
            pod=POD,
            endpoint=engine.endpoint,
            replay_endpoint=engine.replay_endpoint,
            block_size=block_size,
        )
        command = [sys.executable, "-m", "serve_app.events"]
        with log.open("wb") if log else contextlib.nullcontext() as stderr:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stderr)
        self.tell(msgspec.json.encode(config))

    def tell(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def end_of_parent(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture
def publisher(engine: Engine, redis_url: str, mirror: Mirror) -> Iterator[PublisherProcess]:
    publisher = PublisherProcess(engine, redis_url)
    eventually(lambda: mirror.pods() == [POD], 15)
    yield publisher
    publisher.kill()


def matched(mirror: Mirror, tokens: range) -> int:
    return mirror.match(prompt(tokens), [POD])[POD].total_tokens


def test_stored_removed_and_cleared_blocks(engine: Engine, publisher: PublisherProcess, mirror: Mirror) -> None:
    engine.store(range(16))
    eventually(lambda: matched(mirror, range(16)) == 16)
    engine.send(BlockRemoved(block_hashes=[_hash(8)], medium="GPU"))
    eventually(lambda: matched(mirror, range(16)) == 8)
    engine.send(AllBlocksCleared())
    eventually(lambda: matched(mirror, range(16)) == 0)
    engine.store(range(8))
    eventually(lambda: matched(mirror, range(16)) == 8)


def test_a_publisher_that_starts_late_publishes_what_was_before(engine: Engine, redis_url: str, mirror: Mirror) -> None:
    for start in range(0, 400, 4):
        engine.store(range(start, start + 4), parent=_hash(start - 4) if start else None)
    late = PublisherProcess(engine, redis_url, block_size=0)  # and learns the block size from the engine
    eventually(lambda: matched(mirror, range(400)) == 400, 15)
    spec = mirror.spec()
    assert spec is not None
    assert spec.block_size == SIZE
    late.kill()


def test_load_reports_reach_the_mirror(publisher: PublisherProcess, mirror: Mirror) -> None:
    served = Served("cmpl-x-0", 900, 320, 0.01, 0.25)
    publisher.tell(msgspec.json.encode(Feed(3)))
    eventually(lambda: (load := mirror.load(POD)) is not None and load.in_flight == 3)
    publisher.tell(msgspec.json.encode(Feed(4)) + b"\n" + msgspec.json.encode(Feed(0, [served])))
    got: list[object] = []
    eventually(lambda: got.extend(mirror.served()) or got)  # type: ignore[func-returns-value]
    assert got == [(POD, (served,))]
    eventually(lambda: (load := mirror.load(POD)) is not None and load.in_flight == 0)


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
    engine.store(range(16, 24), parent=_hash(12))
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
    received = []

    def read() -> bool:
        engine.store(range(20, 24))
        received.extend(source.read(100))
        return bool(received)

    eventually(read)
    assert received[0].lost == received[0].seq >= 5
    source.close()
