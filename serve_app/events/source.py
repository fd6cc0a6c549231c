"""The engine's sockets -> event batches in order, none twice, none missing that can still be had.

Wire format (vLLM `ZmqEventPublisher`): the PUB socket sends `[topic, 8-byte big-endian sequence, payload]`, numbered
from 0 in every life of the engine. The ROUTER socket answers `["", 8-byte start sequence]` with every batch that it
still has from there on, as `["", topic, sequence, payload]`, in older versions without the topic, and ends with
sequence -1. It keeps the last 10,000.

    live 0 1 2 5      -> 3 and 4 are asked for again, then 5
    live 7 8 0        -> a new life: everything known of the old one is void
    live 0 1 2        -> and no more: was 3 dropped? an idle engine is asked for what comes after 2

A new life may also hide behind a lost connection, with higher numbers than we have seen. So after every connect the
engine is asked for the last batch that we applied: the same bytes mean the same life, and we go on after it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

logger = logging.getLogger(__name__)

_END = -1
_SEQ_BYTES = 8
_NO_SEQ = (1 << 63) - 1
_RECEIVE_BUFFER = 100_000  # batches that wait while Redis is slow; what is dropped beyond is replayed
REPLAY_TIMEOUT_S = 2.0
IDLE_CHECK_S = 1.0  # without a batch for so long, the engine is asked whether the last ones were dropped
_IDLE_ANSWER_S = 0.2  # then; if it does not answer, it is asked again at the next check


@dataclass(frozen=True, slots=True)
class Received:
    """One batch, or without a payload only the news that the engine has begun a new life.

    `restarted`: it is the first of a new life. `lost`: batches before it that are gone for good.
    """

    seq: int
    payload: bytes | None
    restarted: bool = False
    lost: int = 0


def drop_unread(socket: zmq.Socket[bytes]) -> None:
    """Of a connection that has ended. Left unread, it is taken for the next one's, and keeps `poll` busy until then."""
    with contextlib.suppress(zmq.Again):
        while True:
            socket.recv_multipart(zmq.NOBLOCK)


class EventSource:
    """Reader of one engine's event stream. Used by one thread.

    Args:
        endpoint: the engine's PUB socket, as a peer reaches it (`tcp://host:port`, `ipc://path`).
        replay_endpoint: its ROUTER socket; without it, gaps are lost.
        topic: prefix of the topics to take.
    """

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: str = "") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._replay_endpoint = replay_endpoint
        self._next = 0  # sequence number that comes next
        self._last_live = -1  # last one from the PUB socket, which repeats none within a life
        self._last_payload = b""  # of the batch before `_next`
        self._check_at_s = 0.0  # when an idle engine is asked next
        self.connected = False
        self.caught_up = False
        self.socket = self._context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, _RECEIVE_BUFFER)
        self.socket.subscribe(topic)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        self.socket.connect(endpoint)
        if endpoint.startswith("tcp://") and not endpoint.startswith(
            ("tcp://127.", "tcp://localhost:", "tcp://[::1]:")
        ):
            logger.warning("events from %s are not authenticated: ipc:// on one node, or a private network", endpoint)

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)

    def read(self, limit: int) -> Iterator[Received]:
        """What has arrived by now, at most about `limit` batches; after a connect, first what we missed before it."""
        self._watch_connection()
        if not self.connected:
            return
        if not self.caught_up:
            yield from self._catch_up()
        for i in range(limit if self.caught_up else 0):
            try:
                _, raw_seq, payload = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                if not i:
                    yield from self._check_idle()
                return
            except ValueError:
                logger.warning("an event message that does not have three frames was skipped")
                continue
            if len(raw_seq) != _SEQ_BYTES or raw_seq[0] & 0x80:  # more than an engine can ever count to
                logger.warning("an event message whose sequence number cannot be one was skipped")
                continue
            self._check_at_s = time.monotonic() + IDLE_CHECK_S
            yield from self._in_order(int.from_bytes(raw_seq, "big"), payload)
            if not self.caught_up:
                return

    def _check_idle(self) -> Iterator[Received]:
        """A gap shows with the batch after it. The last batches have none: ask for them."""
        if time.monotonic() >= self._check_at_s:
            yield from self._replay(_IDLE_ANSWER_S)
            self._check_at_s = time.monotonic() + IDLE_CHECK_S

    def _watch_connection(self) -> None:
        while self.monitor.poll(0):
            self.connected = recv_monitor_message(self.monitor)["event"] == zmq.EVENT_CONNECTED
            self.caught_up = self._replay_endpoint is None
            if not self.connected:
                drop_unread(self.socket)  # if the same life goes on with the next connection, a replay has these

    def _catch_up(self) -> Iterator[Received]:
        """Go on after the last batch we applied, if the engine still is the one that sent it; else start anew."""
        if self._next:
            first = next(self._ask(self._next - 1), None)
            if first is None:
                return  # no answer: again at the next call
            if first != (self._next - 1, self._last_payload):
                self._forget_life()
                yield Received(-1, None, restarted=True)
        yield from self._replay()

    def _in_order(self, seq: int, payload: bytes) -> Iterator[Received]:
        if seq <= self._last_live:
            self._forget_life()
            yield Received(-1, None, restarted=True)
        self._last_live = seq
        if seq < self._next:
            return  # a replay has already brought it
        if seq > self._next and self._replay_endpoint is not None:
            if not (yield from self._replay()):
                self.caught_up = False  # late is not lost: the next call asks again, for this batch too
                return
            if seq < self._next:
                return
        yield self._accept(seq, payload)

    def _forget_life(self) -> None:
        self._next, self._last_live, self._last_payload = 0, -1, b""

    def _accept(self, seq: int, payload: bytes) -> Received:
        lost = seq - self._next
        self._next, self._last_payload = seq + 1, payload
        return Received(seq, payload, lost=lost)

    def _replay(self, timeout_s: float = REPLAY_TIMEOUT_S) -> Generator[Received, None, bool]:
        """Take what the engine still has, from `_next` on. False: not all of it came."""
        any_yet = False
        for seq, payload in self._ask(self._next, timeout_s):
            if seq == _END:
                self.caught_up = True
                return True
            if any_yet and seq > self._next:
                return False  # a hole in the answer is no loss; what is before its beginning is
            any_yet = True
            if seq >= self._next:
                yield self._accept(seq, payload)
        return False

    def _ask(self, start: int, timeout_s: float = REPLAY_TIMEOUT_S) -> Iterator[tuple[int, bytes]]:
        """The engine's answer to a replay request, with its end mark; it breaks off when the engine is silent."""
        if self._replay_endpoint is None:
            return
        socket = self._context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.RCVHWM, 0)  # the engine's ROUTER drops what a full peer does not take
            socket.connect(self._replay_endpoint)
            socket.send_multipart((b"", start.to_bytes(8, "big")))
            while socket.poll(int(timeout_s * 1000)):
                *_, raw_seq, payload = socket.recv_multipart()  # at least these two, by our own request
                if len(raw_seq) != _SEQ_BYTES:
                    continue
                seq = int.from_bytes(raw_seq, "big", signed=True)
                yield seq, payload
                if seq == _END:
                    return
            if timeout_s >= REPLAY_TIMEOUT_S:
                logger.warning("the engine did not answer a replay request within %s s", timeout_s)
        finally:
            socket.close(linger=0)


def answers_replay(endpoint: str, timeout_s: float = REPLAY_TIMEOUT_S) -> bool:
    """Whether an engine's replay socket is there, by asking it for what comes after everything."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    try:
        socket.connect(endpoint)
        socket.send_multipart((b"", _NO_SEQ.to_bytes(_SEQ_BYTES, "big")))
        if not socket.poll(int(timeout_s * 1000)):
            return False
        *_, raw_seq, _ = [b"", *socket.recv_multipart()]
        return len(raw_seq) == _SEQ_BYTES and int.from_bytes(raw_seq, "big", signed=True) == _END
    except (zmq.ZMQError, ValueError):
        return False
    finally:
        socket.close(linger=0)
