"""Block keys -> bit masks of the domains that hold the block: a hash table in an array, its loops compiled by numba.

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
_AHEAD = 64  # slots touched ahead

# Types of the compiled functions' arguments.
_KEYS = numba.types.Array(numba.uint64, 1, "C", readonly=True)
_CELLS, _STAMPS = numba.uint64[:, ::1], numba.uint32[::1]
_WORDS = numba.uint64[::1]


def compiled(*signature: Any) -> Callable[[_F], _F]:
    """Compile now, not at the first request; the code runs without the GIL."""
    types = signature[0](*signature[1:])
    try:
        return numba.njit(types, nogil=True, cache=True)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder for the cache can be written: two seconds more at every start
        return numba.njit(types, nogil=True)  # type: ignore[no-any-return]


@compiled(numba.int64, _CELLS, numba.uint64, numba.uint64)
def _slot(cells: Words, shift: Any, key: Any) -> Any:
    """Where a key stands, or would stand: the slot's key is then 0."""
    if key == _EMPTY:
        key = _ONE
    last = np.uint64(len(cells) - 1)
    at = key >> shift
    while cells[at, 0] != key and cells[at, 0] != _EMPTY:
        at = (at + _ONE) & last
    return at


@compiled(numba.boolean, _CELLS, numba.int64)
def _held(cells: Words, at: Any) -> Any:
    """Whether anybody holds the block in a slot."""
    for column in range(1, cells.shape[1]):  # noqa: SIM110  numba compiles no generator expressions
        if cells[at, column] != _EMPTY:
            return True
    return False


@compiled(
    numba.types.UniTuple(numba.int64, 2), _KEYS, _CELLS, _STAMPS, numba.uint64, numba.int64, numba.uint64, numba.uint32
)
def _add(keys: Words, cells: Words, stamps: Any, shift: Any, column: Any, bit: Any, stamp: Any) -> Any:
    """How many slots were taken, and how many blocks are held that nobody held before."""
    taken = held = 0
    for key in keys:
        at = _slot(cells, shift, key)
        held += not _held(cells, at)
        cells[at, column] |= bit
        stamps[at] = stamp
        if cells[at, 0] == _EMPTY:
            cells[at, 0] = key if key != _EMPTY else _ONE
            taken += 1
    return taken, held


@compiled(numba.int64, _KEYS, _CELLS, numba.uint64, numba.int64, numba.uint64)
def _remove(keys: Words, cells: Words, shift: Any, column: Any, bit: Any) -> Any:
    """How many blocks nobody holds any more."""
    gone = 0
    for key in keys:
        at = _slot(cells, shift, key)
        if cells[at, column] & bit:
            cells[at, column] ^= bit
            gone += not _held(cells, at)
    return gone


@compiled(numba.none, _KEYS, _CELLS, numba.uint64, _CELLS)
def _look_up(keys: Words, cells: Words, shift: Any, found: Any) -> None:
    """Masks of the keys, into `found`. Slots are touched ahead, as in `_follow`."""
    words = cells.shape[1] - 1
    for first in range(0, len(keys), _AHEAD):
        stop = min(first + _AHEAD, len(keys))
        touched = _EMPTY
        for i in range(first, stop):
            touched |= cells[keys[i] >> shift, 0]
        found[first, 0] = touched  # so that the compiler leaves the loop in
        for i in range(first, stop):
            at = _slot(cells, shift, keys[i])
            for word in range(words):
                found[i, word] = cells[at, 1 + word]


@compiled(numba.int64, _KEYS, numba.int64, _CELLS, numba.uint64, _WORDS)
def _follow(keys: Words, start: Any, cells: Words, shift: Any, out: Any) -> Any:
    """AND the masks of the keys from `start` on into the words at the front of `out`.

    Behind them each change is noted, as three numbers: at which key, in which word, which bits. Returns how many.

    The first slots of some keys at a time are touched before they are looked at: the processor then fetches them side
    by side, instead of waiting for each to know whether the search goes on behind it: a third less time when none is in
    its caches.
    """
    count, words = 0, cells.shape[1] - 1
    for first in range(start, len(keys), _AHEAD):
        stop = min(first + _AHEAD, len(keys))
        touched = _EMPTY
        for i in range(first, stop):
            touched |= cells[keys[i] >> shift, 0]
        out[-1] = touched  # so that the compiler leaves the loop in
        for i in range(first, stop):
            at = _slot(cells, shift, keys[i])
            anybody = False
            for word in range(words):
                now = out[word] & cells[at, word + 1]
                if now != out[word]:
                    note = words + 3 * count
                    out[note], out[note + 1], out[note + 2] = i, word, out[word] ^ now
                    out[word] = now
                    count += 1
                anybody |= now != _EMPTY
            if not anybody:
                return count
    return count


@compiled(numba.int64, *[_CELLS, _STAMPS] * 2, numba.uint64)
def _move(cells: Words, stamps: Any, to_cells: Words, to_stamps: Any, shift: Any) -> Any:
    """Copy what somebody holds into an empty table. Returns how many blocks that is."""
    count = 0
    for i in range(len(cells)):
        if _held(cells, i):
            at = _slot(to_cells, shift, cells[i, 0])
            to_cells[at, : cells.shape[1]], to_stamps[at] = cells[i], stamps[i]
            count += 1
    return count


@dataclass(frozen=True, slots=True)
class _Grid:
    """One build of the table; a reader takes it once."""

    cells: Words  # [slots, 1 + words]: key, masks
    stamps: npt.NDArray[np.uint32]  # [slots] when the block was added last
    shift: np.uint64  # key >> shift is the key's first slot

    @classmethod
    def empty(cls, slot_bits: int, words: int) -> _Grid:
        slots = 1 << slot_bits
        shift = np.uint64(_WORD_BITS - slot_bits)
        return cls(np.zeros((slots, 1 + words), np.uint64), np.zeros(slots, np.uint32), shift)

    @property
    def words(self) -> int:
        return int(self.cells.shape[1]) - 1

    @property
    def slot_bits(self) -> int:
        return _WORD_BITS - int(self.shift)


class BlockTable:
    """The blocks of one tier. Keys are given packed, masks as ints: bit i stands for domain i."""

    def __init__(self) -> None:
        self._grid = _Grid.empty(_MIN_SLOT_BITS, 1)
        self._used = 0  # slots with a key
        self._held = 0  # of these, with a mask
        self._clock = 0
        self.members = 0  # bits of the domains that have blocks here, or had

    def __len__(self) -> int:
        """Blocks that somebody holds."""
        return self._held

    @property
    def size_bytes(self) -> int:
        return self._grid.cells.nbytes + self._grid.stamps.nbytes

    # -- reader ---------------------------------------------------------------------------------------------------

    def masks(self, keys: bytes) -> Words:
        """Masks of the keys, [keys, words]; 0 for one that is not there."""
        grid, wanted = self._grid, np.frombuffer(keys, np.uint64)
        found = np.empty((len(wanted), grid.words), np.uint64)
        _look_up(wanted, grid.cells, grid.shift, found)
        return found

    def runs(self, keys: bytes, start: int, mask: int) -> list[tuple[int, int]]:
        """Where the unbroken runs of blocks from `start` on end, and who ends there: (blocks from the first, mask).

        Every bit of `mask` ends somewhere, at `start` if it does not hold that block.
        """
        grid, wanted = self._grid, np.frombuffer(keys, np.uint64)
        words = grid.words
        out = np.empty(words + 3 * words * _WORD_BITS + 1, np.uint64)  # every change ends a bit
        for i in range(words):
            out[i] = mask >> i * _WORD_BITS & _WORD
        count = _follow(wanted, start, grid.cells, grid.shift, out)
        left, noted = out[:words].tolist(), out[words : words + 3 * count].tolist()
        runs = [(noted[i], noted[i + 2] << noted[i + 1] * _WORD_BITS) for i in range(0, len(noted), 3)]
        runs += [(len(wanted), held << i * _WORD_BITS) for i, held in enumerate(left) if held]
        if unknown := mask >> words * _WORD_BITS << words * _WORD_BITS:
            runs.append((start, unknown))
        return runs

    # -- writer ---------------------------------------------------------------------------------------------------

    def add(self, keys: bytes, bit: int) -> None:
        """Domain `bit` holds these blocks too."""
        wanted = np.frombuffer(keys, np.uint64)
        self._reserve(len(wanted), bit // _WORD_BITS + 1)
        self._clock += 1
        self.members |= 1 << bit
        grid, now = self._grid, np.uint32(self._clock)
        taken, held = _add(wanted, grid.cells, grid.stamps, grid.shift, *_place(bit), now)
        self._used += taken
        self._held += held

    def remove(self, keys: bytes, bit: int) -> None:
        """Domain `bit` no longer holds these blocks."""
        grid = self._grid
        if bit < grid.words * _WORD_BITS:
            self._held -= _remove(np.frombuffer(keys, np.uint64), grid.cells, grid.shift, *_place(bit))

    def erase(self, bit: int) -> None:
        """Domain `bit` holds nothing any more."""
        self.members &= ~(1 << bit)
        grid = self._grid
        if bit < grid.words * _WORD_BITS:
            column, mask = _place(bit)
            grid.cells[:, column] &= ~mask
            self._held = int(np.count_nonzero(grid.cells[:, 1:].any(axis=1)))

    def evict(self, count: int) -> int:
        """Forget at least `count` blocks, those that were added longest ago. Returns how many it were."""
        grid, before = self._grid, self._held
        held = grid.cells[:, 1:].any(axis=1)
        if count := min(count, before):
            last = np.partition(grid.stamps[held], count - 1)[count - 1]
            old = grid.stamps <= last
            grid.cells[old, 1:] = 0
            self._held = int(np.count_nonzero(held & ~old))
        return before - self._held

    def _reserve(self, count: int, words: int) -> None:
        """Room for `count` more keys, and for masks of so many words: build the table anew if there is none."""
        old = self._grid
        slot_bits = old.slot_bits
        if self._used + count > _MAX_LOAD * len(old.cells):
            slot_bits = max(_MIN_SLOT_BITS, int((self._held + count) / _LOAD_AFTER_BUILD).bit_length())
        elif words <= old.words:
            return
        new = _Grid.empty(slot_bits, max(words, old.words))
        self._used = _move(old.cells, old.stamps, new.cells, new.stamps, new.shift)
        self._grid = new


def _place(bit: int) -> tuple[int, np.uint64]:
    """Column of the cells, and mask in it."""
    return 1 + bit // _WORD_BITS, np.uint64(1 << bit % _WORD_BITS)
