"""An engine's KV cache groups, as vLLM counts them -> the layout that the index knows.

vLLM makes a KV cache group of some layers of one kind; Gemma 3 has five of sliding window and one of full attention.
Groups of one spec are looked up as one (`KVGroup`), so the index needs a set of blocks only for each spec: a block
is in it when every group of that spec holds it.

    sliding 1024, full, sliding 1024   ->   layout [full, sliding 1024], members (1, 0, 1)

Full attention comes first, as in vLLM's coordinator. Kinds are vLLM's `KVCacheSpecKind` (v1/kv_cache_interface.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from serve_app.errors import ConfigError
from serve_app.events.wire import BlockStored, Event
from serve_app.types import Attention, CacheLayout, KVGroup

_KINDS = {
    "full_attention": Attention.FULL,
    "mla_attention": Attention.FULL,
    "sink_full_attention": Attention.FULL,
    "sliding_window": Attention.SLIDING_WINDOW,
    "sliding_window_mla": Attention.SLIDING_WINDOW,
    "chunked_local_attention": Attention.CHUNKED_LOCAL,
    "mamba": Attention.MAMBA,
}
_NOT_CACHED = frozenset({"encoder_only_attention", "cross_attention"})  # no prefix of these is ever reused


class EngineGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One KV cache group of an engine."""

    kind: str  # vLLM's name for it
    block_size: int  # tokens
    window: int = 0  # tokens: sliding window, or chunk of chunked local attention
    eagle: bool = False  # holds draft layers (EAGLE, MTP), or vLLM treats it so
    cached: bool = True  # whether prefixes are looked up in it


class GroupError(ValueError):
    """The groups are such that nobody knows what the engine takes from its cache. `reason` is a metric label."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """How the blocks of an engine's groups become those of a layout."""

    layout: CacheLayout
    members: tuple[int, ...]  # engine's group -> its place in `layout.groups`; -1: nobody looks it up
    block_size: int  # tokens per canonical block: what the engine hashes

    @property
    def is_plain(self) -> bool:
        """Whether it is what readers assume without a layout."""
        (first, *others) = self.layout.groups
        return not others and first == KVGroup(Attention.FULL, self.block_size)

    def engine_groups(self, place: int) -> tuple[int, ...]:
        """The engine's groups that are one in the layout."""
        return tuple(i for i, member in enumerate(self.members) if member == place)


def plain_layout(block_size: int) -> EngineLayout:
    """One group of full attention, whose blocks are the canonical ones."""
    return EngineLayout(CacheLayout((KVGroup(Attention.FULL, block_size),), block_size), (0,), block_size)


def engine_layout(groups: Sequence[EngineGroup], block_size: int = 0, alignment: int = 0) -> EngineLayout:
    """The layout of an engine with these groups.

    Args:
        block_size: tokens that the engine hashes at a time; 0: as vLLM works it out.
        alignment: tokens that a hit's length is a multiple of; 0: as vLLM works it out.

    Raises:
        GroupError: a group is of an unknown kind, or its figures cannot be.
    """
    cached = [group for group in groups if group.cached and group.kind not in _NOT_CACHED]
    if not cached:
        raise GroupError("no_groups", "the engine has no KV cache group that prefixes are looked up in")
    for group in cached:
        _check(group)
    sizes = [group.block_size for group in cached]
    block_size = block_size or math.gcd(*sizes)
    alignment = alignment or math.lcm(*sizes)
    if any(size % block_size for size in sizes) or alignment % block_size:
        raise GroupError(
            "group_block_size", f"blocks of {sizes} tokens, hits aligned to {alignment}: not multiples of {block_size}"
        )
    eagle = {_spec(group) for group in cached if group.eagle}  # of one spec, all or none
    specs = sorted(dict.fromkeys(map(_spec, cached)), key=lambda spec: spec.kind is not Attention.FULL)
    members = tuple(specs.index(_spec(group)) if group in cached else -1 for group in groups)
    layout = tuple(KVGroup(spec.kind, spec.block_size, spec.window, spec in eagle) for spec in specs)
    return EngineLayout(CacheLayout(layout, alignment), members, block_size)


def groups_of(events: Iterable[Event]) -> list[EngineGroup]:
    """What an engine's first batch of stored blocks tells of its groups: vLLM sends an event for each at once.

    Empty, if no block was stored, or not in all groups. The chunk of chunked local attention is not told.
    """
    groups: dict[int, EngineGroup] = {}
    for event in events:
        if isinstance(event, BlockStored) and event.block_size > 0:
            groups.setdefault(
                event.group_idx or 0,
                EngineGroup(
                    event.kv_cache_spec_kind or "full_attention",  # an old vLLM that does not say
                    event.block_size,
                    event.kv_cache_spec_sliding_window or 0,
                ),
            )
    return [groups[i] for i in range(len(groups))] if groups.keys() == set(range(len(groups))) else []


def parse_groups(text: str) -> tuple[EngineGroup, ...]:
    """Groups as a person writes them, a JSON list of EngineGroup.

    Raises:
        ConfigError: it is none, or the groups cannot be.
    """
    try:
        groups = msgspec.json.decode(text, type=tuple[EngineGroup, ...])
        engine_layout(groups)
    except (msgspec.DecodeError, GroupError) as error:
        raise ConfigError(f"--groups is no list of KV cache groups: {error}") from error
    return groups


def attention_kind(name: str) -> Attention | None:
    """vLLM's name of a kind as ours; None for one that is unknown, or never reused."""
    return _KINDS.get(name)


def _spec(group: EngineGroup) -> KVGroup:
    kind = _KINDS[group.kind]
    windowed = kind in {Attention.SLIDING_WINDOW, Attention.CHUNKED_LOCAL}
    return KVGroup(kind, group.block_size, group.window if windowed else 0)


def _check(group: EngineGroup) -> None:
    kind = _KINDS.get(group.kind)
    if kind is None:
        raise GroupError("group_kind", f"KV cache group of unknown kind {group.kind!r}")
    if group.block_size <= 0:
        raise GroupError("group_block_size", f"KV cache group with blocks of {group.block_size} tokens")
    if kind in {Attention.SLIDING_WINDOW, Attention.CHUNKED_LOCAL} and group.window <= 0:
        raise GroupError(
            "group_window", f"KV cache group {group.kind} with a window of {group.window} tokens: say it with --groups"
        )
