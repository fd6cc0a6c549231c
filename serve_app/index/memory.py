"""The index in memory: which domains hold which blocks, and how much of a prompt each pod has.

Per tier, a table of block key -> bit mask of domains (table.py). The masks of a prompt's keys, each ANDed with those
before it, say where every domain's match ends:

    keys      k0     k1     k2     k3            domain a (bit 0) holds k0 k1 k2, b (bit 1) holds k0
    masks     11     01     01     00
    ANDed     11     01     01     00            so b matched 1 block, a matched 3

A shared domain (an LMCache server) is a bit like any other. What it holds counts for the pods that are attached to it,
as vLLM's LMCacheMPConnector loads it: whole chunks from the beginning of the prompt, of which the engine needs those
behind its own blocks. So a pod's match is the longer one of the two, never one continued by the other in mid-prompt:

    chunks of 2 blocks; the pod has k0 in GPU; the server has k0 k1 k2 (k3 is not of this prompt) -> gpu 1, lmcache 1

A pod whose engine has several KV cache groups (`Domain.layout`) has the blocks of the first in the tier's table, those
of the others in tables of their own (`gpu/1`); hits.py says how much of a prompt they agree on.

Readers need no lock: they take `_live` and `_tiers` once, both of which are replaced and never changed in place.
Writers must be one thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serve_app.blocks import KEY_BYTES
from serve_app.index.hits import HitRules
from serve_app.index.table import BlockTable, Words
from serve_app.prompts.identity import differing
from serve_app.types import (
    GPU,
    BlockKeys,
    CacheLayout,
    Domain,
    DomainId,
    EngineSpec,
    Epoch,
    PodId,
    PodMatch,
    Tier,
    Trust,
    group_tier,
)

DEFAULT_MAX_BLOCKS = 20_000_000  # some 50 bytes each (benchmarks/bench_read_path.py)
_EVICT_SHARE = 64  # evict 1/64 at a time: finding the oldest costs a pass over all
_WORD_BITS = 64
_WORD = (1 << _WORD_BITS) - 1
TIERS_MAX = 64  # names come from publishers; of a hybrid engine, each KV cache group has one
_NO_MATCH = PodMatch()
_UNKNOWN = PodMatch(trust=Trust.UNKNOWN)


@dataclass(slots=True)
class _Member:
    domain: Domain
    bit: int  # position in the masks
    live: bool = True  # its lease is held
    late: bool = False  # its heartbeat is overdue
    cause: str = ""  # why routers do not believe what is known of it

    @property
    def trust(self) -> Trust:
        if self.late or not self.live:
            return Trust.STALE
        return Trust.DEGRADED if self.domain.degraded or self.cause else Trust.EXACT


class _Group(NamedTuple):
    """Pods that have matched the same blocks so far."""

    mask: int  # who
    end: int  # blocks
    tokens: dict[Tier, int]

    def with_tokens(self, tier: Tier, count: int) -> dict[Tier, int]:
        return {**self.tokens, tier: count} if count else self.tokens


class _Live:
    """The domains that are there now, as a reader needs them. Bits are masks of one bit."""

    __slots__ = (
        "attached",
        "bit_of",
        "block_size",
        "chunk_of",
        "distrusted",
        "layouts",
        "mask",
        "no_match",
        "pod_of",
        "shared",
        "spec",
        "trust_of",
        "unlike",
    )

    def __init__(self, members: Iterable[_Member]) -> None:
        live = [member for member in members if member.live]
        # While a deployment is replaced by one with larger blocks there are two sizes. The first pod's counts: keys of
        # the other size match nothing.
        self.spec = _common_spec([member.domain.spec for member in live if member.domain.pod is not None])
        self.block_size = self.spec.block_size if self.spec is not None else 0
        self.bit_of = {member.domain.pod: 1 << member.bit for member in live if member.domain.pod is not None}
        self.trust_of = {member.domain.pod: member.trust for member in live if member.domain.pod is not None}
        self.unlike = 0  # pods that make prompts in another way: the keys of ours say nothing of them
        for member in live:
            if member.domain.pod is not None and not self._is_alike(member):
                self.unlike |= 1 << member.bit
                self.trust_of[member.domain.pod] = Trust.DEGRADED
        self.distrusted = {pod: trust for pod, trust in self.trust_of.items() if trust is not Trust.EXACT}
        self.pod_of = {bit: pod for pod, bit in self.bit_of.items()}
        self.mask = sum(self.pod_of)
        self.layouts = _Layouts(live, self.block_size)
        self.no_match = dict.fromkeys(self.bit_of, _NO_MATCH)
        shared = {member.domain.id: member for member in live if member.domain.pod is None}
        self.attached = {  # pod's bit -> bits of what it can load from
            1 << member.bit: sum(1 << shared[domain].bit for domain in set(member.domain.attached) & shared.keys())
            for member in live
            if member.domain.pod is not None
        }
        self.shared = 0  # bits of all that some pod can load from
        for mask in self.attached.values():
            self.shared |= mask
        self.chunk_of = {  # shared bit -> blocks per chunk
            1 << member.bit: max(1, member.domain.chunk_size // member.domain.spec.block_size)
            for member in shared.values()
        }

    def _is_alike(self, member: _Member) -> bool:
        return self.spec is None or self.spec.makes_prompts_as(member.domain.spec)


def _common_spec(specs: Sequence[EngineSpec]) -> EngineSpec | None:
    """That of the pods; where they make prompts in several ways, of most of them, and of equals the first."""
    said = Counter(spec.identity for spec in specs if spec.identity)
    most = max(said.values(), default=0)
    return next((spec for spec in specs if said.get(spec.identity, 0) == most), None)


class _Layouts:
    """Pods whose blocks are in several KV cache groups, by what they have in common."""

    def __init__(self, live: Iterable[_Member], block_size: int) -> None:
        self.mask = 0  # of all of them
        self.of: dict[tuple[CacheLayout, int], tuple[HitRules, int]] = {}  # layout, offloaded chunk -> rules, mask
        for member in live:
            domain = member.domain
            if domain.layout is None or domain.pod is None or domain.spec.block_size != block_size:
                continue
            key = domain.layout, max(1, domain.chunk_size // block_size)
            rules, mask = self.of.get(key) or (HitRules(domain.layout, block_size), 0)
            self.of[key] = rules, mask | 1 << member.bit
            self.mask |= 1 << member.bit


class MemoryIndex:
    """The index in this process. `tests/contract/test_index.py` runs one behaviour suite on it and through Redis.

    Changes of an epoch that is not the domain's current one are ignored.

    Args:
        max_blocks: cap on blocks over all tiers; the oldest are evicted and counted in `evicted_blocks`.
        tier_order: tiers from fastest to slowest. A tier that is not named comes last.
    """

    def __init__(self, max_blocks: int = DEFAULT_MAX_BLOCKS, tier_order: Sequence[Tier] = (GPU,)) -> None:
        self.max_blocks = max_blocks
        self.evicted_blocks = 0
        self._tier_order = tuple(tier_order)
        self._tiers: dict[Tier, BlockTable] = {}
        self._members: dict[DomainId, _Member] = {}
        self._live = _Live(())

    # -- writer ---------------------------------------------------------------------------------------------------

    def join(self, domain: Domain) -> None:
        """Register a domain, empty. One that was there with another epoch loses its blocks; with the same, it keeps
        them, and only its record changes.
        """
        known = self._members.get(domain.id)
        if known is not None and known.domain.epoch == domain.epoch:
            known.domain = domain
            self._refresh()
            return
        if known is not None:
            self._drop(domain.id)
        used = {member.bit for member in self._members.values()}
        free = next(bit for bit in range(len(used) + 1) if bit not in used)
        self._members[domain.id] = _Member(domain, free)
        self._refresh()

    def add(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: BlockKeys) -> None:
        member = self._current(domain, epoch)
        if member is None:
            return
        table = self._tiers.get(tier)
        if table is None:
            if len(self._tiers) >= TIERS_MAX:
                return
            table = BlockTable()
            self._tiers = self._in_order({**self._tiers, tier: table})
        table.add(keys, member.bit)
        over = sum(map(len, self._tiers.values())) - self.max_blocks
        if over > 0:
            largest = max(self._tiers.values(), key=len)
            self.evicted_blocks += largest.evict(max(over, self.max_blocks // _EVICT_SHARE))

    def remove(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: BlockKeys) -> None:
        member, table = self._current(domain, epoch), self._tiers.get(tier)
        if member is not None and table is not None:
            table.remove(keys, member.bit)

    def clear(self, domain: DomainId, epoch: Epoch) -> None:
        """The domain holds nothing any more, but lives on."""
        member = self._current(domain, epoch)
        if member is not None:
            self._erase(member.bit)

    def leave(self, domain: DomainId, epoch: Epoch) -> None:
        """The domain is gone, with its blocks."""
        if self._current(domain, epoch) is not None:
            self._drop(domain)

    def set_live(self, domain: DomainId, live: bool, *, late: bool = False) -> None:
        """A domain without a lease matches nothing; its blocks are kept in case the lease comes back."""
        member = self._members.get(domain)
        if member is not None and (member.live, member.late) != (live, late):
            member.live, member.late = live, late
            self._refresh()

    def distrust(self, domain: DomainId, epoch: Epoch, cause: str) -> None:
        """Its predictions do not hold, for this cause; empty: they do. Of another epoch it says nothing."""
        member = self._current(domain, epoch)
        if member is not None and member.cause != cause:
            member.cause = cause
            self._refresh()

    # -- reader ---------------------------------------------------------------------------------------------------

    def match(
        self,
        keys: BlockKeys,
        pods: Iterable[PodId] | None = None,
        *,
        count_hits: bool = False,
        prompt_tokens: int | None = None,
    ) -> dict[PodId, PodMatch]:
        """The match of every live pod (or of the given ones), also of those that hold nothing.

        Args:
            keys: canonical keys of the prompt's full blocks, in order.
            pods: pods to answer for; None means all that are live. An unknown pod matches nothing.
            count_hits: also count blocks that are held beyond the first gap (`PodMatch.hit_blocks`); costs a pass.
            prompt_tokens: length of the whole prompt; None: it goes on behind the keys. An engine with several KV cache
                groups takes the longest prefix that ends before the prompt's last token, which may be no part of a
                longer one. Of others the whole of what they hold is told (accounting.py has what they take).
        """
        live = self._live
        if pods is None:
            found, wanted = live.no_match.copy(), live.mask
        else:
            found, wanted = dict.fromkeys(pods, _NO_MATCH), 0
            for pod in found:
                wanted |= live.bit_of.get(pod, 0)
                if pod not in live.trust_of:
                    found[pod] = _UNKNOWN
        wanted &= ~live.unlike
        if not wanted:
            return found
        if grouped := wanted & live.layouts.mask:
            self._match_layouts(found, keys, grouped, live, prompt_tokens)
            wanted ^= grouped
            if not wanted:
                return found
        block_size = live.block_size
        tables = self._tiers
        shared = live.shared
        groups = [_Group(wanted | shared, 0, {})]
        for tier, table in tables.items():  # a slower tier goes on where the faster one ended
            members = table.members
            groups = [
                _Group(mask, end, group.with_tokens(tier, (end - group.end) * block_size))
                for group in groups
                for end, mask in (
                    table.runs(keys, group.end, group.mask) if group.mask & members else ((group.end, group.mask),)
                )
            ]
        loads = [group for group in groups if group.mask & shared and group.end] if shared else []
        if loads or count_hits:
            self._fill(found, keys, groups, loads, live, count_hits)
            return found
        for group in groups:
            if group.end:
                match = PodMatch(group.tokens, group.end)
                for bit in _each_bit(group.mask):
                    found[live.pod_of[bit]] = match
        return found

    def _match_layouts(
        self, found: dict[PodId, PodMatch], keys: BlockKeys, wanted: int, live: _Live, prompt_tokens: int | None
    ) -> None:
        """Matches of pods with several KV cache groups: what all of these agree on, tier by tier."""
        tables, size = self._tiers, live.block_size
        tiers = [tier for tier in tables if "/" not in tier]  # those with a slash are of further groups
        for (layout, chunk_blocks), (rules, mask) in live.layouts.of.items():
            runs = None
            if rules.starts_plain and (first := tables.get(GPU)) is not None:
                ends = first.runs(keys, 0, mask & wanted)
                runs = {bit: end for end, pods in ends if end for bit in _each_position(pods)}
            # Who has no beginning in the GPU may have one elsewhere.
            bits = list(runs) if runs is not None and tiers == [GPU] else list(_each_position(mask & wanted))
            if not bits:
                continue
            tokens: list[dict[Tier, int]] = [{} for _ in bits]
            matched = np.zeros(len(bits), np.int64)
            for tier in tiers:
                groups = [tables.get(group_tier(tier, place)) for place in range(len(layout.groups))]
                if None in groups and tier != GPU:
                    continue
                if tier == GPU:
                    more = _own_hits(rules, groups, keys, bits, runs, prompt_tokens)
                else:
                    more = rules.loads(_stacked(groups, keys), bits, matched, chunk_blocks, prompt_tokens)
                matched += more
                for held, count in zip(tokens, more.tolist(), strict=True):
                    if count:
                        held[tier] = count
            for bit, held, end in zip(bits, tokens, matched.tolist(), strict=True):
                if end:
                    found[live.pod_of[1 << bit]] = PodMatch(held, end // size)

    def held(self, pods: Sequence[PodId], keys: BlockKeys) -> list[bool]:
        """Whether each pod holds, in any tier, the block beside it; as many pods as keys."""
        bits = [self._live.bit_of.get(pod, 0) for pod in pods]
        found = [False] * len(bits)
        for table in self._tiers.values():
            found = [
                known or mask & bit != 0 for known, mask, bit in zip(found, _masks(table, keys), bits, strict=True)
            ]
        return found

    def holders(self, keys: BlockKeys) -> list[list[PodId]]:
        """Live pods that hold each block themselves, in any tier."""
        live = self._live
        found = [0] * (len(keys) // KEY_BYTES)
        for table in self._tiers.values():
            found = [known | mask for known, mask in zip(found, _masks(table, keys), strict=True)]
        return [[live.pod_of[bit] for bit in _each_bit(mask & live.mask)] for mask in found]

    @property
    def distrusted(self) -> Mapping[PodId, Trust]:
        """Live pods whose matches are not exact."""
        return self._live.distrusted

    def trust(self, pod: PodId) -> Trust:
        """How far a match of this pod can be relied on."""
        return self._live.trust_of.get(pod, Trust.UNKNOWN)

    def cause(self, domain: DomainId) -> str:
        """Why routers do not believe what is known of it; empty: they do."""
        member = self._members.get(domain)
        return member.cause if member is not None else ""

    def unlike(self, domain: DomainId) -> str:
        """Why its prompts are not those of the other pods; empty: they are."""
        member, spec = self._members.get(domain), self._live.spec
        if member is None or spec is None or not 1 << member.bit & self._live.unlike:
            return ""
        parts = differing(dict(spec.identity), dict(member.domain.spec.identity))
        return f"unknown_prompt: {', '.join(parts)} differ from those of most pods, so it is not scored"

    def _fill(
        self,
        found: dict[PodId, PodMatch],
        keys: BlockKeys,
        groups: Sequence[_Group],
        loads: Sequence[_Group],
        live: _Live,
        count_hits: bool,
    ) -> None:
        """Matches of pods that can load from shared domains, or whose hits are counted."""
        reach = {  # shared bit -> blocks of whole chunks, and how they were matched
            bit: (load.end - load.end % live.chunk_of[bit], load)
            for load in loads
            for bit in _each_bit(load.mask & live.shared)
        }
        hits = None
        if count_hits:
            of = {bit: bit | live.attached[bit] for group in groups for bit in _each_bit(group.mask & ~live.shared)}
            hits = _hit_counts(self._tiers.values(), keys, of)
        longest: dict[int, tuple[int, _Group | None]] = {}  # by what a pod is attached to
        for group in groups:
            matches: dict[int, PodMatch] = {}  # the same
            for bit in _each_bit(group.mask & ~live.shared):
                attached = live.attached[bit]
                match = matches.get(attached)
                if match is None:
                    if attached not in longest:
                        loadable = [reach[other] for other in _each_bit(attached) if other in reach]
                        longest[attached] = max(loadable, key=itemgetter(0), default=(0, None))
                    end, load = longest[attached]
                    match = matches[attached] = (
                        PodMatch(group.tokens, group.end)
                        if load is None or end <= group.end
                        else _beyond(group, load, end, live.block_size)
                    )
                if hits is not None:
                    match = PodMatch(match.tokens, hits.get(bit, 0))
                found[live.pod_of[bit]] = match

    @property
    def spec(self) -> EngineSpec | None:
        """What the live engines agree on; None while there is none."""
        return self._live.spec

    def pods(self) -> list[PodId]:
        """Live pods."""
        return list(self._live.bit_of)

    def domains(self) -> list[Domain]:
        """Every known domain, live or not."""
        return [member.domain for member in list(self._members.values())]

    def domain(self, domain: DomainId) -> Domain | None:
        member = self._members.get(domain)
        return member.domain if member is not None else None

    def is_live(self, domain: DomainId) -> bool:
        member = self._members.get(domain)
        return member is not None and member.live

    def block_counts(self) -> Mapping[Tier, int]:
        """Distinct blocks by tier."""
        return {tier: len(table) for tier, table in self._tiers.items()}

    # -- inside ---------------------------------------------------------------------------------------------------

    def _current(self, domain: DomainId, epoch: Epoch) -> _Member | None:
        member = self._members.get(domain)
        return member if member is not None and member.domain.epoch == epoch else None

    def _drop(self, domain: DomainId) -> None:
        member = self._members.pop(domain)
        self._refresh()  # first, so that no reader asks for the bit while it is taken out
        self._erase(member.bit)

    def _erase(self, bit: int) -> None:
        for table in self._tiers.values():
            table.erase(bit)

    def _refresh(self) -> None:
        self._live = _Live(self._members.values())

    def _in_order(self, tiers: dict[Tier, BlockTable]) -> dict[Tier, BlockTable]:
        rank = {tier: i for i, tier in enumerate(self._tier_order)}
        return dict(sorted(tiers.items(), key=lambda item: rank.get(item[0], len(rank))))


def _masks(table: BlockTable, keys: BlockKeys) -> list[int]:
    """Who holds each block."""
    words = table.masks(keys)
    if words.shape[1] == 1:  # 64 domains or fewer
        one_word: list[int] = words[:, 0].tolist()
        return one_word
    return [sum(word << j * _WORD_BITS for j, word in enumerate(row)) for row in words.tolist()]


def _stacked(tables: Sequence[BlockTable | None], keys: BlockKeys) -> Words:
    """Masks of the keys in each group's table, [groups, keys, words]."""
    masks = [None if table is None else table.masks(keys) for table in tables]
    words = max((one.shape[1] for one in masks if one is not None), default=1)
    stacked = np.zeros((len(masks), len(keys) // KEY_BYTES, words), np.uint64)
    for group, one in enumerate(masks):
        if one is not None:
            stacked[group, :, : one.shape[1]] = one
    return stacked


def _own_hits(
    rules: HitRules,
    groups: Sequence[BlockTable | None],
    keys: BlockKeys,
    bits: Sequence[int],
    runs: Mapping[int, int] | None,
    prompt_tokens: int | None,
) -> npt.NDArray[np.int64]:
    """Tokens that each pod takes from its own cache; `runs`: blocks from the prompt's beginning in the first group."""
    count = len(keys) // KEY_BYTES
    if runs is None:
        return rules.hits(_stacked(groups, keys), count, bits, None, prompt_tokens)
    # Full attention ends a hit: of the other groups no more is looked up than its longest run.
    ends = [runs.get(bit, 0) for bit in bits]
    longest = min(max(ends) + rules.blocks_ahead, count)
    masks = _stacked([None, *groups[1:]], keys[: longest * KEY_BYTES])
    return rules.hits(masks, count, bits, ends, prompt_tokens)


def _each_position(mask: int) -> Iterator[int]:
    return (bit.bit_length() - 1 for bit in _each_bit(mask))


def _each_bit(mask: int) -> Iterator[int]:
    """The set bits, each as a mask."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def _beyond(own: _Group, load: _Group, end: int, block_size: int) -> PodMatch:
    """What the pod has, and behind it what `load` has before block `end`."""
    tokens, start = dict(own.tokens), own.end * block_size
    at = 0
    for tier, count in load.tokens.items():
        more = min(at + count, end * block_size) - max(at, start)
        if more > 0:
            tokens[tier] = tokens.get(tier, 0) + more
        at += count
    return PodMatch(tokens, end)


def _hit_counts(tables: Iterable[BlockTable], keys: BlockKeys, of: Mapping[int, int]) -> dict[int, int]:
    """By bit, how many of the keys any domain of its mask holds in any tier, in any place."""
    by_tier = [table.masks(keys) for table in tables]
    held = [
        np.bitwise_or.reduce([masks[:, i] for masks in by_tier if i < masks.shape[1]])
        for i in range(max((masks.shape[1] for masks in by_tier), default=0))
    ]
    if not held:
        return {}
    counts: dict[int, int] = {}
    for bit, mask in of.items():
        hit = np.zeros(len(held[0]), bool)
        for i, words in enumerate(held):
            if word := mask >> i * _WORD_BITS & _WORD:
                hit |= (words & np.uint64(word)).astype(bool)
        counts[bit] = int(np.count_nonzero(hit))
    return counts
