"""Every way to reach Redis, against real servers: publish, follow, load late, renew a lease, bury the dead."""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from serve_app.errors import ConfigError, StoreError
from serve_app.index import mirror as mirror_module
from serve_app.index.connection import connect, redact
from serve_app.index.keyspace import HeartbeatRecord, Keyspace
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.types import CPU, GPU, DomainId, Epoch, PodId
from tests.certificates import issue_certificates
from tests.helpers import MODEL, eventually, keys, pod
from tests.proxy import Proxy
from tests.servers import HOST, SLOTS, Server, cluster_node, form_cluster, sentinel_for

USERS = Path(__file__).parents[2] / "cluster" / "redis" / "users.acl"
A, B = DomainId("a"), DomainId("b")
PASSWORD = "p@ss/w:rd"

Start = Callable[[Path, contextlib.ExitStack], str]


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.kill()


def tcp(folder: Path, stack: contextlib.ExitStack) -> str:
    return f"{stack.enter_context(running(Server(folder))).url}/2"


def unix(folder: Path, stack: contextlib.ExitStack) -> str:
    stack.enter_context(running(Server(folder, "--unixsocket", f"{folder}/s")))
    return f"unix://{folder}/s"


def password_file(folder: Path, stack: contextlib.ExitStack) -> str:
    server = stack.enter_context(running(Server(folder)))
    with server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "someone", "on", f">{PASSWORD}", "~kv:*", "+@all")
    (folder / "password").write_text(f"{PASSWORD}\n")
    return f"redis://someone@{HOST}:{server.port}?password_file={folder}/password"


def tls(folder: Path, stack: contextlib.ExitStack) -> str:
    """The server asks for a client certificate, too."""
    server = stack.enter_context(running(Server(folder)))
    issue_certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    context.load_verify_locations(folder / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    proxy = Proxy(server.port, context)
    stack.callback(proxy.close)
    query = f"ssl_ca_certs={folder}/ca.crt&ssl_certfile={folder}/client.crt&ssl_keyfile={folder}/client.key"
    return f"rediss://{HOST}:{proxy.port}?{query}"


def sentinel(folder: Path, stack: contextlib.ExitStack) -> str:
    server = stack.enter_context(running(Server(folder / "primary")))
    watcher = stack.enter_context(running(sentinel_for(server, folder / "sentinel")))
    return f"redis+sentinel://127.0.0.2,{HOST}:{watcher.port}/index/1"  # nobody is at the first


def cluster(folder: Path, stack: contextlib.ExitStack) -> str:
    """Three nodes, the rights of users.acl, and a first address that is dead."""
    nodes = [stack.enter_context(running(cluster_node(folder / str(n)))) for n in range(3)]
    form_cluster(nodes, owners=3)
    for node in nodes:
        with node.client() as admin:
            set_users(admin)
    user = "kvcache-writer:change-me-writer"
    return f"redis+cluster://{user}@127.0.0.2:{nodes[0].port},{HOST}:{nodes[0].port},{HOST}:{nodes[1].port}"


def set_users(admin: redis.Redis) -> None:
    for line in USERS.read_text().splitlines():
        _, name, *rules = line.split()
        if name != "default":
            admin.execute_command("ACL", "SETUSER", name, *rules)


@pytest.fixture(params=[tcp, unix, password_file, tls, sentinel, cluster], ids=lambda start: start.__name__)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        yield request.param(tmp_path, stack)


def follow(url: str, stack: contextlib.ExitStack, *, bury: bool = False) -> Mirror:
    mirror = Mirror(url, MODEL, tier_order=(GPU, CPU), bury=bury)
    stack.callback(mirror.close)
    mirror.start()
    assert mirror.wait_ready(10)
    return mirror


def test_everything_that_publishers_and_mirrors_do(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "BURY_AFTER_S", 0.5)
    with contextlib.ExitStack() as stack:
        writer = RedisWriter(url, MODEL, lease_ttl_s=20)
        stack.callback(writer.close)
        mirror = follow(reader_of(url), stack)
        for epoch in (1, 2):
            writer.join(pod("a", epoch))
            writer.add(A, Epoch(epoch), GPU, keys(1, 2, 3))
            writer.add(A, Epoch(epoch), CPU, keys(3))
            writer.remove(A, Epoch(epoch), GPU, keys(3))
            writer.flush()
            assert writer.heartbeat(A, HeartbeatRecord(epoch))
        late = follow(reader_of(url), stack)
        a = PodId("a")
        eventually(lambda: all(one.match(keys(1, 2, 3), [a])[a].tokens == {GPU: 8, CPU: 4} for one in (mirror, late)))
        dead = RedisWriter(url, MODEL, lease_ttl_s=0.2)
        stack.callback(dead.close)
        dead.join(pod("b"))
        dead.add(B, Epoch(1), GPU, keys(1))
        dead.flush()
        eventually(lambda: mirror.match(keys(1), [PodId("b")])[PodId("b")].total_tokens == 4)
        follow(url, stack, bury=True)
        eventually(lambda: mirror.pods() == late.pods() == [PodId("a")], 10)
        left = stack.enter_context(connect(url, name="test", slot_of=Keyspace(MODEL).log))
        eventually(lambda: left.hget(Keyspace(MODEL).domains, B) is None)
        assert not dead.heartbeat(B, HeartbeatRecord(1))  # it would have to join again
        writer.clear(A, Epoch(2))
        writer.flush()
        eventually(lambda: mirror.match(keys(1), [PodId("a")])[PodId("a")].total_tokens == 0)
        writer.leave(A, Epoch(2))
        writer.flush()
        eventually(lambda: mirror.pods() == late.pods() == [])
        assert mirror.counters["errors"] == late.counters["errors"] == 0


def reader_of(url: str) -> str:
    """The same with the rights of a reader, where the server tells users apart."""
    return url.replace("writer", "reader")


def test_a_slot_that_moves_to_another_node_is_followed(tmp_path: Path) -> None:
    """A failover in a Cluster: the owner dies, its replica is promoted."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(running(cluster_node(tmp_path / str(n)))) for n in range(2)]
        form_cluster(nodes, owners=1)
        url = f"redis+cluster://{HOST}:{nodes[0].port}"
        writer, mirror = RedisWriter(url, MODEL), follow(url, stack)
        stack.callback(writer.close)
        writer.join(pod("a"))
        writer.add(A, Epoch(1), GPU, keys(1))
        writer.flush()
        eventually(lambda: mirror.match(keys(1), [PodId("a")])[PodId("a")].total_tokens == 4)
        with nodes[1].client() as replica:
            # Both are there, so nobody's connection breaks: the old owner answers MOVED, to readers as well.
            eventually(lambda: replica.execute_command("CLUSTER", "FAILOVER"))
            eventually(lambda: replica.info("replication")["role"] == "master", 10)

        def publish_again() -> bool:
            try:
                writer.join(pod("a", epoch=2))
                writer.add(A, Epoch(2), GPU, keys(1, 2))
                writer.flush()
            except StoreError:
                return False
            return True

        eventually(publish_again, 10)
        eventually(lambda: mirror.match(keys(1, 2), [PodId("a")])[PodId("a")].total_tokens == 8, 10)
        nodes[0].kill()  # from now on only what the seed told us of the other node helps
        for client in (writer._redis, mirror._redis):
            client.connection_pool.disconnect()
        assert writer.heartbeat(A, HeartbeatRecord(2))
        eventually(lambda: mirror.pods() == [PodId("a")])


def test_a_slot_that_is_moved_key_by_key_is_followed(tmp_path: Path) -> None:
    """Resharding: in between, neither node can run a transaction over all our keys."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(running(cluster_node(tmp_path / str(n)))) for n in range(2)]
        form_cluster(nodes, owners=2)
        keyspace = Keyspace(MODEL)
        clients = [stack.enter_context(node.client()) for node in nodes]
        slot = clients[0].execute_command("CLUSTER", "KEYSLOT", keyspace.log)
        if slot >= SLOTS // 2:  # the second node owns it
            nodes.reverse()
            clients.reverse()
        (source, target), ids = clients, [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
        url = f"redis+cluster://{HOST}:{nodes[1].port}"
        writer, mirror = RedisWriter(url, MODEL), follow(url, stack)
        stack.callback(writer.close)

        def publish(epoch: int) -> bool:
            try:
                writer.join(pod("a", epoch))
                writer.add(A, Epoch(epoch), GPU, keys(epoch))
                writer.flush()
                return writer.heartbeat(A, HeartbeatRecord(epoch))
            except StoreError:
                return False

        assert publish(1)
        target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
        source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
        source.execute_command("MIGRATE", HOST, nodes[1].port, keyspace.domains, 0, 5000)
        assert not publish(2)
        for key in source.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.execute_command("MIGRATE", HOST, nodes[1].port, key, 0, 5000)
        for client in (target, source):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
        eventually(lambda: publish(3), 10)
        eventually(lambda: mirror.match(keys(3), [PodId("a")])[PodId("a")].total_tokens == 4, 10)
        assert mirror.match(keys(1), [PodId("a")])[PodId("a")].total_tokens == 0


def test_a_password_that_was_changed_in_its_file_is_taken_at_the_next_connect(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        url = password_file(tmp_path, stack)
        with connect(url, name="test") as client:
            assert client.ping()
            client.execute_command("ACL", "SETUSER", "someone", "resetpass", ">another")
            (tmp_path / "password").write_text("another")
            client.connection_pool.disconnect()
            assert client.ping()
            (tmp_path / "password").unlink()
            client.connection_pool.disconnect()
            with pytest.raises(redis.AuthenticationError, match="No such file"):
                client.ping()


def test_a_certificate_of_an_unknown_ca_is_refused_and_the_setting_named(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        url = tls(tmp_path, stack)
        writer = RedisWriter(url.partition("?")[0], MODEL)
        stack.callback(writer.close)
        with pytest.raises(StoreError, match="ssl_ca_certs"):
            writer.join(pod("a"))


def test_a_cluster_behind_a_plain_url_is_told(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(running(cluster_node(tmp_path / str(n)))) for n in range(2)]
        form_cluster(nodes, owners=2)
        for node in nodes:
            with node.client() as client, contextlib.suppress(redis.exceptions.MovedError):
                client.exists(Keyspace(MODEL).log)
                continue
            writer = RedisWriter(node.url, MODEL)
            stack.callback(writer.close)
            with pytest.raises(StoreError, match=r"redis\+cluster://"):
                writer.join(pod("a"))
            return
    pytest.fail("both nodes own the slot")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:6379", "must begin with redis://"),
        ("http://localhost", "must begin with redis://"),
        ("redis://", "a host is missing"),
        ("redis://host:no", "the port is no number"),
        ("redis://user:s3/cret@host", "%2F"),
        ("redis://user:12/s3cret@host", "%2F"),
        ("redis://user:12?s3cret@host", "%3F"),
        ("redis://user:12#s3cret@host", "%23"),
        ("redis://host/name", "must be a number"),
        ("redis://host?db=x", "'db'"),
        ("redis://host?colour=red", "unknown setting 'colour'"),
        ("redis://host?ssl_ca_certs=/x", "rediss://"),
        ("rediss://host?ssl_ca_certs=/not/there", "ssl_ca_certs: there is no file /not/there"),
        ("rediss://host?ssl_nonsense=1", "ssl_nonsense"),
        ("redis://host?password_file=/not/there", "password_file: there is no file /not/there"),
        (f"redis://u:s3cret@host?password_file={__file__}", "exclude each other"),
        ("redis://one,two", "several hosts"),
        ("redis+sentinel://one,two", "service"),
        ("redis+cluster://one/3", "only database 0"),
        ("redis+cluster://", "a host is missing"),
        ("unix://", "whole path"),
        ("unix://relative/path", "whole path"),
    ],
)
def test_a_bad_url_is_a_config_error_that_says_what_to_write(url: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(url, name="test", slot_of="k")
    assert message in str(caught.value)
    assert "s3" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user:secret@host", "redis://user:***@host"),
        ("redis://:secret@host", "redis://:***@host"),
        ("redis://user@host?password_file=/run/secret", "redis://user@host?password_file=/run/secret"),
        ("redis://user:sec/r@et@host", "redis://user:***@host"),
        ("redis+sentinel://u:secret@a:1,b:2/index", "redis+sentinel://u:***@a:1,b:2/index"),
        ("redis://host?password=secret&db=1", "redis://host?password=***&db=1"),
        ("rediss://h?ssl_password=secret", "rediss://h?ssl_password=***"),
        ("redis+sentinel://h/i?db=1&sentinel_password=secret", "redis+sentinel://h/i?db=1&sentinel_password=***"),
        ("user:secret@host", "user:***@host"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_no_password_is_logged_when_nobody_answers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    mirror = Mirror(f"redis://user:s3cret@{HOST}:1", MODEL)
    mirror.start()
    eventually(lambda: mirror.counters["errors"] >= 2)
    mirror.close()
    assert "user:***@" in caplog.text
    assert "s3cret" not in caplog.text
    assert len([record for record in caplog.records if record.name == mirror_module.__name__]) == 1  # not per retry
