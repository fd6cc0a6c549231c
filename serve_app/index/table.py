"""Block keys -> bit masks of the domains that hold the block: a hash table in two arrays, its loops compiled by numba.

In: packed 8-byte keys. Out: masks, or where a prompt's runs of held blocks end. A look-up costs what it costs to fetch
one place of memory, and no Python object per block; a dict would take three such places, one after the other, and 90
bytes a block instead of about 45.

Open addressing: a key stands in the slot that its highest bits say (keys are hashes already), or in the first free one
behind it. Bit i of a block's mask is in word i // 64; words are added as domains come.

    slot 5   k1 | 0b01           k7 belongs in slot 5 too and is found in 6; domain 0 holds k1 and k7, domain 1 only k7
    slot 6   k7 | 0b11

One thread writes, any number read without a lock, and none of them holds the GIL. A slot keeps its key until the table
is built anew, so a reader may see a block that has just come or gone, but never another block's mask. A block that is
removed keeps its slot with mask 0, and is left behind when the table is built anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
_F = TypeVar("_F", bound=Callable[..., Any])

_WORD_BITS = 64
_WORD = (1 << _WORD_BITS) - 1
_MIN_SLOT_BITS = 7
_MAX_LOAD = 0.6  # share of slots in use, tombstones included
_LOAD_AFTER_BUILD = 0.42  # so that a table of stable size is built anew after replacing 0.4 of its blocks
_EMPTY = np.uint64(0)  # no key is: a block whose hash is 0, one in 2^64, is filed under 1
_ONE = np.uint64(1)

# Types of the compiled functions' arguments.
_KEYS = numba.types.Array(numba.uint64, 1, "C", readonly=True)  # asked for, or to be changed
_SLOTS, _MASKS, _STAMPS = numba.uint64[::1], numba.uint64[:, ::1], numba.uint32[::1]
_OUT = numba.int64[::1]


def _compiled(*signature: Any) -> Callable[[_F], _F]:
    """Compile now, not at the first request; the code runs without the GIL."""
    types = signature[0](*signature[1:])
    try:
        return numba.njit(types, nogil=True, cache=True)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder for the cache can be written: two seconds more at every start
        return numba.njit(types, nogil=True)  # type: ignore[no-any-return]


@_compiled(numba.int64, _SLOTS, numba.uint64, numba.uint64)
def _slot(slots: Words, shift: Any, key: Any) -> Any:
    """Where a key stands, or would stand: the slot then has key 0."""
    last = np.uint64(len(slots) - 1)
    at = key >> shift
    while slots[at] != key and slots[at] != _EMPTY:
        at = (at + _ONE) & last
    return at


@_compiled(numba.types.UniTuple(numba.int64, 2), _KEYS, _SLOTS, _MASKS, _STAMPS, *[numba.uint64] * 3, numba.uint32)
def _add(keys: Words, slots: Words, masks: Any, stamps: Any, shift: Any, word: Any, bit: Any, stamp: Any) -> Any:
    """How many slots were taken, and how many blocks are held that nobody held before."""
    taken = held = 0
    for wanted in keys:
        key = wanted if wanted != _EMPTY else _ONE
        at = _slot(slots, shift, key)
        nobody = True
        for other in masks[at]:
            nobody &= other == _EMPTY
        held += nobody
        masks[at, word] |= bit
        stamps[at] = stamp
        if slots[at] == _EMPTY:
            slots[at] = key
            taken += 1
    return taken, held


@_compiled(numba.int64, _KEYS, _SLOTS, _MASKS, *[numba.uint64] * 3)
def _remove(keys: Words, slots: Words, masks: Any, shift: Any, word: Any, bit: Any) -> Any:
    """How many blocks nobody holds any more."""
    gone = 0
    for wanted in keys:
        at = _slot(slots, shift, wanted if wanted != _EMPTY else _ONE)
        if masks[at, word] & bit:
            masks[at, word] ^= bit
            nobody = True
            for other in masks[at]:
                nobody &= other == _EMPTY
            gone += nobody
    return gone


@_compiled(numba.none, _KEYS, _SLOTS, _MASKS, numba.uint64, _MASKS)
def _look_up(keys: Words, slots: Words, masks: Any, shift: Any, found: Any) -> None:
    """Masks of the keys, into `found`."""
    for i in range(len(keys)):
        found[i] = masks[_slot(slots, shift, keys[i] if keys[i] != _EMPTY else _ONE)]


@_compiled(numba.int64, _KEYS, numba.int64, _SLOTS, _MASKS, numba.uint64, _SLOTS, _OUT, _OUT, _SLOTS)
def _follow(
    keys: Words, start: Any, slots: Words, masks: Any, shift: Any, left: Any, ends: Any, of: Any, bits: Any
) -> Any:
    """AND the masks of the keys from `start` on into `left`; note where it changes, in which word, and which bits."""
    count = 0
    for i in range(start, len(keys)):
        at = _slot(slots, shift, keys[i] if keys[i] != _EMPTY else _ONE)
        anybody = False
        for word in range(len(left)):
            now = left[word] & masks[at, word]
            if now != left[word]:
                ends[count], of[count], bits[count] = i, word, left[word] ^ now
                count += 1
                left[word] = now
            anybody |= now != _EMPTY
        if not anybody:
            break
    return count


@_compiled(numba.int64, *[_SLOTS, _MASKS, _STAMPS] * 2, numba.uint64)
def _move(slots: Words, masks: Any, stamps: Any, to_slots: Words, to_masks: Any, to_stamps: Any, shift: Any) -> Any:
    """Copy what somebody holds into an empty table. Returns how many blocks that is."""
    count = 0
    for i in range(len(slots)):
        nobody = True
        for word in masks[i]:
            nobody &= word == _EMPTY
        if not nobody:
            at = _slot(to_slots, shift, slots[i])
            to_masks[at], to_stamps[at], to_slots[at] = masks[i], stamps[i], slots[i]
            count += 1
    return count


@dataclass(frozen=True, slots=True)
class _Grid:
    """One build of the table; a reader takes it once."""

    slots: Words  # key in each slot
    masks: Words  # [slots, words]
    stamps: npt.NDArray[np.uint32]  # [slots] when the block was added last
    shift: np.uint64  # key >> shift is the key's first slot

    @classmethod
    def empty(cls, slot_bits: int, words: int) -> _Grid:
        slots = 1 << slot_bits
        return cls(
            np.zeros(slots, np.uint64),
            np.zeros((slots, words), np.uint64),
            np.zeros(slots, np.uint32),
            np.uint64(_WORD_BITS - slot_bits),
        )

    @property
    def words(self) -> int:
        return int(self.masks.shape[1])

    def with_words(self, words: int) -> _Grid:
        masks = np.zeros((len(self.slots), words), np.uint64)
        masks[:, : self.words] = self.masks
        return _Grid(self.slots, masks, self.stamps, self.shift)


class BlockTable:
    """The blocks of one tier. Keys are given packed, masks as ints: bit i stands for domain i."""

    def __init__(self) -> None:
        self._grid = _Grid.empty(_MIN_SLOT_BITS, 1)
        self._used = 0  # slots with a key
        self._held = 0  # of these, with a mask
        self._clock = 0

    def __len__(self) -> int:
        """Blocks that somebody holds."""
        return self._held

    @property
    def size_bytes(self) -> int:
        grid = self._grid
        return grid.slots.nbytes + grid.masks.nbytes + grid.stamps.nbytes

    # -- reader ---------------------------------------------------------------------------------------------------

    def masks(self, keys: bytes) -> Words:
        """Masks of the keys, [keys, words]; 0 for one that is not there."""
        grid, wanted = self._grid, np.frombuffer(keys, np.uint64)
        found = np.empty((len(wanted), grid.words), np.uint64)
        _look_up(wanted, grid.slots, grid.masks, grid.shift, found)
        return found

    def runs(self, keys: bytes, start: int, mask: int) -> list[tuple[int, int]]:
        """Where the unbroken runs of blocks from `start` on end, and who ends there: (blocks from the first, mask).

        Every bit of `mask` ends somewhere, at `start` if it does not hold that block.
        """
        grid, wanted = self._grid, np.frombuffer(keys, np.uint64)
        words = grid.words
        left = np.array([mask >> i * _WORD_BITS & _WORD for i in range(words)], np.uint64)
        ends, of = np.empty(words * _WORD_BITS, np.int64), np.empty(words * _WORD_BITS, np.int64)
        bits = np.empty(words * _WORD_BITS, np.uint64)
        count = _follow(wanted, start, grid.slots, grid.masks, grid.shift, left, ends, of, bits)
        runs = [
            (end, ended << word * _WORD_BITS)
            for end, word, ended in zip(ends[:count].tolist(), of[:count].tolist(), bits[:count].tolist(), strict=True)
        ]
        runs += [(len(wanted), held << i * _WORD_BITS) for i, held in enumerate(left.tolist()) if held]
        if unknown := mask >> words * _WORD_BITS << words * _WORD_BITS:
            runs.append((start, unknown))
        return runs

    # -- writer ---------------------------------------------------------------------------------------------------

    def add(self, keys: bytes, bit: int) -> None:
        """Domain `bit` holds these blocks too."""
        wanted = np.frombuffer(keys, np.uint64)
        self._reserve(len(wanted), bit // _WORD_BITS + 1)
        grid = self._grid
        self._clock += 1
        taken, held = _add(
            *(wanted, grid.slots, grid.masks, grid.stamps, grid.shift),
            *(np.uint64(bit // _WORD_BITS), np.uint64(1 << bit % _WORD_BITS), np.uint32(self._clock)),
        )
        self._used += taken
        self._held += held

    def remove(self, keys: bytes, bit: int) -> None:
        """Domain `bit` no longer holds these blocks."""
        grid, word = self._grid, bit // _WORD_BITS
        if word < grid.words:
            self._held -= _remove(
                *(np.frombuffer(keys, np.uint64), grid.slots, grid.masks, grid.shift),
                *(np.uint64(word), np.uint64(1 << bit % _WORD_BITS)),
            )

    def erase(self, bit: int) -> None:
        """Domain `bit` holds nothing any more."""
        grid, word = self._grid, bit // _WORD_BITS
        if word < grid.words:
            grid.masks[:, word] &= np.uint64(~(1 << bit % _WORD_BITS) & _WORD)
            self._held = int(np.count_nonzero(grid.masks.any(axis=1)))

    def evict(self, count: int) -> int:
        """Forget at least `count` blocks, those that were added longest ago. Returns how many it were."""
        grid, before = self._grid, self._held
        held = grid.masks.any(axis=1)
        if count := min(count, before):
            last = np.partition(grid.stamps[held], count - 1)[count - 1]
            grid.masks[grid.stamps <= last] = 0
            self._held = int(np.count_nonzero(held & (grid.stamps > last)))
        return before - self._held

    def _reserve(self, count: int, words: int) -> None:
        """Room for `count` more keys, and for masks of so many words."""
        old = self._grid
        words = max(words, old.words)
        if self._used + count > _MAX_LOAD * len(old.slots):
            wanted = int((self._held + count) / _LOAD_AFTER_BUILD)
            new = _Grid.empty(max(_MIN_SLOT_BITS, wanted.bit_length()), words)
            source = old if words == old.words else old.with_words(words)
            self._used = _move(
                *(source.slots, source.masks, source.stamps), *(new.slots, new.masks, new.stamps), new.shift
            )
            self._grid = new
        elif words > old.words:
            self._grid = old.with_words(words)
