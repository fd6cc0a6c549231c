"""Events that never reached the publisher, and processes of the write path that stop, die and come back."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import zmq

from serve_app.events.source import REPLAY_TIMEOUT_S, EventSource, Received
from serve_app.index.mirror import Mirror
from serve_app.ports import free_port
from serve_app.types import Trust
from tests.engine import POD, SIZE, Engine, PublisherProcess, engine_hash, matched
from tests.helpers import collected, eventually
from tests.proxy import HOST, Proxy

pytestmark = pytest.mark.usefixtures("a_stop_is_short")

CAPACITY = 600  # blocks
MUCH = 2000  # tokens of a batch that fills the sockets' buffers soon
HWM = 4
FEW_STEPS = 4
FLOOD = 200  # batches; the kernel's socket buffers hold some tens


def flood(engine: Engine) -> None:
    """Store and remove one prompt again and again: at the end it is not there."""
    for _ in range(FLOOD // 2):
        engine.store(range(50_000, 50_000 + MUCH))
        engine.remove(range(50_000, 50_000 + MUCH))
    eventually(engine.sent)


def with_publisher(engine: Engine, redis_url: str, mirror: Mirror) -> PublisherProcess:
    publisher = PublisherProcess(engine, redis_url, capacity=CAPACITY)
    eventually(lambda: mirror.pods() == [POD], 15)
    return publisher


def test_a_gap_that_the_engine_still_has_is_replayed_in_order_and_once(
    tmp_path: Path, redis_url: str, mirror: Mirror
) -> None:
    engine = Engine(tmp_path, hwm=HWM)
    publisher = with_publisher(engine, redis_url, mirror)
    engine.store(range(16))
    eventually(lambda: matched(mirror, range(16)) == 16)
    publisher.send(signal.SIGSTOP)
    flood(engine)
    engine.store(range(16, 32), parent=engine_hash(12))
    engine.remove(range(28, 32))
    publisher.send(signal.SIGCONT)
    eventually(lambda: matched(mirror, range(32)) == 28, 20)
    assert matched(mirror, range(50_000, 50_004)) == 0
    engine.remove(range(28))  # each once: had anything been applied twice, a copy would be left
    eventually(lambda: mirror.block_counts() == {"gpu": 0} or not sum(mirror.block_counts().values()))
    eventually(lambda: mirror.domains()[0][2] is not None)  # a mirror looks at heartbeats once per second
    ((_, _, heartbeat),) = mirror.domains()
    assert heartbeat is not None
    assert heartbeat.events_lost == 0
    eventually(lambda: mirror.trust(POD) is Trust.EXACT)
    publisher.kill()
    engine.stop()


def test_a_gap_beyond_the_buffer_is_said_and_made_up_for(tmp_path: Path, redis_url: str, mirror: Mirror) -> None:
    engine = Engine(tmp_path, buffer_steps=FEW_STEPS, hwm=HWM)
    publisher = with_publisher(engine, redis_url, mirror)
    phantom, hot = range(16), range(100, 132)
    engine.store(phantom)
    engine.store(hot)
    eventually(lambda: matched(mirror, hot) == 32)
    publisher.send(signal.SIGSTOP)
    flood(engine)
    engine.remove(phantom)  # nobody hears
    for start in range(1000, 1000 + 4 * FLOOD * SIZE, SIZE):  # and what follows takes its place in the buffer
        engine.store(range(start, start + SIZE))
    eventually(engine.sent)
    publisher.send(signal.SIGCONT)
    engine.store(range(132, 136), parent=engine_hash(128))  # a request that needed the hot prompt
    eventually(lambda: matched(mirror, range(100, 136)) == 36, 20)
    eventually(lambda: mirror.trust(POD) is Trust.DEGRADED)
    engine.store(range(20_000, 20_000 + CAPACITY * SIZE))
    eventually(lambda: mirror.trust(POD) is Trust.EXACT)
    assert matched(mirror, phantom) == 0
    assert matched(mirror, range(100, 136)) == 36
    publisher.kill()
    engine.stop()


def test_a_publisher_that_starts_after_the_buffer_is_degraded_until_the_cache_has_turned_over(
    tmp_path: Path, redis_url: str, mirror: Mirror
) -> None:
    engine = Engine(tmp_path, buffer_steps=FEW_STEPS)
    engine.store_and_wait(FEW_STEPS)
    engine.store(range(400, 416))
    publisher = with_publisher(engine, redis_url, mirror)
    eventually(lambda: matched(mirror, range(400, 416)) == 16)
    eventually(lambda: mirror.trust(POD) is Trust.DEGRADED)
    engine.store(range(20_000, 20_000 + CAPACITY * SIZE))
    eventually(lambda: mirror.trust(POD) is Trust.EXACT)
    publisher.kill()
    engine.stop()


def test_a_replay_that_is_late_is_asked_for_again(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.stop()
    port = free_port()
    engine.replay_endpoint = f"tcp://{HOST}:{port}"
    engine.start()
    network = Proxy(port)
    source = EventSource(engine.endpoint, f"tcp://{HOST}:{network.port}")
    received: list[Received] = []

    def hears(count: int) -> bool:
        received.extend(source.read(100))
        return len(received) == count

    engine.store(range(16))
    eventually(lambda: hears(1))
    network.silence()
    source.socket.unsubscribe("")
    engine.store(range(16, 20))
    eventually(engine.sent)
    time.sleep(0.5)  # nobody takes that batch
    source.socket.subscribe("")
    time.sleep(0.5)
    for start in range(20, 40, 4):
        engine.store(range(start, start + 4))
    eventually(engine.sent)
    time.sleep(0.5)
    began_s = time.monotonic()
    assert hears(1)
    assert not source.caught_up
    assert time.monotonic() - began_s < 2 * REPLAY_TIMEOUT_S  # it is not asked once for every batch that waits
    network.heal()
    eventually(lambda: hears(7), 15)
    assert [(one.seq, one.lost, one.restarted) for one in received] == [(i, 0, False) for i in range(7)]
    source.close()
    network.close()
    engine.stop()


def test_a_long_replay_to_a_slow_reader_has_no_holes(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    for _ in range(10_000):
        engine.store(range(240))
    eventually(engine.sent, 20)
    source = EventSource(engine.endpoint, engine.replay_endpoint)
    seen: list[tuple[int, int]] = []

    def read() -> bool:
        for received in source.read(100):
            seen.append((received.seq, received.lost))
            until_s = time.perf_counter() + 30e-6  # about what applying it takes
            while time.perf_counter() < until_s:
                pass
        return len(seen) >= 10_000

    eventually(read, 30)
    assert seen == [(i, 0) for i in range(10_000)]
    source.close()
    engine.stop()


def test_what_was_unread_of_a_former_life_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    source = EventSource(engine.endpoint, engine.replay_endpoint)
    received: list[Received] = []

    def hears(count: int) -> bool:
        received.extend(source.read(100))
        return len(received) >= count

    engine.store(range(4))
    eventually(lambda: hears(1))
    engine.store(range(4, 8))
    engine.store(range(8, 12))
    eventually(lambda: bool(source.socket.poll(0)))
    time.sleep(0.3)  # both have arrived, and nobody looks
    engine.restart()
    engine.store(range(100, 104))
    eventually(lambda: hears(3), 10)
    assert [(one.seq, one.restarted) for one in received] == [(0, False), (-1, True), (0, False)]
    assert received[2].payload != received[0].payload
    source.close()
    engine.stop()


def test_an_older_engine_replays_without_the_topic(tmp_path: Path) -> None:
    endpoint, replay_endpoint = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.PUB) as events, context.socket(zmq.ROUTER) as replay:
        events.bind(endpoint)
        replay.bind(replay_endpoint)
        source = EventSource(endpoint, replay_endpoint)

        def answer() -> None:
            who, _, start = replay.recv_multipart()
            assert int.from_bytes(start, "big") == 0
            for seq, payload in ((0, b"first"), (1, b"second"), (-1, b"")):
                replay.send_multipart([who, b"", seq.to_bytes(8, "big", signed=True), payload])

        engine = threading.Thread(target=answer)
        engine.start()
        received: list[Received] = []
        eventually(lambda: len(collected(received, lambda: source.read(10))) == 2)
        engine.join()
        assert [(one.seq, one.payload) for one in received] == [(0, b"first"), (1, b"second")]
        source.close()


@pytest.mark.parametrize("who", ["publisher", "engine", "both"])
def test_restarts(who: str, tmp_path: Path, redis_url: str, mirror: Mirror) -> None:
    """What the mirror holds afterwards is what the living engine holds."""
    engine = Engine(tmp_path)
    publisher = with_publisher(engine, redis_url, mirror)
    engine.store(range(16))
    engine.store(range(100, 116))
    engine.remove(range(112, 116))
    eventually(lambda: matched(mirror, range(100, 116)) == 12 and matched(mirror, range(16)) == 16)
    if who != "engine":
        publisher.kill()
    if who != "publisher":
        engine.restart()
    engine.store(range(200, 208))
    if who != "engine":
        publisher = PublisherProcess(engine, redis_url, capacity=CAPACITY)
    kept = who == "publisher"
    eventually(
        lambda: (
            matched(mirror, range(200, 208)) == 8
            and matched(mirror, range(16)) == 16 * kept
            and matched(mirror, range(100, 116)) == 12 * kept
        ),
        15,
    )
    eventually(lambda: mirror.trust(POD) is Trust.EXACT)
    publisher.kill()
    engine.stop()


def test_a_lost_node_is_in_no_mirror_within_five_seconds_and_exact_when_it_is_back(
    tmp_path: Path, redis_url: str, mirror: Mirror
) -> None:
    engine = Engine(tmp_path)
    publisher = with_publisher(engine, redis_url, mirror)
    engine.store(range(16))
    eventually(lambda: matched(mirror, range(16)) == 16)
    publisher.send(signal.SIGSTOP)
    eventually(lambda: matched(mirror, range(16)) == 0, 5)
    assert mirror.pods() == []
    engine.store(range(16, 24), parent=engine_hash(12))
    publisher.send(signal.SIGCONT)
    eventually(lambda: matched(mirror, range(24)) == 24, 10)
    eventually(lambda: mirror.trust(POD) is Trust.EXACT)
    publisher.kill()
    engine.stop()


@pytest.mark.parametrize("number", [b"", b"\x00" * 16, b"\xff" * 8, b"\x80" + b"\x00" * 7])
def test_a_sequence_number_that_cannot_be_one_is_skipped(tmp_path: Path, number: bytes) -> None:
    endpoint, replay_endpoint = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.PUB) as events, context.socket(zmq.ROUTER) as replay:
        events.bind(endpoint)
        replay.bind(replay_endpoint)
        source = EventSource(endpoint)
        received: list[Received] = []

        def hears() -> bool:
            events.send_multipart((b"", number, b"bad"))
            events.send_multipart((b"", len(received).to_bytes(8, "big"), b"good"))
            received.extend(source.read(10))
            return len(received) > 2

        eventually(hears)
        assert {one.payload for one in received if one.payload is not None} == {b"good"}
        source.close()
