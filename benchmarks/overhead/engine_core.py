"""The simulated engine's core: request bodies -> token ids -> prefix cache blocks -> KV events, as vLLM sends them.

In: the configuration as the first line of stdin, then request bodies on a ZMQ socket. Out: `BlockStored` events through
vLLM's own `ZmqEventPublisher`, with block hashes by vLLM's own function; and a file with the number of bodies that
were learned, so that the benchmark knows when nothing is left to do.

Like vLLM's engine core it is a process of its own beside the HTTP server. It has a lower priority than what is
measured, because in real life it does not run on the router's machine. The cache has no bounds: nothing is removed.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

_NICE: Final = 10


class CoreConfig(msgspec.Struct, frozen=True):
    requests: str  # ZMQ address on which bodies come
    counter: str  # file
    events: str  # ZMQ address of the events
    replay: str
    model_path: str
    model: str
    block_size: int  # tokens


class PrefixCache:
    """The blocks that the engine holds, and the events that tell of new ones."""

    def __init__(self, config: CoreConfig) -> None:
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core import kv_cache_utils

        from serve_app.prompts.encoder import PromptEncoder
        from serve_app.prompts.prefix_store import PrefixStore
        from serve_app.types import EngineSpec, ModelId

        self._size = config.block_size
        self._encoder = PromptEncoder(
            EngineSpec(ModelId(config.model), config.block_size, config.model_path), PrefixStore(1 << 30)
        )
        self._vllm = kv_cache_utils
        self._hash = sha256_cbor
        kv_cache_utils.init_none_hash(sha256_cbor)
        self._held: dict[tuple[bytes, bytes], bytes] = {}  # (hash of the parent, own token ids) -> hash of the block

    def learn(self, body: bytes) -> list[Any]:
        """Events for what is new in the prompts of a request."""
        return [event for prompt in self._encoder.encode(json.loads(body)) for event in self._store(prompt.token_ids())]

    def _store(self, token_ids: Sequence[int]) -> Iterator[Any]:
        from vllm.distributed.kv_events import BlockStored

        blocks = len(token_ids) // self._size
        packed = array("I", token_ids).tobytes()
        width = len(packed) // len(token_ids) * self._size if token_ids else 0
        parent = b""  # of the first block
        held = 0
        while held < blocks and (known := self._held.get((parent, packed[held * width : (held + 1) * width]))):
            parent = known
            held += 1
        if held == blocks:
            return
        external = self._vllm.maybe_convert_block_hash
        before = external(parent) if parent else None
        hashes = []
        for i in range(held, blocks):
            tokens = token_ids[i * self._size : (i + 1) * self._size]
            own = self._vllm.hash_block_tokens(self._hash, parent or None, tokens)
            self._held[parent, packed[i * width : (i + 1) * width]] = own
            hashes.append(external(own))
            parent = own
        yield BlockStored(
            block_hashes=hashes,
            parent_block_hash=before,
            token_ids=list(token_ids[held * self._size : blocks * self._size]),
            block_size=self._size,
            lora_id=None,
            medium="GPU",
            lora_name=None,
        )


def main() -> None:
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=CoreConfig)
    os.nice(_NICE)
    # Bound before the slow imports, so that bodies which come early wait in the socket.
    bodies: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    bodies.setsockopt(zmq.RCVHWM, 0)
    bodies.bind(config.requests)
    from vllm.distributed.kv_events import KVEventBatch, ZmqEventPublisher

    publisher = ZmqEventPublisher(0, config.events, config.replay)
    cache = PrefixCache(config)
    counter = Path(config.counter)
    learned = 0
    counter.write_text("0")
    poller = zmq.Poller()
    poller.register(bodies, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while sys.stdin.fileno() not in (ready := dict(poller.poll())):  # its end: the HTTP process is gone
        if bodies in ready:
            if events := cache.learn(bodies.recv()):
                publisher.publish(KVEventBatch(ts=0.0, events=events))
            learned += 1
            counter.write_text(str(learned))
    publisher.shutdown()
    for path in (counter, Path(config.requests.removeprefix("ipc://"))):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
