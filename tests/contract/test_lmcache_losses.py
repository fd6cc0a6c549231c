"""LMCache's own event log, with losses in it -> our reader of the stream. LMCache's ZMQ server is not in between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.mp_observability.event import Event, EventType
from lmcache.v1.mp_observability.event_bus import EventBus, EventBusConfig
from lmcache.v1.multiprocess.modules.kv_events import KVEventModule

from serve_app.events.lmcache_source import LMCacheSource, decode_records
from serve_app.events.source import Received
from serve_app.events.wire import BlockStored
from tests.helpers import eventually

MODEL, CHUNK = "org/test-model", 2
MANY = 1500  # chunks: more than one batch of the stream


class Log:
    """LMCache's bus and log, and a socket that answers to subscriptions as the server does."""

    def __init__(self) -> None:
        self._bus = EventBus(EventBusConfig())
        self._log: Any = KVEventModule(SimpleNamespace(event_bus=self._bus))
        self._bus.start()
        self._stop = threading.Event()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def store(self, numbers: range) -> None:
        for n in numbers:
            name = n.to_bytes(8, "big")
            tokens = {"chunk_hashes": [name], "token_chunks": [[n, n]], "parent_hashes": [None]}
            self._bus.publish(Event(EventType.MP_TOKENS, metadata=tokens))
            keys = [ObjectKey(name, MODEL, 0)]
            self._bus.publish(Event(EventType.L1_WRITE_FINISHED, metadata={"keys": keys}))
        eventually(lambda: not self._bus.queue_depth())

    def lose(self) -> None:
        """One event finds LMCache's queue full."""
        before = self._log.report_status()["kv_events"]["lost_markers"]
        size, self._bus._config.max_queue_size = self._bus._config.max_queue_size, 0
        self._bus.publish(Event(EventType.L1_KEYS_EVICTED, metadata={"keys": []}))
        self._bus._config.max_queue_size = size
        eventually(lambda: self._log.report_status()["kv_events"]["lost_markers"] > before)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close(linger=0)
        self._bus.stop()

    def _serve(self) -> None:
        stream: list[Any] | None = None  # peer, uid, cursor, whether it is owed a batch, whether it had one
        while not self._stop.is_set():
            if self._socket.poll(5):
                peer, uid, *rest = self._socket.recv_multipart()
                if rest[0] == b"":
                    if stream is not None and uid == stream[1]:
                        stream[3] = True
                elif msgspec.msgpack.decode(rest[0]) == "subscribe_kv_events":
                    stream = [peer, uid, msgspec.msgpack.decode(rest[3]), True, False]
                else:
                    self._socket.send_multipart((peer, uid, rest[0], msgspec.msgpack.encode(True)))
            if stream is not None and stream[3]:
                batch = self._log.read_kv_events(MODEL, stream[2], 1024)
                if batch.events or batch.lost or not stream[4]:
                    stream[2:] = [batch.next_cursor, False, True]
                    self._socket.send_multipart((*stream[:2], b"", msgspec.msgpack.encode(batch)))


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    yield log
    log.close()


class Reader:
    def __init__(self, endpoint: str) -> None:
        self._source = LMCacheSource(endpoint, MODEL)
        self.restarts = 0
        self.held: set[int] = set()

    def holds(self, *numbers: range) -> bool:
        for received in self._source.read(100):
            self._apply(received)
        return self._source.caught_up and self.held == {n for part in numbers for n in part}

    def close(self) -> None:
        self._source.close()

    def _apply(self, received: Received) -> None:
        if received.restarted:
            self.restarts += 1
            self.held.clear()
        if received.payload is not None:
            for event in decode_records(received.payload, CHUNK).events:
                assert isinstance(event, BlockStored)
                self.held.add(event.token_ids[0])


def test_a_loss_voids_what_was_before_it(log: Log) -> None:
    log.store(range(3))
    reader = Reader(log.endpoint)
    eventually(lambda: reader.holds(range(3)))
    log.lose()
    eventually(reader.holds)
    log.store(range(5, 8))
    eventually(lambda: reader.holds(range(5, 8)))
    assert reader.restarts == 1
    reader.close()


def test_a_loss_behind_more_than_a_batch_is_read_past(log: Log) -> None:
    """Read again from its beginning, the log would come to the same loss again, for as long as it has it."""
    log.store(range(MANY))
    log.lose()
    log.store(range(MANY, MANY + 3))
    reader = Reader(log.endpoint)
    eventually(lambda: reader.holds(range(MANY, MANY + 3)))
    log.store(range(MANY + 3, MANY + 5))
    eventually(lambda: reader.holds(range(MANY, MANY + 5)))
    assert reader.restarts == 1
    reader.close()
