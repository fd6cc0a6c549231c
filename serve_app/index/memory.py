"""The index in memory: which domains hold which blocks, and how much of a prompt each pod has.

Per tier, a table of block key -> bit mask of domains (table.py). The masks of a prompt's keys, each ANDed with those
before it, say where every domain's match ends:

    keys      k0     k1     k2     k3            domain a (bit 0) holds k0 k1 k2, b (bit 1) holds k0
    masks     11     01     01     00
    ANDed     11     01     01     00            so b matched 1 block, a matched 3

Readers need no lock: they take `_live` and `_tiers` once, both of which are replaced and never changed in place.
Writers must be one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from serve_app.index.table import BlockTable
from serve_app.types import GPU, BlockKeys, Domain, DomainId, Epoch, PodId, PodMatch, Tier, Trust

DEFAULT_MAX_BLOCKS = 20_000_000  # some 50 bytes each (benchmarks/bench_read_path.py)
_EVICT_SHARE = 64  # evict 1/64 at a time: finding the oldest costs a pass over all
_WORD_BITS = 64
_WORD = (1 << _WORD_BITS) - 1
_NO_MATCH = PodMatch()


@dataclass(slots=True)
class _Member:
    domain: Domain
    bit: int  # position in the masks
    live: bool = True  # its lease is held
    late: bool = False  # its heartbeat is overdue

    @property
    def trust(self) -> Trust:
        if self.late or not self.live:
            return Trust.STALE
        return Trust.DEGRADED if self.domain.degraded else Trust.EXACT


class _Group(NamedTuple):
    """Pods that have matched the same blocks so far."""

    mask: int  # who
    end: int  # blocks
    tokens: dict[Tier, int]

    def with_tokens(self, tier: Tier, count: int) -> dict[Tier, int]:
        return {**self.tokens, tier: count} if count else self.tokens


class _Live:
    """The pods that are there now, as a reader needs them."""

    __slots__ = ("bit_of", "distrusted", "mask", "no_match", "pod_of", "trust_of")

    def __init__(self, bit_of: dict[PodId, int], trust_of: dict[PodId, Trust]) -> None:
        self.bit_of = bit_of  # as masks of one bit
        self.trust_of = trust_of
        self.distrusted = {pod: trust for pod, trust in trust_of.items() if trust is not Trust.EXACT}
        self.pod_of = {bit: pod for pod, bit in bit_of.items()}
        self.mask = sum(bit_of.values())
        self.no_match = dict.fromkeys(bit_of, _NO_MATCH)


class MemoryIndex:
    """IndexReader and IndexWriter in this process.

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
        self._block_size = 0
        self._live = _Live({}, {})

    # -- writer ---------------------------------------------------------------------------------------------------

    def join(self, domain: Domain) -> None:
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
        self._block_size = domain.spec.block_size
        self._refresh()

    def add(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: BlockKeys) -> None:
        member = self._current(domain, epoch)
        if member is None:
            return
        table = self._tiers.get(tier)
        if table is None:
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
        member = self._current(domain, epoch)
        if member is not None:
            self._erase(member.bit)

    def leave(self, domain: DomainId, epoch: Epoch) -> None:
        if self._current(domain, epoch) is not None:
            self._drop(domain)

    def set_live(self, domain: DomainId, live: bool, *, late: bool = False) -> None:
        """A domain without a lease matches nothing; its blocks are kept in case the lease comes back."""
        member = self._members.get(domain)
        if member is not None and (member.live, member.late) != (live, late):
            member.live, member.late = live, late
            self._refresh()

    # -- reader ---------------------------------------------------------------------------------------------------

    def match(
        self, keys: BlockKeys, pods: Iterable[PodId] | None = None, *, count_hits: bool = False
    ) -> dict[PodId, PodMatch]:
        live, block_size = self._live, self._block_size
        if pods is None:
            found, wanted = live.no_match.copy(), live.mask
        else:
            found, wanted = dict.fromkeys(pods, _NO_MATCH), 0
            for pod in found:
                wanted |= live.bit_of.get(pod, 0)
        if not wanted:
            return found
        tables = self._tiers
        groups = [_Group(wanted, 0, {})]
        for tier, table in tables.items():  # a slower tier goes on where the faster one ended
            groups = [
                _Group(mask, end, group.with_tokens(tier, (end - group.end) * block_size))
                for group in groups
                for end, mask in table.runs(keys, group.end, group.mask)
            ]
        hits = _hit_counts(tables.values(), keys, wanted) if count_hits else None
        for group in groups:
            if hits is None and group.end:
                match = PodMatch(group.tokens, group.end)
                for bit in _each_bit(group.mask):
                    found[live.pod_of[bit]] = match
            elif hits:
                for bit in _each_bit(group.mask):
                    found[live.pod_of[bit]] = PodMatch(group.tokens, hits.get(bit, 0))
        return found

    def held(self, pods: Sequence[PodId], keys: BlockKeys) -> list[bool]:
        """Whether each pod holds, in any tier, the block beside it; as many pods as keys."""
        bits = [self._live.bit_of.get(pod, 0) for pod in pods]
        found = [False] * len(bits)
        for table in self._tiers.values():
            for i, words in enumerate(table.masks(keys).tolist()):
                mask = sum(word << j * _WORD_BITS for j, word in enumerate(words))
                found[i] = found[i] or bool(mask & bits[i])
        return found

    @property
    def distrusted(self) -> Mapping[PodId, Trust]:
        """Live pods whose matches are not exact."""
        return self._live.distrusted

    def trust(self, pod: PodId) -> Trust:
        return self._live.trust_of.get(pod, Trust.STALE)

    def pods(self) -> list[PodId]:
        """Live pods."""
        return list(self._live.bit_of)

    def domains(self) -> list[Domain]:
        """Every known domain, live or not."""
        return [member.domain for member in self._members.values()]

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
        live = {m.domain.pod: m for m in self._members.values() if m.live and m.domain.pod is not None}
        self._live = _Live(
            {pod: 1 << member.bit for pod, member in live.items()},
            {pod: member.trust for pod, member in live.items()},
        )

    def _in_order(self, tiers: dict[Tier, BlockTable]) -> dict[Tier, BlockTable]:
        rank = {tier: i for i, tier in enumerate(self._tier_order)}
        return dict(sorted(tiers.items(), key=lambda item: rank.get(item[0], len(rank))))


def _each_bit(mask: int) -> Iterator[int]:
    """The set bits, each as a mask."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def _hit_counts(tables: Iterable[BlockTable], keys: BlockKeys, wanted: int) -> dict[int, int]:
    """How many of the keys each bit of `wanted` holds in any tier, in any place; bits without one are left out."""
    counts: dict[int, int] = {}
    by_tier = [table.masks(keys) for table in tables]
    for i in range(max((masks.shape[1] for masks in by_tier), default=0)):
        held = np.bitwise_or.reduce([masks[:, i] for masks in by_tier if i < masks.shape[1]])
        for bit in _each_bit(wanted >> i * _WORD_BITS & _WORD):
            count = int(np.count_nonzero(held & np.uint64(bit)))
            if count:
                counts[bit << i * _WORD_BITS] = count
    return counts
