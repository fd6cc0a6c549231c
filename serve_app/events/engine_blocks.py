"""Typed KV events -> changes of what one engine holds, in canonical block keys.

In: events of one engine, in order. Out: `Change`s that a reader can apply as set operations.

An engine may hold a block twice (vLLM does not de-duplicate: two equal prompts at once, or a prompt whose last block
is recomputed to get logits) and then reports it stored twice and removed twice. So every key has a count, and a
change is made only when it goes from 0 to 1 or back:

    stored k, stored k, removed k, removed k  ->  add k, -, -, remove k

Larger blocks are re-chunked to the canonical size:

    canonical 32, LMCache chunk 64: 1 engine hash -> 2 canonical keys, both gone when the chunk is removed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from serve_app.blocks import KEY_BYTES, block_keys, namespace_key, pack_tokens, split_keys
from serve_app.events.wire import AllBlocksCleared, BlockRemoved, BlockStored, Event
from serve_app.types import GPU, BlockKey, BlockKeys, EngineHash, ModelId, Tier


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
    """

    def __init__(self, model: ModelId, block_size: int, *, counted: bool = True) -> None:
        self.model = model
        self.block_size = block_size
        self._counted = counted
        self.skipped: Counter[str] = Counter()
        self._keys_of: dict[EngineHash, BlockKeys] = {}  # its canonical keys
        self._held: dict[Tier, dict[BlockKey, int]] = {}  # copies of each block, by tier

    def apply(self, events: Iterable[Event]) -> list[Change]:
        """Apply events in order; what cannot be understood is skipped and counted in `skipped`."""
        changes: list[Change] = []
        for event in events:
            match event:
                case BlockStored():
                    changes.extend(self._stored(event))
                case BlockRemoved():
                    changes.extend(self._removed(event))
                case AllBlocksCleared():
                    changes.extend(self._cleared())
        return changes

    def clear(self) -> None:
        """Forget every block, as a restarted engine does."""
        self._keys_of.clear()
        self._held.clear()

    def snapshot(self) -> dict[Tier, BlockKeys]:
        """All blocks held now, by tier."""
        return {tier: b"".join(held) for tier, held in self._held.items() if held}

    def __len__(self) -> int:
        return sum(len(held) for held in self._held.values())

    def _cleared(self) -> Iterator[Change]:
        """The engine has reset its prefix cache: that is its GPU's. What was offloaded can still be loaded."""
        gpu = self._held.pop(GPU, {})
        if not any(self._held.values()):
            self.clear()
            yield Cleared()
            return
        offloaded = self._held.values()
        self._keys_of = {
            engine_hash: packed
            for engine_hash, packed in self._keys_of.items()
            if any(packed[-KEY_BYTES:] in held for held in offloaded)
        }
        if gpu:
            yield Removed(GPU, b"".join(gpu))

    def _stored(self, event: BlockStored) -> Iterator[Added]:
        if event.group_idx:  # hybrid models: the first group speaks for the block
            self.skipped["other_cache_group"] += 1
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
            return

        keys = block_keys(pack_tokens(event.token_ids), self.block_size, parent, self._extras(event))
        tier = _tier(event.medium)
        held = self._held.setdefault(tier, {})
        bytes_per_hash = event.block_size // self.block_size * KEY_BYTES
        added: list[BlockKey] = []
        for i, engine_hash in enumerate(event.block_hashes):
            own = keys[i * bytes_per_hash : (i + 1) * bytes_per_hash]
            self._keys_of[engine_hash] = own
            for key in split_keys(own):
                copies = held.get(key, 0)
                held[key] = copies + 1 if self._counted else 1
                if not copies:
                    added.append(key)
        if added:
            yield Added(tier, b"".join(added))

    def _removed(self, event: BlockRemoved) -> Iterator[Removed]:
        if event.group_idx:
            self.skipped["other_cache_group"] += 1
            return
        tier = _tier(event.medium)
        held = self._held.get(tier, {})
        removed: list[BlockKey] = []
        for engine_hash in event.block_hashes:
            packed = self._keys_of.get(engine_hash)
            if packed is None:
                self.skipped["unknown_block"] += 1
                continue
            own = split_keys(packed)
            for key in own:
                copies = held.get(key, 0)
                if copies > 1:
                    held[key] = copies - 1
                elif copies:
                    del held[key]
                    removed.append(key)
            if not any(own[-1] in tier_held for tier_held in self._held.values()):
                del self._keys_of[engine_hash]
        if removed:
            yield Removed(tier, b"".join(removed))

    def _parent_key(self, event: BlockStored) -> BlockKey | None:
        """Key of the block before the event's first one; None if the engine never told us of it."""
        if event.parent_block_hash is not None:
            packed = self._keys_of.get(event.parent_block_hash)
            return None if packed is None else BlockKey(packed[-KEY_BYTES:])
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


def _without_lora(extra: tuple[Any, ...] | None, lora_name: str | None) -> tuple[Any, ...]:
    if not extra:
        return ()
    return extra[1:] if lora_name and extra[0] == lora_name else extra


def _tier(medium: str | None) -> Tier:
    return Tier(medium.lower()) if medium else GPU
