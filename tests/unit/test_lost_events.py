"""Lost events are made up for: against an engine that evicts as vLLM's pool does.

The engine here is a model of that pool, small enough to see that it is right; what is tested is EngineBlocks.
"""

from __future__ import annotations

import random

import pytest

from serve_app.blocks import block_keys, namespace_key, pack_tokens, split_keys
from serve_app.events.engine_blocks import Added, Cleared, EngineBlocks, Removed
from serve_app.events.wire import AllBlocksCleared, BlockRemoved, BlockStored, Event
from serve_app.types import GPU, BlockKey, ModelId

MODEL = ModelId("m")
SIZE = 2
CAPACITY = 40  # blocks
ROOT = namespace_key(MODEL, SIZE)


class LruPool:
    """Blocks by the last use of them, the next to be evicted first; a prompt's tail is older than its start."""

    def __init__(self) -> None:
        self.held: dict[BlockKey, bytes] = {}  # canonical key -> what the engine calls it

    def ask(self, tokens: list[int]) -> list[Event]:
        """Serve one prompt: the events that this causes."""
        keys = split_keys(block_keys(pack_tokens(tokens), SIZE, ROOT))
        hit = next((i for i, key in enumerate(keys) if key not in self.held), len(keys))
        for key in keys[:hit]:
            self.held[key] = self.held.pop(key)  # in use: not to be evicted for this prompt
        events: list[Event] = []
        for _ in range(max(0, len(self.held) + len(keys) - hit - CAPACITY)):
            events.append(BlockRemoved([self.held.pop(next(iter(self.held)))], "GPU"))
        for key in reversed(keys):
            self.held.pop(key, None)
            self.held[key] = b"engine" + key
        if hit < len(keys):
            parent = b"engine" + keys[hit - 1] if hit else None
            stored: list[bytes | int] = [b"engine" + key for key in keys[hit:]]
            events.append(BlockStored(stored, parent, tokens[hit * SIZE : len(keys) * SIZE], SIZE, medium="GPU"))
        return events


def prompt(rng: random.Random) -> list[int]:
    """One of three system prompts, one of many questions."""
    return [rng.randrange(3)] * (4 * SIZE) + [10 + rng.randrange(60)] * (rng.randrange(5) * SIZE)


@pytest.mark.parametrize("seed", range(30))
def test_after_the_doubt_nothing_is_promised_that_is_not_there(seed: int) -> None:
    rng = random.Random(seed)
    pool, blocks, published = LruPool(), EngineBlocks(MODEL, SIZE, CAPACITY), set[BlockKey]()

    def serve(count: int, *, heard: bool = True) -> None:
        for _ in range(count):
            events = pool.ask(prompt(rng))
            for change in blocks.apply(events) if heard else ():
                match change:
                    case Added(_, keys):
                        assert published.isdisjoint(split_keys(keys))  # a change is a change
                        published.update(split_keys(keys))
                    case Removed(_, keys):
                        assert published.issuperset(split_keys(keys))
                        published.difference_update(split_keys(keys))
                    case Cleared():
                        published.clear()
            assert published == set(split_keys(blocks.snapshot().get(GPU, b"")))
            assert len(published) == len(blocks) <= 2 * CAPACITY

    serve(60)
    assert published == pool.held.keys()
    serve(30, heard=False)
    blocks.doubt()
    assert published != pool.held.keys()
    while blocks.degraded:
        serve(1)
    assert published <= pool.held.keys()
    serve(200)
    assert published <= pool.held.keys()
    assert len(published) >= 0.9 * len(pool.held)  # a prompt in use may still be unknown
    blocks.doubt()
    blocks.apply([AllBlocksCleared()])
    assert not blocks.degraded


def test_a_prompt_in_use_survives_and_brings_its_whole_prefix_along() -> None:
    blocks = EngineBlocks(MODEL, SIZE, capacity=4)
    k1, k2, k3 = split_keys(block_keys(pack_tokens([1, 2, 3, 4, 5, 6]), SIZE, ROOT))
    blocks.apply([BlockStored([b"a", b"b"], None, [1, 2, 3, 4], SIZE), BlockStored([b"x"], None, [9, 9], SIZE)])
    blocks.doubt()
    assert blocks.apply([BlockStored([b"c"], b"b", [5, 6], SIZE)]) == [Added(GPU, k3)]
    changes = blocks.apply([BlockStored([b"d", b"e", b"f"], None, [7, 7, 8, 8, 7, 8], SIZE)])
    assert not blocks.degraded
    assert isinstance(changes[-1], Removed)
    held = set(split_keys(blocks.snapshot()[GPU]))
    assert {k1, k2, k3} < held
    assert len(held) == 6  # x was dropped
    assert blocks.apply([BlockRemoved([b"b"]), BlockRemoved([b"x"])]) == [Removed(GPU, k2)]


def test_how_much_is_unused_is_not_known_in_doubt_or_without_the_capacity() -> None:
    pool, blocks, unknown = LruPool(), EngineBlocks(MODEL, SIZE, CAPACITY), EngineBlocks(MODEL, SIZE)
    events = pool.ask([1] * (4 * SIZE))
    blocks.apply(events)
    unknown.apply(events)
    assert (blocks.unused, unknown.unused) == (CAPACITY - 1 - len(pool.held), 0)
    blocks.doubt()
    assert blocks.unused == 0
    blocks.clear()
    assert blocks.unused == CAPACITY - 1


def test_without_a_known_capacity_the_doubt_stays() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    blocks.doubt()
    for token in range(1000):
        blocks.apply([BlockStored([b"%d" % token], None, [token, token], SIZE)])
    assert blocks.degraded
