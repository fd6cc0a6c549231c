"""Typed KV events -> changes of what one engine holds, in canonical block keys.

In: events of one engine, in order. Out: `Change`s that a reader can apply as set operations. A change is made when a
block's first copy comes, and when its last one goes (holding.py).

Larger blocks are re-chunked to the canonical size:

    canonical 32, LMCache chunk 64: 1 engine hash -> 2 canonical keys, both gone when the chunk is removed

**KV cache groups** (engine_groups.py). Each has blocks of its own, and what the index knows of are the groups of one
spec together. There a block is filed under the key of its end alone: a chained key says what is before it.

    canonical 16, a group with blocks of 32: 1 engine hash -> the key of its second half

A sparse group names only some of an event's blocks. Their names are known from the full attention group, whose events
are read first, or they are computed (engine_hash.py).

**Said twice.** With `kv_cache_report_mode: full`, which any client can ask for, vLLM repeats what it takes from its
cache: an event from the prompt's beginning, for every group. It looks like a second copy. But a prompt that is held as
that event says would have been taken from the cache, not computed: so it is no copy. (The exceptions are a prompt that
ends with the first block, which is computed again, and one that asks for logprobs of the prompt. The first is told
apart; a second copy of the other kind is not counted, so it may be under-reported.)

**Offload** names what it stores and has neither salt nor adapter. So its blocks are known by their names, from the time
when they were in the GPU. vLLM's file and object stores never say what they delete: they would be believed for ever,
and grow for ever. They are skipped, and named in `unindexed`.

**After events were lost** (`doubt`) the set may hold blocks that are gone, and lack some that are there. From then on:

1. Blocks from before are old. One stored again, or named as the parent of one stored now, is confirmed with all that
   it follows: vLLM hands a request's blocks to the cache while the request holds its whole prefix (of full attention).
   Copies are counted from 1 again, and a removal of an old block drops it whatever its count was.
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

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final

from serve_app.blocks import block_keys, namespace_key, pack_tokens, split_keys
from serve_app.events.block_names import BlockNames, each_key, last_key
from serve_app.events.changes import Added, Change, Changes, Cleared, Removed
from serve_app.events.engine_groups import EngineLayout, attention_kind, plain_layout
from serve_app.events.engine_hash import EngineHasher, as_int
from serve_app.events.extra_keys import as_hashed, block_extras, cache_salt
from serve_app.events.holding import Holding
from serve_app.events.tier_blocks import TierBlocks
from serve_app.events.wire import BlockRemoved, BlockStored, Event
from serve_app.types import GPU, Attention, BlockKey, BlockKeys, EngineHash, ModelId, Tier

__all__ = ["Added", "Change", "Cleared", "EngineBlocks", "Removed"]

logger = logging.getLogger(__name__)

_NULL_BLOCK: Final = 1  # vLLM sets one block of the pool aside, for what need not be there
_TIERS_MAX: Final = 16  # an engine has two or three
_NEVER_REMOVED: Final = frozenset({Tier("storage")})  # vLLM 0.29, v1/kv_offload/tiering: no event with removed=True


class EngineBlocks:
    """The authoritative set of blocks of one engine.

    Args:
        model: base model id; names the key space.
        block_size: tokens per canonical block. Events whose block size is no multiple of it are skipped.
        capacity: blocks that the engine's GPU cache has; 0: unknown, and a doubt ends only when everything is cleared.
        counted: whether a block that is stored twice is there until it is removed twice. An LMCache server says that it
            stored a chunk once for each rank that wrote its part, and the chunk is gone with the first part.
        groups: the engine's KV cache groups; None: one of full attention.
        hasher: computes the engine's own hashes, where only they tell which blocks a sparse group has.
        chunk_blocks: blocks that native offload stores as one.
    """

    def __init__(
        self,
        model: ModelId,
        block_size: int,
        capacity: int = 0,
        *,
        counted: bool = True,
        groups: EngineLayout | None = None,
        hasher: EngineHasher | None = None,
        chunk_blocks: int = 1,
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.capacity = capacity
        self.groups = groups or plain_layout(block_size)
        self.skipped: Counter[str] = Counter()
        self.unindexed: dict[str, str] = {}  # what the engine offloads to, and why it is not followed
        self.unsure = ""  # what was sent that cannot be right, so that the rest may not be either
        self._counted = counted
        self._plain = self.groups.is_plain
        self._hasher = hasher or EngineHasher()
        self._computes_names = not any(
            group.kind is Attention.FULL and group.block_size == block_size for group in self.groups.layout.groups
        )
        self._chunk_blocks = chunk_blocks
        self._names = BlockNames(self._holds)
        self._tiers: dict[Tier, TierBlocks] = {}
        self._chunks: dict[tuple[Tier, int, EngineHash], list[BlockKey]] = {}  # of offload that names their last block
        self._last: tuple[BlockStored, list[BlockKey]] | None = None  # groups repeat each other's tokens
        self._doubting = False
        self._stored_since = 0  # GPU blocks stored since the doubt began

    @property
    def degraded(self) -> bool:
        """Whether the set may be wrong: events were lost, and not yet made up for, or could not be understood."""
        return self._doubting or bool(self.unsure)

    @property
    def copies(self) -> int:
        """Blocks of the GPU cache that hold something that a prompt may find, over all groups."""
        gpu = self._tiers.get(GPU)
        return 0 if gpu is None else gpu.copies

    @property
    def unused(self) -> int:
        """Blocks of the GPU cache that hold nothing; 0 if that is not known."""
        return 0 if self.degraded else max(0, self.capacity - _NULL_BLOCK - self.copies)

    def __len__(self) -> int:
        return sum(map(len, self._tiers.values()))

    def apply(self, events: Iterable[Event]) -> list[Change]:
        """Apply events in order; what cannot be understood is skipped and counted in `skipped`."""
        changes = Changes()
        batch = events if isinstance(events, Sequence) else list(events)
        if not self._plain and not self._computes_names:
            self._learn_from_full_attention(batch)
        at = 0
        while at < len(batch):
            event = batch[at]
            at += 1
            if isinstance(event, BlockStored):
                if event.parent_block_hash is None and (said := self._said_again(batch, at - 1)):
                    self.skipped["said_again"] += said
                    at += said - 1
                else:
                    self._store(event, changes)
            elif isinstance(event, BlockRemoved):
                self._remove(event, changes)
            else:
                self._reset(changes)
        if self._doubting and self.capacity:
            self._reconcile(changes)
        self._last = None
        return changes.made

    def clear(self) -> None:
        """Forget every block, as a restarted engine does."""
        self._names.clear()
        self._tiers.clear()
        self._chunks.clear()
        self.unsure = ""
        self._doubting = False

    def doubt(self) -> None:
        """Events were lost: see the module."""
        self._names.keep_held()
        self._doubting = True
        self._stored_since = 0
        for tier in self._tiers.values():
            for holding in tier.holdings:
                holding.doubt()

    def snapshot(self) -> dict[Tier, BlockKeys]:
        """All blocks held now, by tier; those of further groups in tiers of their own (types.group_tier)."""
        packed = {name: b"".join(keys) for tier in self._tiers.values() for name, keys in tier.snapshot()}
        return {name: keys for name, keys in packed.items() if keys}

    # -- stored ---------------------------------------------------------------------------------------------------

    def _store(self, event: BlockStored, changes: Changes) -> None:
        group = event.group_idx or 0
        tier = _tier(event.medium)
        if not self._is_followed(group, tier) or not self._is_as_known(event, group):
            return
        keys = self._keys_of_stored(event, group, tier)
        if keys is None:
            return
        blocks = self._tier(tier)
        holding = blocks.holdings[group]
        back: list[BlockKey] = []
        if tier == GPU:
            self._stored_since += len(event.block_hashes)
            back = self._confirm_prefix(event, group, holding)
        added = holding.store(keys)
        blocks.changed(group, [*back, *added] if back else added, changes.added)

    def _is_followed(self, group: int, tier: Tier) -> bool:
        members = self.groups.members
        if group >= len(members):
            self._is_unsure("group_index", f"a block of KV cache group {group}; {len(members)} are known")
            return False
        if members[group] < 0:
            self.skipped["not_looked_up"] += 1
            return False
        if tier not in self._tiers and len(self._tiers) >= _TIERS_MAX:
            self.skipped["many_tiers"] += 1
            return False
        if tier in _NEVER_REMOVED:
            self.skipped["never_removed"] += 1
            self.unindexed.setdefault(tier, "the engine never says what it deletes there")
            return False
        return True

    def _is_as_known(self, event: BlockStored, group: int) -> bool:
        """Whether the event's group is what we take it for, where it says so."""
        if event.kv_cache_spec_kind is None:
            return True
        known = self.groups.layout.groups[self.groups.members[group]]
        window = event.kv_cache_spec_sliding_window or 0
        if attention_kind(event.kv_cache_spec_kind) is not known.kind or (
            known.kind is Attention.SLIDING_WINDOW and window not in (0, known.window)
        ):
            what = (
                f"KV cache group {group} is {event.kv_cache_spec_kind} {window or ''}, and was taken for {known.kind}"
            )
            self._is_unsure("group_changed", what)
            return False
        return True

    def _keys_of_stored(self, event: BlockStored, group: int, tier: Tier) -> list[BlockKey] | None:
        """Keys of the blocks that the event names; None, counted, if that cannot be known."""
        if tier != GPU and self._counted:
            return self._keys_of_offloaded(event, group, tier)
        if event.block_size % self.block_size or event.block_size <= 0:
            self.skipped["block_size"] += 1
            return None
        if self._computes_names:
            if not self._compute_names(event):
                self._skip_unknown_parent()
                return None
        elif self._last is not None and _same_range(self._last[0], event):
            return self._last[1]
        elif len(event.token_ids) == len(event.block_hashes) * event.block_size:
            return self._keys_of_dense(event)
        elif self._plain:
            self.skipped["token_count"] += 1
            return None
        keys = self._names.all_keys(event.block_hashes)
        if keys is None:
            self._is_unsure(
                "unplaced_blocks", f"blocks of KV cache group {group} that only the engine knows the place of"
            )
        return keys

    def _keys_of_dense(self, event: BlockStored) -> list[BlockKey] | None:
        """Of an event that names every block of its tokens; learns the names."""
        if event.extra_keys and len(event.extra_keys) != len(event.block_hashes):
            self.skipped["extra_keys"] += 1
            return None
        parent = self._parent_key(event)
        if parent is None:
            self._skip_unknown_parent()
            return None
        per_block = event.block_size // self.block_size
        packed = block_keys(pack_tokens(event.token_ids), self.block_size, parent, block_extras(event, per_block))
        keys = split_keys(packed)
        own: Sequence[BlockKeys] = keys
        if per_block > 1 and self._plain:
            own = [b"".join(keys[i : i + per_block]) for i in range(0, len(keys), per_block)]
        elif per_block > 1:
            own = keys = keys[per_block - 1 :: per_block]
        self._names.learn(event.block_hashes, own, event.parent_block_hash)
        if not self._plain:
            self._last = event, keys
        return keys

    def _parent_key(self, event: BlockStored) -> BlockKey | None:
        """Key of the block before the event's first one; None if the engine never told us of it."""
        if event.parent_block_hash is not None:
            return self._names.key(event.parent_block_hash)
        return namespace_key(self.model, self.block_size, event.lora_name, cache_salt(event))

    def _learn_from_full_attention(self, batch: Sequence[Event]) -> None:
        """The names of all blocks of a request, before a sparse group needs them."""
        layout, members = self.groups.layout.groups, self.groups.members
        for event in batch:
            if not isinstance(event, BlockStored) or event.block_size != self.block_size or _tier(event.medium) != GPU:
                continue
            group = event.group_idx or 0
            if group < len(members) and members[group] >= 0 and layout[members[group]].kind is Attention.FULL:
                if self._last is not None and _same_range(self._last[0], event):
                    continue
                if len(event.token_ids) == len(event.block_hashes) * event.block_size and self._parent_key(event):
                    self._keys_of_dense(event)

    def _skip_unknown_parent(self) -> None:
        self.skipped["unknown_parent"] += 1
        self._stored_since = 0

    def _compute_names(self, event: BlockStored) -> bool:
        """Learn what the engine calls each canonical block of the event's range. False: its parent is unknown."""
        if self._last is not None and _same_range(self._last[0], event):
            return True
        parent = self._parent_key(event)
        before = event.parent_block_hash
        digest = self._hasher.root if before is None else self._names.digest(before)
        if parent is None or digest is None:
            return False
        size = self.block_size
        keys = split_keys(block_keys(pack_tokens(event.token_ids), size, parent))
        usual = (event.lora_name,) if event.lora_name else None
        told = dict(zip(event.block_hashes, event.extra_keys or (), strict=False))
        as_bytes = any(isinstance(name, bytes) for name in (before, *event.block_hashes))
        extras = iter(told.values())
        expected = next(extras, usual)
        for i, key in enumerate(keys):
            block = event.token_ids[i * size : (i + 1) * size]
            named = self._hasher.digest(digest, block, as_hashed(expected))
            name: EngineHash = named if as_bytes else as_int(named)
            if name in told:
                expected = next(extras, usual)
            elif expected != usual:
                named = self._hasher.digest(digest, block, usual)
                name = named if as_bytes else as_int(named)
            digest = named
            self._names.learn_digest(name, key, digest)
            self._names.unheld(name)
        self._last = event, keys
        return True

    # -- offloaded ------------------------------------------------------------------------------------------------

    def _keys_of_offloaded(self, event: BlockStored, group: int, tier: Tier) -> list[BlockKey] | None:
        """Of blocks that native offload has stored. It tells of no salt: only a name, or a known parent, does."""
        keys = self._names.all_keys(event.block_hashes)
        if keys is not None and not event.token_ids:
            keys = self._whole_chunks(event.block_hashes, group, tier)
        elif keys is None and event.token_ids and event.parent_block_hash is not None:
            keys = self._keys_of_dense(event) if self._is_dense(event) else None
        elif (
            keys is None
            and event.token_ids
            and (event.block_size > self._block_size_of(group) or self._has_no_salt(event))
        ):
            keys = self._keys_of_dense(event)  # larger: LMCache in the engine's process, with names of its own
        if keys is None:
            self.skipped["not_described"] += 1
            if tier not in self._tiers:
                self.unindexed.setdefault(
                    tier, "the engine does not say what it stores there (self_describing_kv_events may help)"
                )
        else:
            self.unindexed.pop(tier, None)
        return keys

    def _block_size_of(self, group: int) -> int:
        return self.groups.layout.groups[self.groups.members[group]].block_size

    def _is_dense(self, event: BlockStored) -> bool:
        return (
            event.block_size > 0
            and event.block_size % self.block_size == 0
            and len(event.token_ids) == len(event.block_hashes) * event.block_size
        )

    def _has_no_salt(self, event: BlockStored) -> bool:
        """Whether the names of a prompt's first blocks are those of a request without salt and images."""
        if not self._is_dense(event):
            return False
        first, digest = event.block_hashes[0], self._hasher.root
        extras = (event.lora_name,) if event.lora_name else None
        for start in range(0, event.block_size, self.block_size):
            digest = self._hasher.digest(digest, event.token_ids[start : start + self.block_size], extras)
        return first in (digest, as_int(digest))

    def _whole_chunks(self, names: Sequence[EngineHash], group: int, tier: Tier) -> list[BlockKey] | None:
        """Keys of chunks that are named by their last block."""
        if self._chunk_blocks == 1:
            return self._names.all_keys(names)
        keys: list[BlockKey] = []
        for name in names:
            chunk = [
                last_key(packed) for packed, _ in zip(self._names.prefix(name), range(self._chunk_blocks), strict=False)
            ]
            if len(chunk) < self._chunk_blocks:
                return None
            self._chunks[tier, group, name] = chunk
            keys += chunk
        return keys

    # -- said again -----------------------------------------------------------------------------------------------

    def _said_again(self, batch: Sequence[Event], at: int) -> int:
        """How many events from here on repeat what is held: one for each group, or none."""
        first = batch[at]
        assert isinstance(first, BlockStored)
        gpu = self._tiers.get(GPU)
        eagle = any(group.eagle for group in self.groups.layout.groups)
        if gpu is None or len(first.token_ids) <= self.groups.layout.alignment * (2 if eagle else 1):
            return 0  # of a prompt no longer than that nothing would be taken from the cache
        waiting = {group for group, place in enumerate(self.groups.members) if place >= 0}
        count = 0
        for event in batch[at : at + len(waiting)]:
            group = event.group_idx or 0 if isinstance(event, BlockStored) else -1
            if group not in waiting or not isinstance(event, BlockStored) or not _same_range(first, event):
                break
            if not self._would_be_taken(event, gpu.holdings[group], group):
                break
            waiting.discard(group)
            count += 1
        return 0 if waiting else count

    def _would_be_taken(self, event: BlockStored, holding: Holding, group: int) -> bool:
        """Whether the group holds what a hit of the event's length needs."""
        if _tier(event.medium) != GPU or len(event.token_ids) != len(event.block_hashes) * event.block_size:
            return False
        kind = self.groups.layout.groups[self.groups.members[group]]
        blocks = len(event.block_hashes)
        match kind.kind:
            case Attention.FULL:
                needed = blocks
            case Attention.SLIDING_WINDOW:
                needed = min(blocks, -(-(kind.window - 1) // kind.block_size))
            case Attention.CHUNKED_LOCAL:
                needed = len(event.token_ids) % kind.window // kind.block_size
            case Attention.MAMBA:
                needed = 1
        for name in event.block_hashes[blocks - needed :]:
            packed = self._names.get(name)
            if packed is None or any(key not in holding.held for key in each_key(packed)):
                return False
        return True

    # -- removed --------------------------------------------------------------------------------------------------

    def _remove(self, event: BlockRemoved, changes: Changes) -> None:
        group = event.group_idx or 0
        tier = _tier(event.medium)
        if group >= len(self.groups.members) or self.groups.members[group] < 0:
            self.skipped["group_index"] += 1
            return
        blocks = self._tier(tier)
        holding = blocks.holdings[group]
        gone: list[BlockKey] = []
        for name in event.block_hashes:
            packed = self._names.get(name)
            if packed is None:
                self.skipped["unknown_block"] += 1
                continue
            own: Sequence[BlockKey] = each_key(packed)
            if self._chunks:
                own = self._chunks.pop((tier, group, name), own)
            gone += [key for key in own if holding.remove(key)]
            if not self._holds(own[-1]):
                self._names.unheld(name)
        if gone:
            blocks.changed(group, gone, changes.removed)

    def _reset(self, changes: Changes) -> None:
        """The engine has reset its prefix cache: that is its GPU's. What was offloaded can still be loaded."""
        gpu = self._tiers.pop(GPU, None)
        if not any(map(len, self._tiers.values())):
            self.clear()
            changes.cleared()
            return
        self._names.keep_held()
        if gpu is not None:
            for name, keys in gpu.snapshot():
                changes.removed(name, keys)

    # -- doubt ----------------------------------------------------------------------------------------------------

    def _confirm_prefix(self, event: BlockStored, group: int, holding: Holding) -> list[BlockKey]:
        """All that the event's first block follows is held too. Those that had been dropped already are returned."""
        before = event.parent_block_hash
        if before is None or self.groups.layout.groups[self.groups.members[group]].kind is not Attention.FULL:
            return []
        parent = self._names.key(before)
        if parent is None or (parent not in holding.old and (parent in holding.held or self._is_offloaded(parent))):
            return []
        prefix = self._names.prefix(before)
        return holding.confirm(chain.from_iterable(map(each_key, prefix)))

    def _reconcile(self, changes: Changes) -> None:
        if self._stored_since >= self.capacity:
            for tier in self._tiers.values():
                for group, holding in enumerate(tier.holdings):
                    tier.changed(group, holding.drop_old(), changes.removed)
            self._doubting = False
            return
        gpu = self._tiers.get(GPU)
        if gpu is None:
            return
        excess = len(gpu) - self.capacity
        while excess > 0:
            group, holding = max(enumerate(gpu.holdings), key=lambda item: len(item[1].old))
            dropped = holding.drop_old(excess)
            if not dropped:
                return
            gpu.changed(group, dropped, changes.removed)
            excess -= len(dropped)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _tier(self, tier: Tier) -> TierBlocks:
        blocks = self._tiers.get(tier)
        if blocks is None:
            blocks = self._tiers[tier] = TierBlocks(tier, self.groups, counted=self._counted)
        return blocks

    def _holds(self, key: BlockKey) -> bool:
        for tier in self._tiers.values():  # plain loops: `any` makes a generator for every block removed
            for holding in tier.holdings:
                if key in holding.held or key in holding.old:
                    return True
        return False

    def _is_offloaded(self, key: BlockKey) -> bool:
        return any(key in holding for name, tier in self._tiers.items() if name != GPU for holding in tier.holdings)

    def _is_unsure(self, reason: str, what: str) -> None:
        self.skipped[reason] += 1
        if not self.unsure:
            self.unsure = what
            logger.warning("the index of this engine may be wrong until it is reset: %s", what)


def _same_range(one: BlockStored, other: BlockStored) -> bool:
    """Whether two events are of the same blocks of the same prompt, in two groups."""
    return (
        one.parent_block_hash == other.parent_block_hash
        and one.block_size == other.block_size
        and one.lora_name == other.lora_name
        and one.block_hashes == other.block_hashes
        and one.token_ids == other.token_ids
    )


def _tier(medium: str | None) -> Tier:
    return Tier(medium.lower()) if medium else GPU
