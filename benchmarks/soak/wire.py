"""How the soak's processes talk to each other: the first line of stdin configures, questions come by ZMQ.

The end of stdin means that the parent is gone, however it went: then the child ends too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

ANSWER_S: Final = 60.0  # a child that is busy, on a machine that is


class EnginesConfig(msgspec.Struct, frozen=True):
    """Of a process with several simulated engines."""

    name: str
    folder: str  # of the sockets
    model: str
    block_size: int  # tokens
    blocks: int  # of each engine's pool
    pods: list[str]
    events_per_s: float  # of all pods together
    clear_every_s: float  # the prefix cache of one of them is reset
    clear_all_s: tuple[float, float]  # from, until: each is reset once, so that caps are full


class FollowerConfig(msgspec.Struct, frozen=True):
    folder: str
    redis_url: str
    model: str


def control(folder: str | Path, name: str) -> str:
    return f"ipc://{folder}/{name}.control"


def events(folder: str | Path, pod: str) -> str:
    return f"ipc://{folder}/{pod}.events"


def replay(folder: str | Path, pod: str) -> str:
    return f"ipc://{folder}/{pod}.replay"


def probes(folder: str | Path) -> str:
    """Engines tell the follower which block they have just stored, and when."""
    return f"ipc://{folder}/probes"


class Asker:
    """One question at a time."""

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)  # a question that nobody took does not hold up the end
        self._socket.connect(endpoint)

    def ask(self, **question: Any) -> Any:
        """Raises TimeoutError."""
        self._socket.send(msgspec.msgpack.encode(question))
        if not self._socket.poll(int(ANSWER_S * 1000)):
            raise TimeoutError(f"no answer to {question.get('what')}")
        return msgspec.msgpack.decode(self._socket.recv())

    def close(self) -> None:
        self._socket.close(linger=0)
