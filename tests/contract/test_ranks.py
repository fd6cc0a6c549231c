"""Data parallel ranks on the write path: vLLM's own event sockets of each rank -> publishers -> Valkey -> mirror."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest
import zmq

from serve_app.deployments.event_sockets import EventSockets
from serve_app.events.endpoint import endpoint_of_rank
from serve_app.index.mirror import Mirror
from serve_app.types import PodId
from tests.engine import MODEL, SIZE, Engine, prompt
from tests.helpers import eventually

START_S = 15.0  # for two Python processes on a busy machine
REPLICA = "replica-1"
FIRST, SECOND = range(8 * SIZE), range(1000, 1000 + 8 * SIZE)


class Ranks:
    """The event sockets of one engine's ranks."""

    def __init__(self, ranks: range) -> None:
        self.sockets = EventSockets(ranks)
        self.engines = {rank: Engine(config=self.sockets.kv_events_config(), rank=rank) for rank in ranks}

    def stop(self) -> None:
        for engine in self.engines.values():
            engine.stop()
        self.sockets.close()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(range(2))
    yield ranks
    ranks.stop()


Publish = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def publish(redis_url: str) -> Iterator[Publish]:
    """`kvcache publish` with options; what still runs is ended."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "serve_app.cli", "publish", "--redis", redis_url, "--model", MODEL]
        process = subprocess.Popen([*command, "--pod", REPLICA, "--block-size", str(SIZE), *options])
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()
            process.wait(10)


def of_rank_0(ranks: Ranks) -> tuple[str, ...]:
    """As a user gives them: the ports of `--kv-events-config`, which are rank 0's."""
    events, replay = ranks.sockets.of_rank(0)
    return "--engine", events, "--replay", replay


def held(mirror: Mirror, tokens: range) -> dict[PodId, int]:
    """Tokens by pod, of those that hold any."""
    return {pod: match.total_tokens for pod, match in mirror.match(prompt(tokens)).items() if match.total_tokens}


def test_each_rank_is_a_pod_of_its_own(ranks: Ranks, publish: Publish, mirror: Mirror) -> None:
    process = publish(*of_rank_0(ranks), "--data-parallel-size", "2")
    ranks.engines[0].store(FIRST)
    ranks.engines[1].store(SECOND)
    eventually(lambda: held(mirror, SECOND) and held(mirror, FIRST), START_S)
    assert held(mirror, FIRST) == {"replica-1#0": len(FIRST)}
    assert held(mirror, SECOND) == {"replica-1#1": len(SECOND)}
    records = {domain.pod: (domain.replica, domain.rank) for domain, _, _ in mirror.domains()}
    assert records == {"replica-1#0": (REPLICA, 0), "replica-1#1": (REPLICA, 1)}

    ranks.engines[1].restart()  # a new life of one rank is none of the other's
    eventually(lambda: not held(mirror, SECOND), START_S)
    assert held(mirror, FIRST) == {"replica-1#0": len(FIRST)}

    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    eventually(lambda: mirror.pods() == [])


def test_the_publishers_of_an_engine_end_together(ranks: Ranks, publish: Publish, mirror: Mirror) -> None:
    process = publish(*of_rank_0(ranks), "--data-parallel-size", "2")
    eventually(lambda: len(mirror.pods()) == 2, START_S)
    child, *_ = psutil.Process(process.pid).children()
    child.kill()
    assert process.wait(10) != 0
    eventually(lambda: mirror.pods() == [], 5)  # one has left, the other's lease ends


def test_one_of_the_ranks(ranks: Ranks, publish: Publish, mirror: Mirror) -> None:
    publish(*of_rank_0(ranks), "--data-parallel-size", "2", "--rank", "1")
    ranks.engines[0].store(FIRST)
    ranks.engines[1].store(SECOND)
    eventually(lambda: held(mirror, SECOND) == {"replica-1#1": len(SECOND)}, START_S)
    assert mirror.pods() == ["replica-1#1"]


def test_a_member_of_a_gang_has_the_sockets_of_its_rank_only() -> None:
    member = Ranks(range(3, 4))
    sub: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    sub.subscribe("")
    sub.connect(member.sockets.of_rank(3).events)
    try:

        def arrives() -> bool:
            member.engines[3].store(FIRST)  # until the subscription is there, nobody gets it
            return bool(sub.poll(100))

        eventually(arrives)
    finally:
        sub.close(linger=0)
        member.stop()


def test_events_are_for_this_node_only(ranks: Ranks) -> None:
    ports = {int(endpoint.rpartition(":")[2]) for rank in (0, 1) for endpoint in ranks.sockets.of_rank(rank)}
    assert len(ports) == 4
    listening = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert {(address.ip, address.port) for address in listening if address.port in ports} == {
        ("127.0.0.1", port) for port in ports
    }


def test_a_port_that_is_taken_meanwhile_ends_the_engine_and_the_next_replica_has_others() -> None:
    first = EventSockets(range(2))
    config = first.kv_events_config()
    other: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
    other.bind(endpoint_of_rank(config["endpoint"], 1))
    try:
        with pytest.raises(zmq.ZMQError, match="in use"):  # and not a rank that nobody hears
            Engine(config=config, rank=1)
        second = Ranks(range(2))
        taken = first.of_rank(1).events
        assert taken not in {endpoint for rank in (0, 1) for endpoint in second.sockets.of_rank(rank)}
        second.stop()
    finally:
        other.close(linger=0)


def test_a_single_engine_keeps_its_unix_sockets() -> None:
    sockets = EventSockets(None)
    engine = Engine(config=sockets.kv_events_config())
    assert sockets.of_rank(None).events == sockets.kv_events_config()["endpoint"]
    assert sockets.of_rank(None).events.startswith("ipc://")
    engine.stop()
    sockets.close()
