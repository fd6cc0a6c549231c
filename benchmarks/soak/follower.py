"""The router's read side as a process: `python -m benchmarks.soak.follower`.

In: the configuration as the first line of stdin; questions and probes on ZMQ sockets. Out: what the mirror says of
blocks, its counters, and how long after an engine stored a block the mirror knew of it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from typing import Any, Final

import msgspec
import zmq

from benchmarks.soak.wire import FollowerConfig, control, probes
from serve_app.index.mirror import Mirror
from serve_app.types import ModelId, PodId

_PROBE_LATE_S: Final = 10.0


class Follower:
    def __init__(self, config: FollowerConfig) -> None:
        self._mirror = Mirror(config.redis_url, ModelId(config.model))
        self._mirror.start()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._control = context.socket(zmq.REP)
        self._control.bind(control(config.folder, "follower"))
        self._probes = context.socket(zmq.PULL)
        self._probes.bind(probes(config.folder))
        self._waiting: list[tuple[str, bytes, float]] = []  # pod, block, when it was stored
        self._delays_ms: list[float] = []  # since the last question
        self._late = 0

    def run(self) -> None:
        poller = zmq.Poller()
        for some in (self._control, self._probes, sys.stdin.fileno()):
            poller.register(some, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(1 if self._waiting else 1000))
            if sys.stdin.fileno() in ready:
                break
            if self._probes in ready:
                self._waiting.append(msgspec.msgpack.decode(self._probes.recv(), type=tuple[str, bytes, float]))
            if self._control in ready:
                question = msgspec.msgpack.decode(self._control.recv())
                self._control.send(msgspec.msgpack.encode(self._answer(question)))
            self._look()
        self._mirror.close()

    def _look(self) -> None:
        now = time.monotonic()
        still = []
        for pod, key, at in self._waiting:
            if self._mirror.held([PodId(pod)], key)[0]:
                self._delays_ms.append((now - at) * 1e3)
            elif now - at > _PROBE_LATE_S:
                self._late += 1
            else:
                still.append((pod, key, at))
        self._waiting = still

    def _answer(self, question: dict[str, Any]) -> Any:
        match question:
            case {"what": "held", "pod": pod, "keys": keys}:
                return bytes(self._mirror.held([PodId(pod)] * (len(keys) // 8), keys)), self._mirror.trust(PodId(pod))
            case {"what": "state"}:
                return self._state()
        return None

    def _state(self) -> dict[str, Any]:
        mirror = self._mirror
        delays, self._delays_ms = self._delays_ms, []
        beats = [beat for _, live, beat in mirror.domains() if live and beat is not None]
        skipped: Counter[str] = Counter()
        for beat in beats:
            skipped.update(beat.events_skipped)
        return {
            "pods": mirror.pods(),
            "blocks": sum(mirror.block_counts().values()),
            "lag_s": mirror.lag_s,
            "stale_for_s": mirror.stale_for_s(),
            "counters": dict(mirror.counters),
            "evicted_blocks": mirror.evicted_blocks,
            "delays_ms": delays,
            "late_probes": self._late,
            "publishers": {
                "events_applied": sum(beat.events_applied for beat in beats),
                "events_lost": sum(beat.events_lost for beat in beats),
                "resyncs": sum(beat.resyncs for beat in beats),
                "skipped": dict(skipped),
            },
        }


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s follower %(levelname)s %(message)s")
    Follower(msgspec.json.decode(sys.stdin.buffer.readline(), type=FollowerConfig)).run()


if __name__ == "__main__":
    main()
