"""The paged KV cache of one replica: vLLM's block pool, with block keys in place of hashes.

In: keys to look up, blocks to allocate, store and free. Out: block numbers, and `events`, what was stored and removed
since they were last taken. Source: vllm/v1/core/block_pool.py and FreeKVCacheBlockQueue of vLLM 0.29:

- a block with references is never evicted; one without waits in the free queue, and may be hit there;
- freed blocks with a key join the queue's end, last block of the sequence first, so that tails go before heads; those
  without a key go to its front, to be used first;
- equal blocks are not merged: a key may have several copies, and the oldest one is hit.

vLLM reports each copy; as our publisher does (serve_app/events/engine_blocks.py), `events` tells of the first copy's
coming and the last one's going. tests/unit/test_fleet_cache.py compares this class with vLLM's own on random histories.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from serve_app.types import BlockKey


class CacheEvent(NamedTuple):
    stored: bool  # False: removed
    keys: list[BlockKey]


_CHUNK = 64  # keys looked up at a time, so that an unknown prompt costs little


class BlockCache:
    """Args: capacity_blocks: blocks of KV memory."""

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.events: list[CacheEvent] = []
        self._references = [0] * capacity_blocks
        self._key_of: list[BlockKey | None] = [None] * capacity_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(capacity_blocks))  # next to be used first
        self._cached: dict[BlockKey, int] = {}
        self._copies: dict[BlockKey, list[int]] = {}  # only for keys with more than one copy, oldest first

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def unused_blocks(self) -> int:
        """Blocks that hold nothing that could be hit."""
        return self.capacity_blocks - len(self._cached)

    def match(self, keys: Sequence[BlockKey], limit: int) -> list[int]:
        """Blocks that hold the longest known prefix of `keys[:limit]`."""
        found: list[int] = []
        get = self._cached.get
        for start in range(0, limit, _CHUNK):
            part = list(map(get, keys[start : min(start + _CHUNK, limit)]))
            if None in part:
                part = part[: part.index(None)]
                found += part  # type: ignore[arg-type]
                break
            found += part  # type: ignore[arg-type]
        return found

    def idle_among(self, blocks: Sequence[int]) -> int:
        """How many of the blocks have no reference: touching them takes them out of the free queue."""
        return list(map(self._references.__getitem__, blocks)).count(0)

    def touch(self, blocks: Sequence[int]) -> None:
        references, free = self._references, self._free
        for block in blocks:
            if not references[block]:
                del free[block]
            references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, evicting what they held. The caller has checked `free_blocks`."""
        references, key_of, pop = self._references, self._key_of, self._free.popitem
        taken = []
        for _ in range(count):
            block, _none = pop(last=False)
            key = key_of[block]
            if key is not None:
                self._evict(block, key)
            references[block] = 1
            taken.append(block)
        return taken

    def store(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """The blocks are full now and hold what the keys stand for."""
        key_of, cached = self._key_of, self._cached
        new = []
        for block, key in zip(blocks, keys, strict=True):
            key_of[block] = key
            if key in cached:
                self._copies.setdefault(key, [cached[key]]).append(block)
            else:
                cached[key] = block
                new.append(key)
        if new:
            self.events.append(CacheEvent(True, new))

    def free(self, blocks: Sequence[int]) -> None:
        """Give up a sequence's blocks, in the order of the sequence."""
        references, key_of, free = self._references, self._key_of, self._free
        unkeyed = []
        for block in reversed(blocks):
            left = references[block] - 1
            references[block] = left
            if not left:
                if key_of[block] is None:
                    unkeyed.append(block)
                else:
                    free[block] = None
        for block in reversed(unkeyed):
            free[block] = None
            free.move_to_end(block, last=False)

    def take_events(self) -> list[CacheEvent]:
        events, self.events = self.events, []
        return events

    def keys(self) -> set[BlockKey]:
        """Everything cached, for tests."""
        return set(self._cached)

    def free_order(self) -> list[int]:
        """The free queue, for tests."""
        return list(self._free)

    def _evict(self, block: int, key: BlockKey) -> None:
        self._key_of[block] = None
        copies = self._copies.get(key)
        if copies is not None:
            copies.remove(block)
            self._cached[key] = copies[0]
            if len(copies) == 1:
                del self._copies[key]
            return
        del self._cached[key]
        events = self.events
        if events and not events[-1].stored:
            events[-1].keys.append(key)
        else:
            events.append(CacheEvent(False, [key]))


class SharedCache(BlockCache):
    """The oracle's: one store of infinite size that all replicas share. Nothing is ever evicted or reported."""

    def __init__(self, known: set[BlockKey]) -> None:
        super().__init__(0)
        self._known = known

    @property
    def free_blocks(self) -> int:
        return 1 << 60

    @property
    def unused_blocks(self) -> int:
        """Blocks that hold nothing that could be hit."""
        return self.capacity_blocks - len(self._cached)

    def match(self, keys: Sequence[BlockKey], limit: int) -> list[int]:
        found = 0
        while found < limit and keys[found] in self._known:
            found += 1
        return [0] * found

    def idle_among(self, blocks: Sequence[int]) -> int:
        return 0

    def touch(self, blocks: Sequence[int]) -> None:
        pass

    def allocate(self, count: int) -> list[int]:
        return [0] * count

    def store(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> None:
        self._known.update(keys)

    def free(self, blocks: Sequence[int]) -> None:
        pass


class HostTier:
    """Blocks offloaded to CPU memory: written through when they are full, least recently used evicted.

    As vLLM's native offloading: a prompt's hit goes on here where the GPU's ends, and loading refreshes the blocks.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.events: list[CacheEvent] = []
        self._blocks: OrderedDict[BlockKey, None] = OrderedDict()  # least recently used first

    def match(self, keys: Sequence[BlockKey], start: int, limit: int) -> int:
        """How many of `keys[start:limit]` are held without a gap."""
        at = start
        while at < limit and keys[at] in self._blocks:
            at += 1
        return at - start

    def store(self, keys: Sequence[BlockKey]) -> None:
        new = [key for key in keys if key not in self._blocks]
        self.touch([key for key in keys if key in self._blocks])
        for key in new:
            self._blocks[key] = None
        if new:
            self.events.append(CacheEvent(True, new))
        over = len(self._blocks) - self.capacity_blocks
        if over > 0:
            self.events.append(CacheEvent(False, [self._blocks.popitem(last=False)[0] for _ in range(over)]))

    def touch(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            self._blocks.move_to_end(key)

    def take_events(self) -> list[CacheEvent]:
        events, self.events = self.events, []
        return events

    def keys(self) -> set[BlockKey]:
        return set(self._blocks)
