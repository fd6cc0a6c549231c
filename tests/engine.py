"""The two ends of an engine's event stream, for real: vLLM's publisher of events, and ours as its own process."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from serve_app.blocks import block_keys, namespace_key, pack_tokens
from serve_app.events.publisher import PublisherConfig
from serve_app.index.mirror import Mirror
from serve_app.types import BlockKeys, ModelId, PodId
from tests.helpers import eventually

MODEL = ModelId("test-model")
POD = PodId("pod-1")
SIZE = 4


class Engine:
    """The part of vLLM that sends KV events, for real; the events are written by the test."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        buffer_steps: int = 10_000,
        hwm: int = 100_000,
        config: Mapping[str, Any] | None = None,
        rank: int = 0,
    ) -> None:
        """With Unix sockets in `folder`, or as the data parallel rank of an engine with this `kv_events_config`."""
        self._buffer_steps, self._hwm = buffer_steps, hwm
        self._rank = rank
        self.endpoint: str
        self.replay_endpoint: str
        self.endpoint, self.replay_endpoint = (
            (config["endpoint"], config["replay_endpoint"])
            if config
            else (f"ipc://{folder}/events", f"ipc://{folder}/replay")
        )
        self._publisher: ZmqEventPublisher | None = None
        self.start()

    def start(self) -> None:
        self._publisher = ZmqEventPublisher(
            self._rank, self.endpoint, self.replay_endpoint, self._buffer_steps, self._hwm
        )

    def stop(self) -> None:
        if self._publisher is not None:
            self._publisher.shutdown()
            self._publisher = None
            for endpoint in (self.endpoint, self.replay_endpoint):
                eventually(partial(_can_bind, endpoint, self._rank))

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

    def sent(self) -> bool:
        """Whether every batch has gone to the live stream, as far as that takes it."""
        assert self._publisher is not None
        return bool(self._publisher._event_queue.empty())

    def remove(self, tokens: range) -> None:
        self.send(*(BlockRemoved(block_hashes=[engine_hash(start)], medium="GPU") for start in tokens[::SIZE]))

    def store(self, tokens: range, parent: bytes | None = None) -> None:
        hashes = [engine_hash(tokens[i]) for i in range(0, len(tokens), SIZE)]
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


def _can_bind(endpoint: str, rank: int) -> bool:
    """ZeroMQ closes sockets in the background: a port is free some time after `close`."""
    if not endpoint.startswith("tcp://"):
        return True
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(endpoint.rpartition(":")[2]) + rank))
            probe.listen()
        except OSError:
            return False
        return True


def engine_hash(first_token: int) -> bytes:
    return b"engine-%d" % first_token


def prompt(tokens: range) -> BlockKeys:
    return block_keys(pack_tokens(tokens), SIZE, namespace_key(MODEL, SIZE))


class PublisherProcess:
    """`python -m serve_app.events`, as a replica runs it."""

    started: ClassVar[list[PublisherProcess]] = []  # for tests/contract/conftest.py, which ends what a test left

    def __init__(
        self,
        engine: Engine,
        redis_url: str,
        block_size: int = SIZE,
        log: Path | None = None,
        capacity: int = 0,
        config: PublisherConfig | None = None,
    ) -> None:
        config = config or PublisherConfig(
            redis_url=redis_url,
            model=MODEL,
            pod=POD,
            endpoint=engine.endpoint,
            replay_endpoint=engine.replay_endpoint,
            block_size=block_size,
            capacity=capacity,
        )
        command = [sys.executable, "-m", "serve_app.events"]
        with log.open("wb") if log else contextlib.nullcontext() as stderr:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stderr)
        self.started.append(self)
        self.tell(msgspec.json.encode(config))

    def tell(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def end_of_parent(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdin is not None
        self.process.stdin.close()


def matched(mirror: Mirror, tokens: range) -> int:
    return mirror.match(prompt(tokens), [POD])[POD].total_tokens
