"""Pods that hold prompts, and the prompts: the same for every system that is asked."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from serve_app.blocks import KEY_BYTES
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.redis_writer import RedisWriter
from serve_app.model import resolve_model
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import EncodedPrompt, PrefixStore
from serve_app.types import GPU, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId

MODEL: Final = ModelId("bench")
BLOCK_SIZE: Final = 16
SIZES: Final = {"1k": 1_000, "9k": 9_000, "60k": 60_000}
_WORDS: Final = Path(__file__).read_text().split()


class Fleet:
    """Pods that have published, and the prompts that they hold."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spec = EngineSpec(MODEL, BLOCK_SIZE, resolve_model("builtin:smollm2-135m-instruct"))
        self._store = PrefixStore(1 << 29)
        self._encoder = PromptEncoder(self.spec, self._store)
        self.writer = RedisWriter(url, MODEL, lease_ttl_s=3600)
        self.bodies = {name: body(tokens, random.Random(name)) for name, tokens in SIZES.items()}
        self.held: dict[str, dict[str, int]] = {}  # pod -> prompt -> blocks from its beginning
        self._epochs: dict[str, Epoch] = {}

    def join(self, count: int) -> None:
        """So many pods; the i-th holds a share of each prompt."""
        for i in range(len(self._epochs), count):
            pod, epoch = f"pod-{i:02}", Epoch(time.time_ns() // 1_000_000)
            self._epochs[pod] = epoch
            self.writer.join(Domain(DomainId(pod), epoch, self.spec, PodId(pod), address=f"10.0.0.{i}:8000"))
            self.held[pod] = {}
            for name, asked in self.bodies.items():
                keys = self.encoded(asked).block_keys
                blocks = self.held[pod][name] = len(keys) // KEY_BYTES * (i + 1) // count
                self.writer.add(DomainId(pod), epoch, GPU, keys[: blocks * KEY_BYTES])
            self.writer.flush()
        self._beat()

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Every pod says so once a second, as publishers do. Nothing else may be written meanwhile."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(1.0):
                self._beat()

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _beat(self) -> None:
        for pod, epoch in self._epochs.items():
            self.writer.heartbeat(DomainId(pod), HeartbeatRecord(epoch))

    def fill(self, blocks: int) -> None:
        """So many more blocks at the first pod."""
        rng, pod = random.Random(0), "pod-00"
        for _ in range(blocks // 10_000):
            self.writer.add(DomainId(pod), self._epochs[pod], GPU, rng.randbytes(80_000))
            self.writer.flush()

    def encoded(self, asked: bytes) -> EncodedPrompt:
        (prepared,) = self._encoder.prepare(json.loads(asked))
        return self._encoder.finish(prepared, self._encoder.tokenize(prepared.missing))

    def stored_bytes(self, asked: bytes) -> int:
        """What a prompt takes of a prefix store that does not know it."""
        before = self._store.stats().bytes
        self.encoded(asked)
        return self._store.stats().bytes - before

    def token_ids(self) -> dict[str, list[int]]:
        """Of each prompt."""
        return {name: self.encoded(asked).token_ids() for name, asked in self.bodies.items()}


def body(tokens: int, rng: random.Random) -> bytes:
    """A chat of about so many tokens."""
    words = rng.choices(_WORDS, k=tokens // 3)
    turns: list[dict[str, str]] = []
    for start in range(0, len(words), 300):
        role = "user" if len(turns) % 2 == 0 else "assistant"
        turns.append({"role": role, "content": " ".join(words[start : start + 300])})
    return json.dumps({"model": MODEL, "messages": turns[: len(turns) - (len(turns) + 1) % 2]}).encode()
