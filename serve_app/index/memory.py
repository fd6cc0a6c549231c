"""The index in memory: per tier, block key -> bit mask of the domains that hold the block.

One pass over a prompt's keys with `mask &= index.get(key, 0)` gives every domain's matched length at once:

    keys      k0     k1     k2     k3            domain a (bit 0) holds k0 k1 k2, b (bit 1) holds k0
    index     11     01     01     -             mask: 11 -> 01 -> 01 -> 00, so b matched 1 block, a matched 3

A domain that leaves, or is cleared, gives up its bit at once (O(1)): its mask is no longer in `_live`. The bit is
used again only after `sweep` has erased it from every entry, some entries at a time.

Readers need no lock: they take `_bits` and `_tiers` once, and dict look-ups are atomic. Writers must be one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from serve_app.types import GPU, BlockKey, Domain, DomainId, Epoch, PodId, PodMatch, Tier

DEFAULT_MAX_BLOCKS = 20_000_000  # about 100 bytes each
_EVICT_SHARE = 64  # evict 1/64 at a time: finding the oldest entry of a dict costs a scan over deleted ones
_SWEEP_STEP = 20_000  # entries per sweep call, about 5 ms


@dataclass(slots=True)
class _Member:
    domain: Domain
    mask: int  # one bit
    live: bool = True  # its lease is held


class MemoryIndex:
    """IndexReader and IndexWriter in this process.

    Args:
        max_blocks: cap on entries over all tiers; the oldest are evicted and counted in `evicted_blocks`.
        tier_order: tiers from fastest to slowest. A tier that is not named comes last.
    """

    def __init__(self, max_blocks: int = DEFAULT_MAX_BLOCKS, tier_order: Sequence[Tier] = (GPU,)) -> None:
        self.max_blocks = max_blocks
        self.evicted_blocks = 0
        self._tier_order = tuple(tier_order)
        self._tiers: dict[Tier, dict[BlockKey, int]] = {}
        self._members: dict[DomainId, _Member] = {}
        self._dead_bits = 0  # bits given up and not yet erased from the entries
        self._sweep: Iterator[None] | None = None
        self._block_size = 0
        self._by_pod: dict[PodId, int] = {}  # live pods -> their bit; replaced, never changed in place

    # -- writer ---------------------------------------------------------------------------------------------------

    def join(self, domain: Domain) -> None:
        known = self._members.get(domain.id)
        if known is not None and known.domain.epoch == domain.epoch:
            known.domain = domain
            return
        if known is not None:
            self._give_up(known.mask)
        self._members[domain.id] = _Member(domain, self._free_bit())
        self._block_size = domain.spec.block_size
        self._refresh()

    def add(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: Sequence[BlockKey]) -> None:
        member = self._current(domain, epoch)
        if member is None:
            return
        blocks = self._tiers.get(tier)
        if blocks is None:
            blocks = {}
            self._tiers = self._in_order({**self._tiers, tier: blocks})
        mask = member.mask
        get = blocks.get
        for key in keys:
            blocks[key] = get(key, 0) | mask
        if len(blocks) > self.max_blocks:
            self._evict(blocks)

    def remove(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: Sequence[BlockKey]) -> None:
        member = self._current(domain, epoch)
        blocks = self._tiers.get(tier)
        if member is None or blocks is None:
            return
        keep = ~member.mask
        for key in keys:
            mask = blocks.get(key)
            if mask is None:
                continue
            if mask & keep:
                blocks[key] = mask & keep
            else:
                del blocks[key]

    def clear(self, domain: DomainId, epoch: Epoch) -> None:
        member = self._current(domain, epoch)
        if member is not None:
            self._give_up(member.mask)
            member.mask = self._free_bit()
            self._refresh()

    def leave(self, domain: DomainId, epoch: Epoch) -> None:
        if self._current(domain, epoch) is not None:
            self._give_up(self._members.pop(domain).mask)
            self._refresh()

    def set_live(self, domain: DomainId, live: bool) -> None:
        """A domain without a lease matches nothing; its blocks are kept in case the lease comes back."""
        member = self._members.get(domain)
        if member is not None and member.live != live:
            member.live = live
            self._refresh()

    def sweep(self) -> bool:
        """Erase given-up bits from some thousand entries. Returns True while there is more to do."""
        if not self._dead_bits:
            return False
        if self._sweep is None:
            self._sweep = self._sweep_all(self._dead_bits)
        if next(self._sweep, self) is self:
            self._sweep = None
        return bool(self._dead_bits)

    # -- reader ---------------------------------------------------------------------------------------------------

    def match(
        self, keys: Sequence[BlockKey], pods: Iterable[PodId] | None = None, *, count_hits: bool = False
    ) -> dict[PodId, PodMatch]:
        by_pod, tiers, block_size = self._by_pod, self._tiers, self._block_size
        if pods is not None:
            by_pod = {pod: by_pod.get(pod, 0) for pod in pods}
        starts = dict.fromkeys(by_pod, 0)  # blocks matched so far; a slower tier goes on where a faster one ended
        tokens: dict[PodId, dict[Tier, int]] = {pod: {} for pod in by_pod}
        for tier, blocks in tiers.items():
            for start in set(starts.values()):
                here = {pod: bit for pod, bit in by_pod.items() if starts[pod] == start and bit}
                for pod, length in _prefix_lengths(blocks, keys, start, here).items():
                    if length:
                        tokens[pod][tier] = length * block_size
                        starts[pod] = start + length
        hits = _hit_counts(tiers.values(), keys, by_pod) if count_hits else starts
        return {pod: PodMatch(tokens[pod], hits[pod]) for pod in by_pod}

    def pods(self) -> list[PodId]:
        """Live pods."""
        return list(self._by_pod)

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
        """Distinct blocks by tier, including some that only departed domains held until they are swept."""
        return {tier: len(blocks) for tier, blocks in self._tiers.items()}

    # -- inside ---------------------------------------------------------------------------------------------------

    def _current(self, domain: DomainId, epoch: Epoch) -> _Member | None:
        member = self._members.get(domain)
        return member if member is not None and member.domain.epoch == epoch else None

    def _refresh(self) -> None:
        self._by_pod = {
            member.domain.pod: member.mask
            for member in self._members.values()
            if member.live and member.domain.pod is not None
        }

    def _free_bit(self) -> int:
        used = self._dead_bits
        for member in self._members.values():
            used |= member.mask
        return ~used & (used + 1)  # lowest bit that is not set

    def _give_up(self, mask: int) -> None:
        self._dead_bits |= mask

    def _sweep_all(self, dead: int) -> Iterator[None]:
        for blocks in list(self._tiers.values()):
            keys = list(blocks)
            for start in range(0, len(keys), _SWEEP_STEP):
                for key in keys[start : start + _SWEEP_STEP]:
                    mask = blocks.get(key, 0)
                    if mask & dead:
                        if mask & ~dead:
                            blocks[key] = mask & ~dead
                        else:
                            del blocks[key]
                yield
        self._dead_bits &= ~dead

    def _evict(self, blocks: dict[BlockKey, int]) -> None:
        count = max(len(blocks) - self.max_blocks, self.max_blocks // _EVICT_SHARE)
        oldest = list(islice(blocks, count))
        for key in oldest:
            del blocks[key]
        self.evicted_blocks += len(oldest)

    def _in_order(self, tiers: dict[Tier, dict[BlockKey, int]]) -> dict[Tier, dict[BlockKey, int]]:
        rank = {tier: i for i, tier in enumerate(self._tier_order)}
        return dict(sorted(tiers.items(), key=lambda item: rank.get(item[0], len(rank))))


def _prefix_lengths(
    blocks: Mapping[BlockKey, int], keys: Sequence[BlockKey], start: int, bits: Mapping[PodId, int]
) -> dict[PodId, int]:
    """Length, in blocks from `start`, of the unbroken run of keys that each pod holds."""
    mask = 0
    for bit in bits.values():
        mask |= bit
    lengths: dict[PodId, int] = {}
    get = blocks.get
    i = start
    for i in range(start, len(keys)):
        left = mask & get(keys[i], 0)
        if left != mask:
            lost = mask ^ left
            for pod, bit in bits.items():
                if lost & bit:
                    lengths[pod] = i - start
            mask = left
            if not mask:
                return lengths
    for pod, bit in bits.items():
        if mask & bit:
            lengths[pod] = len(keys) - start
    return lengths


def _hit_counts(
    tiers: Iterable[Mapping[BlockKey, int]], keys: Sequence[BlockKey], bits: Mapping[PodId, int]
) -> dict[PodId, int]:
    """How many of the keys each pod holds in any tier, in any place."""
    tiers = list(tiers)
    counts = dict.fromkeys(bits, 0)
    for key in keys:
        mask = 0
        for blocks in tiers:
            mask |= blocks.get(key, 0)
        if mask:
            for pod, bit in bits.items():
                if mask & bit:
                    counts[pod] += 1
    return counts
