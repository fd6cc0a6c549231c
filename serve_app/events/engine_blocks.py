"""Typed KV events -> changes of what one engine holds, in canonical block keys.

In: events of one engine, in order. Out: `Change`s that a reader can apply as set operations.

An engine may hold a block twice (vLLM does not de-duplicate: two equal prompts at once, or a prompt whose last block
is recomputed to get logits) and then reports it stored twice and removed twice. So every key has a count, and a
change is made only when it goes from 0 to 1 or back:

    stored k, stored k, removed k, removed k  ->  add k, -, -, remove k

Larger blocks are re-chunked to the canonical size:

    canonical 32, LMCache chunk 64: 1 engine hash -> 2 canonical keys, both gone when the chunk is removed

vLLM's file and object stores say what they store (`medium: STORAGE`) and never what they delete. Such a tier would be
believed for ever, and grow for ever: its stores are skipped, and counted.

After events were lost (`doubt`) the set may hold blocks that are gone, and lack some that are there. From then on:

1. Blocks from before are old. One stored again, or named as the parent of one stored now, is confirmed with all that
   it follows: vLLM hands a request's blocks to the cache while the request holds its whole prefix. Copies are counted
   from 1 again, and a removal of an old block drops it whatever its count was.
2. The GPU holds `capacity` blocks. Of more than that the oldest unconfirmed ones are dropped.
3. When as many blocks as `capacity` have been stored, all that is still old is dropped, and the doubt is over.

What is left is held for certain, whatever the engine's way to evict: a count starts at a copy that is known, rises
by one for a copy that was stored, and falls by one, or to zero, for each removed; so it is never above the truth.
What was dropped was gone, or has not been needed: among `capacity` stores one of vLLM's blocks was filled twice, and
in between it went through the whole queue of free blocks, which is popped at the head and filled at the tail. Whatever
was free all that time was ahead of it, and has been evicted. The exception is a block that was in use meanwhile without
a block stored after it (a prompt known to the end, asked again and again): it lives on and is not seen, until a child
of it is stored. That, and a block stored during the gap, is under-reported: a prefill may be repeated, a cache hit is
never promised in vain. A child of an unknown parent shows such a block, so it starts the count of 3 again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import msgspec

from serve_app.blocks import KEY_BYTES, block_keys, namespace_key, pack_tokens, split_keys
from serve_app.events.wire import BlockRemoved, BlockStored, Event
from serve_app.types import GPU, BlockKey, BlockKeys, EngineHash, ModelId, Tier

_NEW: Final = object()
_NEVER_REMOVED: Final = frozenset({Tier("storage")})  # vLLM 0.29, v1/kv_offload/tiering: no event with removed=True


@dataclass(frozen=True, slots=True)
class Added:
    tier: Tier
    keys: BlockKeys


@dataclass(frozen=True, slots=True)
class Removed:
    tier: Tier
    keys: BlockKeys


@dataclass(frozen=True, slots=True)
class Cleared:
    """Every tier of the domain is empty."""


Change = Added | Removed | Cleared


class EngineBlocks:
    """The authoritative set of blocks of one engine.

    Args:
        model: base model id; names the key space.
        block_size: tokens per canonical block. Events whose block size is no multiple of it are skipped.
        counted: whether a block that is stored twice is there until it is removed twice. An LMCache server says that it
            stored a chunk once for each rank that wrote its part, and the chunk is gone with the first part.
        capacity: blocks that the engine's GPU cache has; 0: unknown, and a doubt ends only when everything is cleared.
    """

    def __init__(self, model: ModelId, block_size: int, capacity: int = 0, *, counted: bool = True) -> None:
        self.model = model
        self.block_size = block_size
        self.capacity = capacity
        self.degraded = False  # events were lost, and not yet made up for
        self._counted = counted
        self.skipped: Counter[str] = Counter()
        self._keys_of: dict[EngineHash, BlockKeys] = {}  # its canonical keys
        self._parents: dict[EngineHash, EngineHash] = {}
        self._held: dict[Tier, dict[BlockKey, int]] = {}  # copies of each block, by tier
        self._old: dict[Tier, dict[BlockKey, None]] = {}  # in doubt, and in no `_held`; oldest first
        self._stored_since = 0  # GPU blocks stored since the doubt began

    def apply(self, events: Iterable[Event]) -> list[Change]:
        """Apply events in order; what cannot be understood is skipped and counted in `skipped`."""
        changes: list[Change] = []
        removals: list[BlockRemoved] = []  # consecutive ones: a full engine says so for each block by itself
        for event in events:
            if isinstance(event, BlockRemoved):
                removals.append(event)
                continue
            if removals:
                changes.extend(self._removed(removals))
                removals = []
            changes.extend(self._stored(event) if isinstance(event, BlockStored) else self._cleared())
        if removals:
            changes.extend(self._removed(removals))
        if self.degraded and self.capacity:
            changes.extend(self._reconcile())
        return changes

    def clear(self) -> None:
        """Forget every block, as a restarted engine does."""
        self._keys_of.clear()
        self._parents.clear()
        self._held.clear()
        self._end_doubt()

    def doubt(self) -> None:
        """Events were lost: see the module."""
        self._forget_unheld()
        self.degraded = True
        self._stored_since = 0
        for tier, held in self._held.items():
            self._old.setdefault(tier, {}).update(dict.fromkeys(held))
        self._held.clear()

    def snapshot(self) -> dict[Tier, BlockKeys]:
        """All blocks held now, by tier."""
        tiers = self._old.keys() | self._held.keys()
        packed = {tier: b"".join((*self._old.get(tier, ()), *self._held.get(tier, ()))) for tier in tiers}
        return {tier: keys for tier, keys in packed.items() if keys}

    @property
    def unused(self) -> int:
        """Blocks of the GPU cache that hold nothing; 0 if that is not known."""
        if self.degraded:
            return 0
        return max(0, self.capacity - len(self._held.get(GPU, ())))

    def __len__(self) -> int:
        return sum(map(len, self._held.values())) + sum(map(len, self._old.values()))

    def _cleared(self) -> Iterator[Change]:
        """The engine has reset its prefix cache: that is its GPU's. What was offloaded can still be loaded."""
        gpu = b"".join((*self._held.pop(GPU, {}), *self._old.pop(GPU, {})))
        if not any(self._held.values()) and not any(self._old.values()):
            self.clear()
            yield Cleared()
            return
        self._forget_unheld()
        if gpu:
            yield Removed(GPU, gpu)

    def _stored(self, event: BlockStored) -> Iterator[Added]:
        if event.group_idx:  # hybrid models: the first group speaks for the block
            self.skipped["other_cache_group"] += 1
            return
        tier = _tier(event.medium)
        if tier in _NEVER_REMOVED:
            self.skipped["never_removed"] += 1
            return
        if event.block_size % self.block_size or event.block_size <= 0:
            self.skipped["block_size"] += 1
            return
        if len(event.token_ids) != len(event.block_hashes) * event.block_size:
            self.skipped["token_count"] += 1  # sliding-window groups leave blocks out
            return
        if event.extra_keys and len(event.extra_keys) != len(event.block_hashes):
            self.skipped["extra_keys"] += 1
            return
        parent = self._parent_key(event)
        if parent is None:
            self.skipped["unknown_parent"] += 1
            self._stored_since = 0
            return

        keys = block_keys(pack_tokens(event.token_ids), self.block_size, parent, self._extras(event))
        held = self._held.setdefault(tier, {})
        old = self._old.get(tier, {})
        added: list[BlockKey] = []
        before = event.parent_block_hash
        if tier == GPU:
            self._stored_since += len(event.block_hashes)
            if before is not None and (parent in old or (parent not in held and not self._holds(parent))):
                added = self._confirm(before, held, old)
        hashes, split = event.block_hashes, split_keys(keys)
        chain = hashes if before is None else [before, *hashes]
        self._parents.update(zip(chain[1:], chain, strict=False))
        per_hash = event.block_size // self.block_size
        own = split if per_hash == 1 else [b"".join(split[i : i + per_hash]) for i in range(0, len(split), per_hash)]
        self._keys_of.update(zip(hashes, own, strict=True))
        for key in split:
            copies = held.get(key, 0)
            held[key] = copies + 1 if self._counted else 1
            if not copies and (not old or old.pop(key, _NEW) is _NEW):
                added.append(key)
        if added:
            yield Added(tier, b"".join(added))

    def _removed(self, events: Iterable[BlockRemoved]) -> Iterator[Removed]:
        removed: dict[Tier, list[BlockKey]] = {}
        for event in events:
            if event.group_idx:
                self.skipped["other_cache_group"] += 1
                continue
            tier = _tier(event.medium)
            gone = removed.setdefault(tier, [])
            held, old = self._held.get(tier, {}), self._old.get(tier, {})
            for engine_hash in event.block_hashes:
                packed = self._keys_of.get(engine_hash)
                if packed is None:
                    self.skipped["unknown_block"] += 1
                    continue
                own = _split(packed)
                for key in own:
                    copies = held.get(key, 0)
                    if copies > 1:
                        held[key] = copies - 1
                    elif copies:
                        del held[key]
                        gone.append(key)
                    elif old.pop(key, _NEW) is not _NEW:
                        gone.append(key)
                if not self._holds(own[-1]):
                    del self._keys_of[engine_hash]
                    self._parents.pop(engine_hash, None)
        for tier, keys in removed.items():
            if keys:
                yield Removed(tier, b"".join(keys))

    def _forget_unheld(self) -> None:
        """Keep the names of what is held, in whatever tier."""
        self._keys_of = {name: keys for name, keys in self._keys_of.items() if self._holds(_last(keys))}
        self._parents = {name: parent for name, parent in self._parents.items() if name in self._keys_of}

    def _holds(self, key: BlockKey) -> bool:
        for held in self._held.values():  # plain loops: `any` makes a generator for every block removed
            if key in held:
                return True
        for old in self._old.values():  # noqa: SIM110
            if key in old:
                return True
        return False

    def _confirm(self, last: EngineHash | None, held: dict[BlockKey, int], old: dict[BlockKey, None]) -> list[BlockKey]:
        """`last` and all blocks that it follows are held. Those that had been dropped already are returned."""
        back: list[BlockKey] = []
        while last is not None and (packed := self._keys_of.get(last)) is not None:
            for key in split_keys(packed):
                if key not in held:
                    held[key] = 1
                    if old.pop(key, _NEW) is _NEW:
                        back.append(key)
            last = self._parents.get(last)
        return back

    def _reconcile(self) -> Iterator[Removed]:
        if self._stored_since >= self.capacity:
            dropped = {tier: b"".join(old) for tier, old in self._old.items()}
            self._end_doubt()
        else:
            old = self._old.get(GPU, {})
            excess = max(0, len(old) + len(self._held.get(GPU, ())) - self.capacity)
            oldest = list(islice(old, excess))
            for key in oldest:
                del old[key]
            dropped = {GPU: b"".join(oldest)}
        for tier, keys in dropped.items():
            if keys:
                yield Removed(tier, keys)

    def _end_doubt(self) -> None:
        self._old.clear()
        self.degraded = False

    def _parent_key(self, event: BlockStored) -> BlockKey | None:
        """Key of the block before the event's first one; None if the engine never told us of it."""
        if event.parent_block_hash is not None:
            packed = self._keys_of.get(event.parent_block_hash)
            return None if packed is None else _last(packed)
        return namespace_key(self.model, self.block_size, event.lora_name, self._salt(event))

    def _salt(self, event: BlockStored) -> str | None:
        """`cache_salt` of the request. vLLM puts it into the extra keys of block 0, after the LoRA name."""
        if not event.extra_keys:
            return None
        own = _without_lora(event.extra_keys[0], event.lora_name)
        return own[0] if len(own) == 1 and isinstance(own[0], str) else None

    def _extras(self, event: BlockStored) -> list[bytes] | None:
        """Per canonical block, what tells it apart beside its tokens (images, prompt embeddings); None if nothing.

        LoRA name and salt are in the namespace and left out here, so that a request's keys need no extras.
        """
        if not event.extra_keys:
            return None
        salt = self._salt(event) if event.parent_block_hash is None else None
        extras: list[bytes] = []
        for i, extra in enumerate(event.extra_keys):
            own = _without_lora(extra, event.lora_name)
            if i == 0 and salt is not None:
                own = ()
            content = msgspec.msgpack.encode(own) if own else b""
            extras.extend([content] * (event.block_size // self.block_size))
        return extras if any(extras) else None


def _split(packed: BlockKeys) -> Sequence[BlockKey]:
    """As `split_keys`, quick for the one key that most engine blocks have."""
    return (BlockKey(packed),) if len(packed) == KEY_BYTES else split_keys(packed)


def _last(packed: BlockKeys) -> BlockKey:
    return BlockKey(packed[-KEY_BYTES:])


def _without_lora(extra: tuple[Any, ...] | None, lora_name: str | None) -> tuple[Any, ...]:
    if not extra:
        return ()
    return extra[1:] if lora_name and extra[0] == lora_name else extra


def _tier(medium: str | None) -> Tier:
    return Tier(medium.lower()) if medium else GPU
