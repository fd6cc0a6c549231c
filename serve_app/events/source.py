"""The engine's sockets -> event batches in order, none twice, none missing that can still be had.

Wire format (vLLM `ZmqEventPublisher`): the PUB socket sends `[topic, 8-byte big-endian sequence, payload]`, numbered
from 0 in every life of the engine. The ROUTER socket answers `["", 8-byte start sequence]` with every batch that it
still has from there on, as `["", topic, sequence, payload]`, and ends with sequence -1. It keeps the last 10,000.

    live 0 1 2 5      -> 3 and 4 are asked for again, then 5
    live 7 8 0        -> a new life: everything known of the old one is void
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

logger = logging.getLogger(__name__)

_END = -1
_RECEIVE_BUFFER = 100_000  # batches that wait while Redis is slow; what is dropped beyond is replayed
REPLAY_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Received:
    """One batch. `restarted`: it is the first of a new life. `lost`: batches before it that are gone for good."""

    seq: int
    payload: bytes
    restarted: bool = False
    lost: int = 0


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
        self._caught_up = replay_endpoint is None
        self.socket = self._context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, _RECEIVE_BUFFER)
        self.socket.subscribe(topic)
        self.socket.connect(endpoint)

    def close(self) -> None:
        self.socket.close(linger=0)

    def catch_up(self) -> Iterator[Received]:
        """What the engine sent before we were here. Call until `caught_up`; gives up after `REPLAY_TIMEOUT_S`."""
        if not self._caught_up:
            yield from self._replay(None, restarted=False)

    @property
    def caught_up(self) -> bool:
        return self._caught_up

    def read(self, limit: int) -> Iterator[Received]:
        """Batches that have arrived by now, at most about `limit`."""
        for _ in range(limit):
            try:
                _, raw_seq, payload = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                logger.warning("an event message that does not have three frames was skipped")
                continue
            yield from self._in_order(int.from_bytes(raw_seq, "big"), payload)

    def _in_order(self, seq: int, payload: bytes) -> Iterator[Received]:
        restarted = seq <= self._last_live
        self._last_live = seq
        if restarted:
            self._next = 0
        elif seq < self._next:
            return  # a replay has already brought it
        if seq > self._next and self._replay_endpoint is not None:
            for received in self._replay(seq, restarted=restarted):
                restarted = False
                yield received
        lost = seq - self._next
        self._next = seq + 1
        yield Received(seq, payload, restarted, lost)

    def _replay(self, until: int | None, *, restarted: bool) -> Iterator[Received]:
        """Ask for everything from `_next` on; take what is before `until`."""
        socket = self._context.socket(zmq.DEALER)
        try:
            socket.connect(self._replay_endpoint)
            socket.send_multipart((b"", self._next.to_bytes(8, "big")))
            deadline_s = time.monotonic() + REPLAY_TIMEOUT_S
            while socket.poll(max(0, int((deadline_s - time.monotonic()) * 1000))):
                _, _, raw_seq, payload = socket.recv_multipart()
                deadline_s = time.monotonic() + REPLAY_TIMEOUT_S
                seq = int.from_bytes(raw_seq, "big", signed=True)
                if seq == _END:
                    self._caught_up = True
                    return
                if seq >= self._next and (until is None or seq < until):
                    lost, self._next = seq - self._next, seq + 1
                    yield Received(seq, payload, restarted, lost)
                    restarted = False
            if until is not None:
                logger.warning("the engine did not replay its events within %s s", REPLAY_TIMEOUT_S)
        finally:
            socket.close(linger=0)
