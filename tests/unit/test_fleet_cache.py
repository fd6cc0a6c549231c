"""The simulator's paged cache: the same as vLLM's own BlockPool on random histories, and its invariants."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.fleet.cache import BlockCache, CacheEvent, HostTier
from benchmarks.fleet.workloads import Keys
from serve_app.types import BlockKey

SIZE = 16


class VllmPool:
    """vLLM's BlockPool behind the calls of BlockCache. Its first block is the null block, so numbers are one higher."""

    def __init__(self, capacity: int) -> None:
        from vllm.v1.core.block_pool import BlockPool

        self.pool = BlockPool(capacity + 1, True, SIZE, enable_kv_cache_events=True)
        self.counts: dict[BlockKey, int] = {}  # the publisher's: copies of a key

    def match(self, keys: list[BlockKey]) -> list[Any]:
        blocks = []
        for key in keys:
            found = self.pool.get_cached_block(key, [0])
            if found is None:
                break
            blocks += found
        return blocks

    def store(self, blocks: list[Any], keys: list[BlockKey], cached: int, full: int) -> None:
        request = SimpleNamespace(
            block_hashes=keys,
            all_token_ids=[0] * SIZE * len(keys),
            lora_request=None,
            mm_features=[],
            cache_salt=None,
            prompt_embeds=None,
        )
        self.pool.cache_full_blocks(request, blocks, cached, full, SIZE, 0)

    def held(self) -> set[BlockKey]:
        """What a follower who counts copies believes, after all events so far."""
        for event in self.pool.take_events():
            step = 1 if type(event).__name__ == "BlockStored" else -1
            for key in event.block_hashes:
                self.counts[key] = self.counts.get(key, 0) + step
        return {key for key, count in self.counts.items() if count}


@pytest.mark.parametrize("seed", range(8))
def test_equals_vllm_block_pool(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with shared and repeated prompts come, grow and go; after every move both caches are the same."""
    import vllm.v1.core.block_pool as vllm_pool

    monkeypatch.setattr(vllm_pool, "maybe_convert_block_hash", lambda key: key)  # whole keys, not shortened to 64 bits
    rng, keys = random.Random(seed), Keys()
    prompts = [[*shared, *keys.fresh(rng.randint(1, 6))] for shared in (keys.fresh(5), keys.fresh(9)) for _ in range(4)]
    ours, theirs = BlockCache(40), VllmPool(40)
    believed: set[BlockKey] = set()
    running: list[tuple[list[BlockKey], list[int], list[Any]]] = []
    for _ in range(400):
        if running and rng.random() < 0.45:
            _prompt, our_blocks, their_blocks = running.pop(rng.randrange(len(running)))
            ours.free(our_blocks)
            theirs.pool.free_blocks(reversed(their_blocks))
        else:
            prompt = [*rng.choice(prompts), *keys.fresh(rng.randint(0, 3))]
            ours_hit = ours.match(prompt, len(prompt) - 1)
            theirs_hit = theirs.match(prompt[:-1])
            assert [block.block_id - 1 for block in theirs_hit] == ours_hit
            new = len(prompt) - len(ours_hit) + 1  # and one block that is not full
            if new + ours.idle_among(ours_hit) > ours.free_blocks:
                continue
            ours.touch(ours_hit)
            theirs.pool.touch(theirs_hit)
            our_blocks = ours_hit + ours.allocate(new)
            their_blocks = theirs_hit + theirs.pool.get_new_blocks(new)
            ours.store(our_blocks[len(ours_hit) : len(prompt)], prompt[len(ours_hit) :])
            theirs.store(their_blocks, prompt, len(ours_hit), len(prompt))
            running.append((prompt, our_blocks, their_blocks))
        free = [block.block_id - 1 for block in theirs.pool.free_block_queue.get_all_free_blocks()]
        assert ours.free_order() == free
        for stored, changed in ours.take_events():
            believed = believed | set(changed) if stored else believed - set(changed)
        assert believed == ours.keys() == theirs.held()


def test_a_key_goes_with_its_last_copy() -> None:
    key, other, third = Keys().fresh(3)
    cache = BlockCache(3)
    first, second = cache.allocate(1), cache.allocate(1)
    cache.store(first, [key])
    cache.store(second, [key])
    assert cache.take_events() == [CacheEvent(True, [key])]
    cache.free(first)
    cache.store(cache.allocate(1), [other])
    cache.store(cache.allocate(1), [third])  # takes the first copy's block
    assert cache.take_events() == [CacheEvent(True, [other]), CacheEvent(True, [third])]
    assert cache.match([key], 1) == second
    cache.free(second)
    cache.allocate(1)
    assert cache.take_events() == [CacheEvent(False, [key])]


def test_host_tier_keeps_the_most_recently_used() -> None:
    keys = Keys().fresh(5)
    host = HostTier(3)
    host.store(keys[:3])
    host.touch(keys[:1])
    host.store(keys[3:4])
    assert host.keys() == {keys[0], keys[2], keys[3]}
    assert host.take_events() == [
        CacheEvent(True, list(keys[:3])),
        CacheEvent(True, [keys[3]]),
        CacheEvent(False, [keys[1]]),
    ]
    assert host.match(keys, 2, 5) == 2
