"""An LMCache server's own stream of changes -> the same batches that an engine's event socket gives.

In: the address of an `lmcache server`. Out: `Received` batches, and `decode_records`, which makes events of them. The
server is the one who knows what it holds: it reports stores with token ids, and evictions, of every engine that is
attached to it. (An engine with LMCacheMPConnector repeats them on its own socket, one copy per engine; nobody needs
those.)

Wire format (LMCache 0.5.6, `v1/multiprocess/transport/zmq_impl/mq.py` and `modules/kv_events.py`): a DEALER sends
`[uid, operation, argument, ...]`, each of them msgpack; an answer is `[uid, operation, result]`. To
`subscribe_kv_events(instance, model, cursor, limit)` the server answers with one batch of records after `cursor`, and
with the next one for each `[uid, "", "ack"]`. The log keeps the last 32,768 records. An incarnation is one life of it.

    cursor 0, batch {incarnation 7, next_cursor 40}, ack, batch {7, 43}, ...
    another incarnation  -> what was read before is void: read the log again from its beginning
    lost                 -> the same, but go on with this batch, which has what follows the loss. (The log itself is
                            void before the loss: read again, more than a batch of it would end at the same mark.)
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from serve_app.decoding import decoder
from serve_app.errors import StoreError, WireError
from serve_app.events.source import Received, drop_unread
from serve_app.events.wire import Batch, BlockRemoved, BlockStored, Event, TokenId
from serve_app.types import EngineHash

logger = logging.getLogger(__name__)

LMCACHE_MEDIUM = "LMCACHE"  # its tier; LMCache itself says CPU, which is a tier of the pod

_PING, _GET_CHUNK_SIZE, _GET_EXPERIMENTAL = 22, 21, 32  # operations have numbers, newer ones names
_SUBSCRIBE = "subscribe_kv_events"
_STREAM_CAPABILITY = "kv_event_stream"
_RECORDS_PER_BATCH = 1024  # the server's limit
PING_S = 1.0  # keeps the subscription, which the server drops after 120 s of silence
SILENT_AFTER_S = 5.0  # a server that answers no ping for so long counts as gone
ANSWER_TIMEOUT_S = 5.0


class _Record(msgspec.Struct, gc=False):
    kind: str  # stored | removed
    block_hashes: list[bytes]
    medium: str = "CPU"  # and "@" and the request's cache_salt, if it has one: lmcache_module.py
    parent_block_hash: bytes | None = None
    token_ids: list[TokenId] = []


class _Header(msgspec.Struct, gc=False):
    enabled: bool
    incarnation: int
    next_cursor: int
    lost: bool


class _Body(msgspec.Struct, gc=False):
    events: list[msgspec.Raw]


_encode = msgspec.msgpack.encode
_decode_uid: Callable[[bytes], int] = decoder(int)
_decode_header: Callable[[bytes], _Header] = decoder(_Header)
_decode_body: Callable[[bytes], _Body] = decoder(_Body)
_decode_record: Callable[[bytes], _Record] = decoder(_Record)


class LMCacheSource:
    """Reader of one server's stream for one model; has what a Publisher needs of an EventSource. Used by one thread.

    Args:
        endpoint: `tcp://host:port` of the server.
        model: LMCache's name of the model: the path or id that the engine was given.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._model = model
        self._instance = int.from_bytes(os.urandom(6), "big")
        self._uid = 0  # of the subscription; answers to earlier ones are ignored
        self._cursor = 0
        self._incarnation: int | None = None
        self._linked = False
        self._ping_at_s = self._heard_at_s = 0.0
        self.caught_up = False
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        self.socket.connect(endpoint)

    @property
    def connected(self) -> bool:
        """Whether the server is there and answers."""
        return self._linked and time.monotonic() - self._heard_at_s < SILENT_AFTER_S

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)

    def read(self, limit: int) -> Iterator[Received]:
        """What has arrived by now, at most `limit` batches."""
        self._watch_connection()
        if not self._linked:
            return
        self._ping()
        for _ in range(limit):
            try:
                raw_uid, _, *result = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._heard_at_s = time.monotonic()
            if _decode_uid(raw_uid) != self._uid:
                continue  # a ping's answer
            if not result:  # the server ended the stream
                self._subscribe(self._cursor)
                continue
            yield from self._batch(result[0])

    def _batch(self, payload: bytes) -> Iterator[Received]:
        try:
            header = _decode_header(payload)
        except msgspec.DecodeError as error:
            logger.error("this is no batch of LMCache's stream as version 0.5 has it: %s", error)
            return  # and is not acknowledged: nothing comes after it
        if not header.enabled:
            logger.error("the LMCache server keeps no event log (--kv-event-log-size 0, or no observability)")
            return
        first = self._cursor == 0  # a log that is read from its beginning may have been trimmed before
        if self._incarnation not in (None, header.incarnation):
            self.caught_up, self._incarnation = False, None
            self._subscribe(0)
            yield Received(-1, None, restarted=True, lost=int(header.lost))
            return
        if header.lost and not first:
            yield Received(-1, None, restarted=True, lost=1)
        self._incarnation = header.incarnation
        self._cursor = header.next_cursor
        self.caught_up = True
        self._send(self._uid, b"", b"ack")
        yield Received(header.next_cursor, payload)

    def _watch_connection(self) -> None:
        while self.monitor.poll(0):
            self._linked = recv_monitor_message(self.monitor)["event"] == zmq.EVENT_CONNECTED
            self.caught_up = False
            if self._linked:
                self._heard_at_s = time.monotonic()
                self._subscribe(self._cursor)
            else:
                drop_unread(self.socket)  # the next subscription begins at the cursor

    def _subscribe(self, cursor: int) -> None:
        self._uid += 2
        self._cursor = cursor
        arguments = (self._instance, self._model, cursor, _RECORDS_PER_BATCH)
        self._send(self._uid, _encode(_SUBSCRIBE), *map(_encode, arguments))

    def _ping(self) -> None:
        now = time.monotonic()
        if now >= self._ping_at_s:
            self._ping_at_s = now + PING_S
            self._send(self._uid + 1, _encode(_PING), _encode(self._instance))

    def _send(self, uid: int, *frames: bytes) -> None:
        self.socket.send_multipart((_encode(uid), *frames))


def decode_records(payload: bytes, chunk_size: int) -> Batch:
    """Events of one batch: a stored record is one chunk of `chunk_size` tokens.

    Raises:
        WireError: the payload is not such a batch.
    """
    try:
        body = _decode_body(payload)
    except msgspec.DecodeError as error:
        raise WireError(f"not a batch of LMCache's stream: {error}") from error
    events: list[Event] = []
    skipped: Counter[str] = Counter()
    for raw in body.events:
        try:
            record = _decode_record(raw)
        except msgspec.DecodeError:
            skipped["malformed"] += 1
            continue
        salt = record.medium.partition("@")[2]
        suffix = salt.encode()  # LMCache's hash is the same whatever the salt
        names: list[EngineHash] = [chunk_hash + suffix for chunk_hash in record.block_hashes]
        parent = record.parent_block_hash
        match record.kind:
            case "stored":
                events.append(
                    BlockStored(
                        names,
                        None if parent is None else parent + suffix,
                        record.token_ids,
                        chunk_size,
                        medium=LMCACHE_MEDIUM,
                        extra_keys=[(salt,), *[None] * (len(names) - 1)] if salt and parent is None else None,
                    )
                )
            case "removed":
                events.append(BlockRemoved(names, LMCACHE_MEDIUM))
            case _:
                skipped["unknown_type"] += 1
    return Batch(0.0, events, skipped)


def chunk_size_of(endpoint: str) -> int:
    """Tokens per chunk of a running server.

    Raises:
        StoreError: it does not answer.
    """
    size: int = msgspec.msgpack.decode(_ask(endpoint, _GET_CHUNK_SIZE), type=int)
    return size


def reports_changes(endpoint: str) -> bool:
    """Whether a running server has the stream.

    Raises:
        StoreError: it does not answer.
    """
    return _STREAM_CAPABILITY in msgspec.msgpack.decode(_ask(endpoint, _GET_EXPERIMENTAL), type=list[str])


def _ask(endpoint: str, operation: int) -> bytes:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = context.socket(zmq.DEALER)
    try:
        socket.connect(endpoint)
        socket.send_multipart((_encode(0), _encode(operation)))
        if not socket.poll(int(ANSWER_TIMEOUT_S * 1000)):
            raise StoreError(f"the LMCache server at {endpoint} did not answer within {ANSWER_TIMEOUT_S} s")
        return socket.recv_multipart()[2]
    finally:
        socket.close(linger=0)
