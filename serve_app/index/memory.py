"""The index in memory: per tier, block key -> bit mask of the domains that hold the block.

One pass over a prompt's keys with `mask &= index.get(key, 0)` gives every domain's matched length at once:

    keys      k0     k1     k2     k3            domain a (bit 0) holds k0 k1 k2, b (bit 1) holds k0
    index     11     01     01     -             mask: 11 -> 01 -> 01 -> 00, so b matched 1 block, a matched 3

A domain that leaves, or is cleared, gives up its bit at once (O(1)): its mask is no longer in `_live`. The bit is
used again only after `sweep` has erased it from every entry, some entries at a time.

Readers need no lock: they take `_bits` and `_tiers` once, and dict look-ups are atomic. Writers must be one thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from serve_app.types import GPU, BlockKey, Domain, DomainId, Epoch, PodId, PodMatch, Tier

DEFAULT_MAX_BLOCKS = 20_000_000  # about 100 bytes each
_EVICT_SHARE = 64  # evict 1/64 at a time: finding the oldest entry of a dict costs a scan over deleted ones
_SWEEP_STEP = 20_000  # entries per sweep call, about 5 ms
_FIRST_STEP = 32  # keys looked up before the first test whether anybody is left: an unknown prompt costs no more
_STEP = 512  # keys looked up at a time after that
_MAX_MASKS = 65_536  # distinct masks that are shared
_NO_MATCH = PodMatch()


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
        self._masks: dict[int, int] = {}  # equal masks are one object: a large int takes 40 bytes
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
        mask = both = member.mask
        held = 0  # what the block before had; `both` is that and the new bit
        get = blocks.get
        for key in keys:
            before = get(key, 0)
            if before != held:
                held, both = before, self._shared(before | mask)
            blocks[key] = both
        if len(blocks) > self.max_blocks:
            self._evict(blocks)

    def remove(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: Sequence[BlockKey]) -> None:
        member = self._current(domain, epoch)
        blocks = self._tiers.get(tier)
        if member is None or blocks is None:
            return
        keep = ~member.mask
        held = left = 0
        for key in keys:
            before = blocks.get(key, 0)
            if before != held:
                held, left = before, self._shared(before & keep)
            if left:
                blocks[key] = left
            elif before:
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
        wanted = 0
        for bit in by_pod.values():
            wanted |= bit
        tokens: dict[int, dict[Tier, int]] = {}  # by bit, of those that match anything
        ends = {0: wanted}  # blocks matched so far -> mask of who; a slower tier goes on where a faster one ended
        for tier, blocks in tiers.items():
            starts, ends = ends, {}
            for start, mask in starts.items():
                for end, ended in _runs(blocks, keys, start, mask):
                    ends[end] = ends.get(end, 0) | ended
                    if end > start:
                        for bit in _bits(ended):
                            tokens.setdefault(bit, {})[tier] = (end - start) * block_size
        if count_hits:
            hits = _hit_counts(tiers.values(), keys, wanted)
        else:
            hits = {bit: end for end, mask in ends.items() if end for bit in _bits(mask)}
        found = dict.fromkeys(by_pod, _NO_MATCH)
        if hits:
            for pod, bit in by_pod.items():
                if bit in hits:
                    found[pod] = PodMatch(tokens.get(bit, {}), hits[bit])
        return found

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

    def _shared(self, mask: int) -> int:
        """The one object for this mask."""
        if len(self._masks) >= _MAX_MASKS:
            self._masks.clear()  # only sharing is lost
        return self._masks.setdefault(mask, mask)

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
                            blocks[key] = self._shared(mask & ~dead)
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


def _runs(blocks: Mapping[BlockKey, int], keys: Sequence[BlockKey], start: int, mask: int) -> Iterator[tuple[int, int]]:
    """Where the unbroken runs of keys from `start` on end, and who ends there: (position, bits of `mask`).

    A prompt has few distinct masks, since who holds it changes at few places. So the loops over its keys, some hundreds
    at a time, are in C (look up, drop duplicates in order), and the one in Python is over the distinct masks only:

        masks   11 11 11 01 01 01 00        distinct: 11, 01, 00        runs: (3, bit 1), (6, bit 0)
    """
    at, step = start, _FIRST_STEP
    while mask and at < len(keys):
        found = list(map(blocks.get, keys[at : at + step]))
        seen = 0
        for held in dict.fromkeys(found):
            left = mask & held if held else 0
            if left != mask:
                seen = found.index(held, seen)
                yield at + seen, mask ^ left
                mask = left
                if not mask:
                    return
        at += step
        step = _STEP
    if mask:
        yield len(keys), mask


def _bits(mask: int) -> Iterator[int]:
    """The set bits, each as a mask."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def _hit_counts(tiers: Iterable[Mapping[BlockKey, int]], keys: Sequence[BlockKey], wanted: int) -> dict[int, int]:
    """How many of the keys each bit of `wanted` holds in any tier, in any place; bits without one are left out."""
    counts: dict[int, int] = {}
    for held, times in Counter(zip(*(map(blocks.get, keys) for blocks in tiers), strict=True)).items():
        mask = 0
        for of_tier in held:
            mask |= of_tier or 0
        for bit in _bits(mask & wanted):
            counts[bit] = counts.get(bit, 0) + times
    return counts
