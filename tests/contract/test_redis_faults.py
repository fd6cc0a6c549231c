"""What Redis can do to us: vLLM's publisher -> our publisher -> proxy -> Valkey -> proxy -> mirror, all of them real.

After every fault a mirror that was there all the time and one that has only just started hold exactly what the engine
holds, and nobody was started again by hand.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from vllm.distributed.kv_events import BlockRemoved

from serve_app.events.publisher import RETRY_S, Publisher, PublisherConfig
from serve_app.index import mirror as mirror_module
from serve_app.index import redis_writer as writer_module
from serve_app.index.keyspace import LOG_FIELD, HeartbeatRecord, Keyspace, LogRecord, encode
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.index.router_log import RouterLog
from serve_app.types import GPU, BlockKeys, DomainId, Epoch, PodId, Trust
from tests.engine import MODEL, POD, SIZE, Engine, PublisherProcess, engine_hash, prompt
from tests.helpers import eventually, keys, pod
from tests.proxy import Proxy
from tests.servers import HOST, Server, free_port, sentinel_for

KEYS = Keyspace(MODEL)
HEAL_S = 30  # far more than is needed; the waits end as soon as it is so


class Fleet:
    """One engine, its publisher and a mirror. Publisher and mirror have a network of their own each."""

    def __init__(self, folder: Path, target: int, publisher_url: str = "", mirror_url: str = "") -> None:
        (folder / "engine").mkdir()
        self.engine = Engine(folder / "engine")
        self.to_publisher, self.to_mirror = Proxy(target), Proxy(target)
        self._mirror_url = mirror_url or self.to_mirror.url
        self.log = folder / "publisher.log"
        self.publisher = PublisherProcess(self.engine, publisher_url or self.to_publisher.url, log=self.log)
        self.mirror = self.start_mirror()
        self._held: set[int] = set()
        self._dropped: set[int] = set()

    def start_mirror(self) -> Mirror:
        mirror = Mirror(self._mirror_url, MODEL)
        mirror.start()
        return mirror

    def close(self) -> None:
        for closable in (self.to_publisher, self.to_mirror):
            closable.heal()
        self.mirror.close()
        self.publisher.kill()
        self.engine.stop()
        self.to_publisher.close()
        self.to_mirror.close()

    def store(self, *blocks: int) -> None:
        for block in blocks:
            self.engine.store(_tokens(block))
        self._held |= set(blocks)
        self._dropped -= set(blocks)

    def remove(self, *blocks: int) -> None:
        self.engine.send(BlockRemoved(block_hashes=[engine_hash(_tokens(block)[0]) for block in blocks], medium="GPU"))
        self._held -= set(blocks)
        self._dropped |= set(blocks)

    def is_exact(self, mirror: Mirror) -> bool:
        """The mirror has every block that the engine holds, and no other."""
        return (
            mirror.pods() == [POD]
            and _hits(mirror, self._held) == len(self._held)
            and _hits(mirror, self._dropped) == 0
            and mirror.block_counts().get(GPU, 0) == len(self._held)
        )

    def settle(self) -> None:
        eventually(lambda: self.is_exact(self.mirror), HEAL_S)
        late = self.start_mirror()
        try:
            eventually(lambda: self.is_exact(late), HEAL_S)
        finally:
            late.close()

    def serves_as_before(self, held: int) -> bool:
        return self.mirror.pods() == [POD] and _hits(self.mirror, range(held)) == held

    def cpu_s(self) -> float:
        times = psutil.Process(self.publisher.process.pid).cpu_times()
        return float(times.user + times.system)


def _tokens(block: int) -> range:
    return range(block * SIZE, (block + 1) * SIZE)


def _hits(mirror: Mirror, blocks: set[int] | range) -> int:
    together: BlockKeys = b"".join(prompt(_tokens(block)) for block in blocks)
    return mirror.match(together, [POD], count_hits=True)[POD].hit_blocks


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "valkey")
    yield server
    server.kill()


@pytest.fixture
def fleet(tmp_path: Path, server: Server) -> Iterator[Fleet]:
    """With 20 blocks in it, settled."""
    fleet = Fleet(tmp_path, server.port)
    fleet.store(*range(20))
    fleet.settle()
    yield fleet
    fleet.close()


def test_a_server_killed_and_started_empty(fleet: Fleet, server: Server) -> None:
    server.kill()
    fleet.store(20, 21)
    fleet.remove(3, 4)
    eventually(lambda: fleet.mirror.stale_for_s() > 2)
    assert fleet.serves_as_before(20)
    server.start()
    fleet.settle()
    assert fleet.mirror.stale_for_s() < 2


def test_a_server_that_comes_back_with_older_data(fleet: Fleet, server: Server) -> None:
    """Nothing is being published when it happens, so nobody's command fails: what was lost must show by itself."""
    with server.client() as client:
        client.save()
    fleet.store(20, 21)
    fleet.remove(3, 4)
    fleet.settle()
    server.kill()
    server.start()
    with server.client() as client:
        assert client.exists(KEYS.domains)  # it is the older data
    fleet.settle()


def test_a_server_that_hangs(fleet: Fleet, server: Server) -> None:
    server.send(signal.SIGSTOP)
    fleet.store(20, 21)
    fleet.remove(3, 4)
    used_s, errors, started_s = fleet.cpu_s(), fleet.mirror.counters["errors"], time.monotonic()
    eventually(lambda: fleet.mirror.stale_for_s() > 7, 20)  # longer than an answer is waited for
    took_s = time.monotonic() - started_s
    assert fleet.serves_as_before(20)
    assert fleet.cpu_s() - used_s < took_s / 2  # nobody loops hot
    assert fleet.mirror.counters["errors"] - errors <= took_s / mirror_module.RETRY_S + 1
    server.send(signal.SIGCONT)
    fleet.settle()


def test_flushall_while_nothing_happens(fleet: Fleet, server: Server) -> None:
    with server.client() as client:
        client.flushall()
    fleet.settle()


def test_a_set_that_was_evicted_or_deleted_is_published_again(fleet: Fleet, server: Server) -> None:
    """Mirrors that follow do not miss it; one that starts later would."""
    with server.client() as client:
        (name,) = client.scan_iter(f"{KEYS.log.removesuffix('log')}blocks:*")
        client.unlink(name)
        eventually(lambda: len(list(client.scan_iter(f"{KEYS.log.removesuffix('log')}blocks:*"))) == 1, HEAL_S)
    fleet.settle()


def test_a_network_that_is_cut(fleet: Fleet) -> None:
    for proxy in (fleet.to_publisher, fleet.to_mirror):
        proxy.cut()
    fleet.store(20, 21)
    fleet.remove(3, 4)
    eventually(lambda: fleet.mirror.stale_for_s() > 2)
    assert fleet.serves_as_before(20)
    for proxy in (fleet.to_publisher, fleet.to_mirror):
        proxy.heal()
    fleet.settle()


def test_a_network_that_drops_everything(fleet: Fleet) -> None:
    for proxy in (fleet.to_publisher, fleet.to_mirror):
        proxy.silence()
    fleet.store(20, 21)
    fleet.remove(3, 4)
    eventually(lambda: fleet.mirror.stale_for_s() > 7, 20)
    assert fleet.serves_as_before(20)
    for proxy in (fleet.to_publisher, fleet.to_mirror):
        proxy.heal()
    fleet.settle()


def test_a_publisher_that_is_cut_off_stops_counting_and_comes_back(fleet: Fleet) -> None:
    fleet.to_publisher.silence()
    eventually(lambda: fleet.mirror.pods() == [], 10)  # the lease: nobody knows what the engine holds by now
    fleet.remove(3)
    fleet.to_publisher.heal()
    fleet.settle()


def test_a_publisher_that_hangs_stops_counting_and_goes_on(fleet: Fleet) -> None:
    fleet.publisher.process.send_signal(signal.SIGSTOP)
    fleet.remove(3)
    fleet.store(20)
    eventually(lambda: fleet.mirror.pods() == [], 10)
    fleet.publisher.process.send_signal(signal.SIGCONT)
    fleet.settle()


def test_answers_that_take_a_second(fleet: Fleet) -> None:
    """Leases hold, changes arrive. They arrive late, so none is called exact."""
    fleet.to_publisher.delay_s = fleet.to_mirror.delay_s = 1.2
    fleet.store(20, 21)
    fleet.remove(3, 4)
    eventually(lambda: fleet.is_exact(fleet.mirror), HEAL_S)
    watched_until_s = time.monotonic() + 6
    while time.monotonic() < watched_until_s:
        assert fleet.mirror.pods() == [POD]
        assert fleet.mirror.stale_for_s() < 8
        assert fleet.mirror.trust(POD) is Trust.STALE
        time.sleep(0.05)
    fleet.to_publisher.delay_s = fleet.to_mirror.delay_s = 0.0
    fleet.store(22)
    fleet.settle()
    eventually(lambda: fleet.mirror.trust(POD) is Trust.EXACT, HEAL_S)
    assert fleet.mirror.counters["gaps"] == 0


def test_a_full_redis(fleet: Fleet, server: Server) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        fleet.store(20, 21)
        fleet.remove(3, 4)
        log = said(fleet, "maxmemory", attempts=3)
        assert log.count("Redis is at its maxmemory") == 1
        assert fleet.mirror.stale_for_s() < 2  # it can be read
        client.config_set("maxmemory", 0)
    fleet.settle()


@pytest.mark.parametrize("key", [KEYS.log, KEYS.domains, KEYS.seqs])
def test_a_wrong_type_under_our_key(fleet: Fleet, server: Server, key: str, caplog: pytest.LogCaptureFixture) -> None:
    with server.client() as client:
        client.set(key, "somebody else's")
        fleet.store(20, 21)
        fleet.remove(3, 4)
        log = said(fleet, "WRONGTYPE", attempts=3)
        assert log.count("delete the one that is not") == 1
        assert key in log
        if key == KEYS.log:
            eventually(lambda: fleet.mirror.stale_for_s() > 2)
            assert _warnings(caplog, "WRONGTYPE") == 1
        client.delete(key)  # as the log line says
    fleet.settle()


def test_a_wrong_type_where_the_blocks_are_heals_by_itself(fleet: Fleet, server: Server) -> None:
    with server.client() as client:
        (name,) = client.scan_iter(f"{KEYS.log.removesuffix('log')}blocks:*")
        client.set(name, "somebody else's")
    fleet.settle()
    with server.client() as client:
        client.set(f"{KEYS.lease(DomainId(POD))}", "somebody else's")
    fleet.store(20)
    fleet.settle()


def test_a_right_that_is_missing(tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with server.client() as client:
        for user in ("writer", "reader"):
            client.execute_command("ACL", "SETUSER", user, "on", ">s3cret", "~*", "+@all")
        fleet = Fleet(
            tmp_path,
            server.port,
            f"redis://writer:s3cret@{HOST}:{server.port}",
            f"redis://reader:s3cret@{HOST}:{server.port}",
        )
        with contextlib.closing(fleet):
            fleet.store(*range(20))
            fleet.settle()
            client.execute_command("ACL", "SETUSER", "writer", "-xadd")
            client.execute_command("ACL", "SETUSER", "reader", "-xread")
            fleet.store(20, 21)
            fleet.remove(3, 4)
            log = said(fleet, "xadd", attempts=3)
            assert log.count("give this user the rights that cluster/redis/users.acl lists") == 1
            eventually(lambda: fleet.mirror.stale_for_s() > 2)
            assert _warnings(caplog, "users.acl") == 1
            client.execute_command("ACL", "SETUSER", "writer", "+xadd")
            client.execute_command("ACL", "SETUSER", "reader", "+xread")
            fleet.settle()
        assert "s3cret" not in log + caplog.text


def test_a_failover_that_lost_the_last_changes(tmp_path: Path) -> None:
    """The replica has not got them when the primary dies, and the publisher has nothing new to say."""
    with contextlib.ExitStack() as stack:
        primary = Server(tmp_path / "primary", "--repl-diskless-sync-delay", "0")
        stack.callback(primary.kill)
        replica = Server(
            tmp_path / "replica", "--replicaof", f"{HOST} {primary.port}", "--repl-diskless-sync-delay", "0"
        )
        stack.callback(replica.kill)
        stack.callback(lambda: replica.send(signal.SIGCONT))
        with replica.client() as client:
            eventually(lambda: client.info("replication")["master_link_status"] == "up", 20)
        watcher = sentinel_for(primary, tmp_path / "sentinel")
        stack.callback(watcher.kill)
        with watcher.client() as client:
            eventually(lambda: client.execute_command("SENTINEL", "REPLICAS", "index"), 20)
        url = f"redis+sentinel://{HOST}:{watcher.port}/index"
        fleet = Fleet(tmp_path, primary.port, url, url)
        stack.callback(fleet.close)
        fleet.store(*range(20))
        fleet.settle()
        with primary.client() as client:
            assert client.wait(1, 10_000) == 1
        replica.send(signal.SIGSTOP)
        fleet.store(20, 21)
        fleet.remove(3, 4)
        fleet.settle()
        primary.kill()
        replica.send(signal.SIGCONT)
        with replica.client() as client:
            eventually(lambda: client.info("replication")["role"] == "master", HEAL_S)
        fleet.settle()
        primary.start()  # it becomes a replica of the other
        fleet.store(22)
        fleet.settle()


def test_an_address_that_leads_to_another_primary(fleet: Fleet, server: Server, tmp_path: Path) -> None:
    """A virtual IP, or a Service of Kubernetes: old connections still end at the old primary, which still answers."""
    primary, to_router = Server(tmp_path / "new"), Proxy(server.port)
    router = RouterLog(to_router.url, MODEL, "router")
    router.start()
    with server.client() as old, primary.client() as new, contextlib.closing(to_router), contextlib.closing(router):
        eventually(lambda: old.exists(KEYS.routers))
        old.execute_command("REPLICAOF", HOST, free_port())  # and it knows of no other yet
        eventually(lambda: fleet.mirror.pods() == [], 10)  # nobody can renew a lease there
        for proxy in (fleet.to_publisher, fleet.to_mirror, to_router):
            proxy.target = primary.port
        fleet.store(20, 21)
        fleet.remove(3, 4)
        fleet.settle()
        eventually(lambda: new.exists(KEYS.routers))
    primary.kill()


def test_a_log_that_was_trimmed_under_a_slow_mirror(
    fleet: Fleet, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "LOG_MAX_ENTRIES", 20_000)
    fleet.to_mirror.silence()
    other = RedisWriter(server.url, MODEL, lease_ttl_s=60)
    other.join(pod("other"))
    for number in range(11_000):  # an entry each: kinds that alternate are not merged
        other.add(DomainId("other"), Epoch(1), GPU, keys(number))
        other.remove(DomainId("other"), Epoch(1), GPU, keys(number))
    other.add(DomainId("other"), Epoch(1), GPU, keys(1))
    other.flush()
    assert other.heartbeat(DomainId("other"), HeartbeatRecord(1))
    with server.client() as client:
        assert client.xlen(KEYS.log) < 22_000
    loads = fleet.mirror.counters["loads"]
    fleet.to_mirror.heal()
    eventually(lambda: fleet.mirror.counters["loads"] == loads + 1, HEAL_S)
    assert fleet.mirror.counters["gaps"] == 1
    eventually(lambda: set(fleet.mirror.pods()) == {POD, PodId("other")})
    other.leave(DomainId("other"), Epoch(1))
    other.flush()
    other.close()
    fleet.settle()


def test_a_log_that_is_always_too_short_is_not_loaded_without_end(
    fleet: Fleet, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_module, "CHECK_PERIOD_S", 0.05)
    loads, stopped = fleet.mirror.counters["loads"], time.monotonic() + 6
    with server.client() as client:
        while time.monotonic() < stopped:
            client.xadd(KEYS.log, {LOG_FIELD: encode(LogRecord("load", POD, 0))})
            time.sleep(0.05)
            client.xtrim(KEYS.log, maxlen=0, approximate=False)
            time.sleep(1.5 * mirror_module.READ_BLOCK_MS / 1000)  # only who has nothing to read looks back
    assert 4 <= fleet.mirror.counters["loads"] - loads < 10  # at 0.5, 1, 2 and 4 s after the first ones
    assert _warnings(caplog, "is too short for this mirror") == 1
    assert fleet.mirror.match(prompt(_tokens(1)), [POD])[POD].total_tokens == SIZE  # it serves on
    fleet.settle()


def test_the_log_keeps_what_is_young_and_no_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RedisWriter(server.url, MODEL)
    writer.join(pod(POD))
    writer.flush()

    def write(pairs: int) -> None:
        for number in range(pairs):
            writer.add(DomainId(POD), Epoch(1), GPU, keys(number))
            writer.remove(DomainId(POD), Epoch(1), GPU, keys(number))
        writer.flush()

    with server.client() as client:
        write(15_000)
        write(1)
        assert client.xlen(KEYS.log) == 30_003
        monkeypatch.setattr(writer_module, "LOG_KEEP_S", 0.5)
        time.sleep(1)
        write(100)
        write(100)  # the one before has told the time
        assert 400 <= client.xlen(KEYS.log) < 1000
    writer.close()


def test_a_slow_mirror_that_is_never_trimmed_catches_up_without_loading_again(fleet: Fleet, server: Server) -> None:
    fleet.to_mirror.delay_s = 1.0
    loads = fleet.mirror.counters["loads"]
    for block in range(20, 60):
        fleet.store(block)
        time.sleep(0.1)
    eventually(lambda: fleet.is_exact(fleet.mirror), HEAL_S)
    assert fleet.mirror.counters["loads"] == loads


def test_what_a_publisher_buffers_while_redis_is_away_is_nothing(tmp_path: Path, server: Server) -> None:
    """It keeps the engine's set only: what it would have sent is not kept."""
    engine = Engine(tmp_path)
    config = PublisherConfig(server.url, MODEL, POD, engine.endpoint, engine.replay_endpoint, block_size=SIZE)
    publisher = Publisher(config)
    stop = threading.Event()
    thread = threading.Thread(target=publisher.run, args=(stop,), daemon=True)
    thread.start()
    engine.store(range(SIZE))
    eventually(lambda: publisher._domain is not None)
    server.kill()
    for number in range(2, 500):
        engine.store(_tokens(number))
    eventually(lambda: publisher._blocks is not None and len(publisher._blocks) == 499, HEAL_S)
    eventually(lambda: publisher._domain is None)
    assert not publisher._writer._added
    assert len(publisher._writer._pipeline) == 0
    stop.set()
    thread.join(20)
    engine.stop()


def said(fleet: Fleet, word: str, *, attempts: int) -> str:
    """What the publisher has logged once it has said `word` and then tried again so many times more."""
    eventually(lambda: word in fleet.log.read_text(), HEAL_S)
    time.sleep(RETRY_S * (2**attempts - 1))  # its waits: one, two, four times as long
    return fleet.log.read_text()


def _warnings(caplog: pytest.LogCaptureFixture, word: str) -> int:
    return sum(
        word in record.getMessage() and record.levelno == logging.WARNING
        for record in caplog.get_records("call")
        if record.name == mirror_module.__name__
    )
