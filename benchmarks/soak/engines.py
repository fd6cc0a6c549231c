"""Simulated engines, several in one process: `python -m benchmarks.soak.engines`.

In: the configuration as the first line of stdin, questions on a ZMQ socket. Out: KV events on each engine's own ZMQ
sockets. Cache, hashes, events and their sender are vLLM's own (KVCacheManager with its BlockPool, ZmqEventPublisher);
made up is who asks: conversations that grow, of which a pool holds just about all, so that it evicts all the time.

What an engine holds is asked of its pool, not of the events that it has sent.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vllm is imported

import msgspec
import torch
import zmq
from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from benchmarks.soak.wire import EnginesConfig, control, events, probes, replay
from serve_app.blocks import block_keys, namespace_key, pack_tokens, split_keys
from serve_app.types import BlockKey, ModelId

_PROMPT_TOKENS: Final = 3072  # a conversation that is longer has ended
_TURN_TOKENS: Final = (500, 1500)
_DOCUMENTS: Final = 50  # beginnings that all engines share
_OPEN: Final = 4  # requests that an engine has at once
_REPLAY_BATCHES: Final = (
    1000  # vLLM's default of 10,000 takes half an hour to fill at this rate: it would look like a leak
)
_GONE_MAX: Final = 2000  # removed blocks that are asked for at each comparison
_PROBE_S: Final = 1.0
_DEBT_MAX_S: Final = 2.0  # events that a busy machine could not send are not made up for beyond this


def fresh(dice: random.Random, count: int) -> array[int]:
    return array("H", dice.randbytes(2 * count))


class Engine:
    """One pool, its conversations, its sockets."""

    def __init__(self, config: EnginesConfig, pod: str) -> None:
        size = config.block_size
        self.pod, self._size = pod, size
        self._dice = random.Random(pod)
        self._root = namespace_key(ModelId(config.model), size)
        self._hasher = kv_cache_utils.get_request_block_hasher(size, sha256)
        spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=16, dtype=torch.float32)
        self._manager = KVCacheManager(
            KVCacheConfig(
                num_blocks=config.blocks + 1,  # the null block
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            max_model_len=2 * _PROMPT_TOKENS,
            scheduler_block_size=size,
            hash_block_size=size,
            max_in_flight_tokens=2 * _PROMPT_TOKENS,
            enable_caching=True,
            enable_kv_cache_events=True,
        )
        self._sender = ZmqEventPublisher(
            0, events(config.folder, pod), replay(config.folder, pod), buffer_steps=_REPLAY_BATCHES
        )
        self._talks: list[array[int]] = []
        self._talks_max = max(4, config.blocks // 40)
        self._open: deque[Request] = deque()
        self._blocks_max = config.blocks
        self._keys: dict[bytes, BlockKey] = {}  # vLLM's hash -> ours, of blocks that are or were in the pool
        self._gone: deque[BlockKey] = deque(maxlen=_GONE_MAX)
        self._served = 0
        self.stored = self.removed = 0  # blocks
        self.paused = False
        self.last_stored: BlockKey | None = None  # by the last request; None: it stored nothing

    def serve(self) -> tuple[int, int]:
        """One request. Returns events sent, and blocks stored."""
        tokens = self._next_prompt()
        sampling = SamplingParams(max_tokens=1)
        self._served += 1
        request = Request(f"{self._served}", tokens.tolist(), sampling, None, block_hasher=self._hasher)
        manager = self._manager
        manager.new_step_starts()
        known, hit, boundary, *_ = manager.get_computed_blocks(request)
        request.shared_prefix_boundary = boundary
        if manager.allocate_slots(request, request.num_tokens - hit, hit, known) is None:
            raise RuntimeError(f"{self.pod}: the pool is too small for {_OPEN} requests")
        request.num_computed_tokens = request.num_tokens
        keys = split_keys(block_keys(pack_tokens(tokens), self._size, self._root))
        first = hit // self._size
        self._keys.update(zip(request.block_hashes[first:], keys[first:], strict=True))
        self.last_stored = keys[-1] if first < len(keys) else None
        self._open.append(request)
        if len(self._open) > _OPEN:
            manager.free(self._open.popleft())
        if len(self._keys) > 2 * self._blocks_max:
            self._prune()
        return self._send(), max(0, len(keys) - first)

    def clear(self) -> int:
        """As `/reset_prefix_cache`. Returns events sent."""
        while self._open:
            self._manager.free(self._open.popleft())
        assert self._manager.reset_prefix_cache()
        return self._send()

    def holds(self) -> tuple[bytes, bytes]:
        """Keys of all blocks that the pool holds, and of some that it lately did and does not any more; packed."""
        self._prune()
        held = set(self._keys.values())
        return b"".join(held), b"".join({key for key in self._gone if key not in held})

    def close(self) -> None:
        self._sender.shutdown()

    def _prune(self) -> None:
        """Ask the pool for each block."""
        pool = self._manager.block_pool
        for name in [name for name in self._keys if pool.get_cached_block(name, [0]) is None]:
            self._gone.append(self._keys.pop(name))

    def _send(self) -> int:
        some = self._manager.take_events()
        if some:
            for event in some:
                if isinstance(event, BlockStored):
                    self.stored += len(event.block_hashes)
                else:
                    self.removed += len(getattr(event, "block_hashes", ()))
            self._sender.publish(KVEventBatch(ts=time.time(), events=some))
        return len(some)

    def _next_prompt(self) -> array[int]:
        dice, talks = self._dice, self._talks
        turn = fresh(dice, dice.randint(*_TURN_TOKENS))
        if talks and (dice.random() < 0.6 or len(talks) >= self._talks_max):
            at = dice.randrange(len(talks))
            if dice.random() < 0.15:  # asked again: of full blocks, vLLM computes the last one anew and has it twice
                return talks[at][: len(talks[at]) // self._size * self._size]
            talk = talks[at] + turn
            if len(talk) < _PROMPT_TOKENS:
                talks[at] = talk
            else:
                talks[at] = talks[-1]
                talks.pop()
            return talk
        document = fresh(random.Random(f"document {dice.randrange(_DOCUMENTS)}"), 512)
        talks.append(document + turn)
        return talks[-1]


class Engines:
    """The loop: so many events a second, spread over all engines, as fast as the machine can."""

    def __init__(self, config: EnginesConfig) -> None:
        self._config = config
        self._engines = {pod: Engine(config, pod) for pod in config.pods}
        self._turn = 0
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._control = context.socket(zmq.REP)
        self._control.bind(control(config.folder, config.name))
        self._probes = context.socket(zmq.PUSH)
        self._probes.connect(probes(config.folder))
        self._dice = random.Random(config.name)
        self._sent = 0  # events
        self._running = False
        self._credit = 0.0
        self._at_s = self._probe_at_s = 0.0
        self._clears: Iterator[tuple[float, Engine]] = iter(())
        self._clear_at_s, self._clear_next = math.inf, next(iter(self._engines.values()))

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        while True:
            ready = dict(poller.poll(0 if self._credit > 0 else 2))
            if sys.stdin.fileno() in ready:
                break
            if self._control in ready:
                question = msgspec.msgpack.decode(self._control.recv())
                self._control.send(msgspec.msgpack.encode(self._answer(question)))
            if self._running:
                self._work(time.monotonic())
        for engine in self._engines.values():
            engine.close()

    def _answer(self, question: dict[str, Any]) -> Any:
        match question:
            case {"what": "run"}:
                self._running, self._at_s = True, time.monotonic()
                self._clears = self._clear_times(self._at_s)
                self._clear_at_s, self._clear_next = next(self._clears)
            case {"what": "stop"}:
                self._running = False
                engines = self._engines.values()
                return {
                    "events": self._sent,
                    "stored": sum(engine.stored for engine in engines),
                    "removed": sum(engine.removed for engine in engines),
                }
            case {"what": "pause", "pod": pod}:
                self._engines[pod].paused = True
                return self._engines[pod].holds()
            case {"what": "resume", "pod": pod}:
                self._engines[pod].paused = False
        return None

    def _clear_times(self, start_s: float) -> Iterator[tuple[float, Engine]]:
        """When whose prefix cache is reset: each once, and then the first one again and again."""
        first_s, last_s = self._config.clear_all_s
        engines = list(self._engines.values())
        for i, engine in enumerate(engines):
            yield start_s + first_s + (last_s - first_s) * i / len(engines), engine
        for i in itertools.count(1):
            yield start_s + last_s + i * self._config.clear_every_s, engines[0]

    def _work(self, now_s: float) -> None:
        rate = self._config.events_per_s
        self._credit = min(self._credit + rate * (now_s - self._at_s), rate * _DEBT_MAX_S)
        self._at_s = now_s
        if self._credit <= 0:
            return
        self._turn = (self._turn + 1) % len(self._config.pods)
        engine = self._engines[self._config.pods[self._turn]]
        if engine.paused:
            return
        before_s = time.monotonic()
        if now_s >= self._clear_at_s and not self._clear_next.paused:
            self._sent += self._clear_next.clear()
            self._clear_at_s, self._clear_next = next(self._clears)
            return
        count, stored = engine.serve()
        self._sent += count
        self._credit -= max(count, stored)  # while a pool fills up nothing is removed: a block counts as an event
        if now_s >= self._probe_at_s and engine.last_stored:
            self._probe_at_s = now_s + _PROBE_S * self._dice.uniform(0.5, 1.5)
            self._probes.send(msgspec.msgpack.encode((engine.pod, engine.last_stored, before_s)), zmq.NOBLOCK)


def main() -> None:
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EnginesConfig)
    kv_cache_utils.init_none_hash(sha256)
    engines = Engines(config)
    gc.freeze()  # the pools' blocks live as long as the process: looking for garbage among them stops all engines
    engines.run()


if __name__ == "__main__":
    main()
