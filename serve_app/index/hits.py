"""How much of a prompt an engine with several KV cache groups takes from its cache, by vLLM's own rules; compiled.

In: for every group, which of the prompt's keys each pod holds (bit masks, as in table.py). Out: tokens, for each pod.

A group with larger blocks than the canonical ones is asked only for the keys of its blocks' ends:

    canonical 16, group of 32    keys k0 k1 k2 k3    its two blocks are k1 and k3

Source: vLLM 0.29, v1/core/kv_cache_coordinator.py `find_longest_cache_hit`; for each kind of group
v1/core/single_type_kv_cache_manager.py; for what was offloaded, offloading/scheduler.py `_lookup_complete_chunks`.
The loops are the same ones, so that odd cases come out alike (alignment, EAGLE's dropped block, the order of groups).
tests/contract/test_hybrid_layouts.py compares them with vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from serve_app.index.table import Words, compiled
from serve_app.types import Attention, CacheLayout

_FULL, _SLIDING, _CHUNKED, _MAMBA = range(4)
_KIND = {
    Attention.FULL: _FULL,
    Attention.SLIDING_WINDOW: _SLIDING,
    Attention.CHUNKED_LOCAL: _CHUNKED,
    Attention.MAMBA: _MAMBA,
}
_I = numba.int64
_GROUPS, _MASKS = numba.int64[:, ::1], numba.types.Array(numba.uint64, 3, "C")
_COUNTS = numba.int64[::1]

# Columns of `groups`, a row for each.
_KIND_AT, _SIZE_AT, _WINDOW_AT, _EAGLE_AT = range(4)


@compiled(numba.boolean, _MASKS, _I, _I, _I)
def _has(masks: Any, group: Any, key: Any, bit: Any) -> Any:
    """Whether pod `bit` holds the block that ends with key number `key`."""
    return (masks[group, key, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1) != 0


@compiled(_I, _MASKS, _I, _I, _I, _I, _I, _I, _I, numba.boolean)
def _full(
    masks: Any, group: Any, bit: Any, run: Any, size: Any, unit: Any, longest: Any, alignment: Any, eagle: Any
) -> Any:
    """Full attention: the unbroken run of blocks, and the longest part of the next where a hit may end in one."""
    ratio = size // unit
    count = min(max(run, 0), longest // size)
    while run < 0 and count < longest // size and _has(masks, group, (count + 1) * ratio - 1, bit):
        count += 1
    hit = count * size
    if alignment < size and size % alignment == 0:
        first, last = count * (size // alignment), min((count + 1) * (size // alignment) - 1, longest // alignment)
        for part in range(last, first, -1):
            if _has(masks, group, part * alignment // unit - 1, bit):
                hit = part * alignment
                break
    if eagle and hit > 0:
        hit -= min(alignment, size)
    return hit - hit % alignment


@compiled(_I, _MASKS, _I, _I, _I, _I, _I, _I, numba.boolean, _I)
def _sliding(
    masks: Any, group: Any, bit: Any, size: Any, unit: Any, longest: Any, alignment: Any, eagle: Any, window: Any
) -> Any:
    """Sliding window: the last run of as many blocks as the window needs, or a shorter one from the beginning."""
    ratio = size // unit
    need = (window - 1 + size - 1) // size + (1 if eagle else 0)
    run, blocks, found = 0, 0, False
    for i in range(longest // size - 1, -1, -1):
        if _has(masks, group, (i + 1) * ratio - 1, bit):
            if run == 0 and size != alignment and (i if eagle else i + 1) * size % alignment != 0:
                continue
            run += 1
            if run >= need:
                blocks, found = i + run, True
                break
        else:
            run = 0
    if not found:
        blocks = run
        while size != alignment and blocks * size % alignment != 0:
            blocks -= 1
    if eagle and blocks:
        blocks -= 1
        while size != alignment and blocks * size % alignment != 0:
            blocks -= 1
    return blocks * size


@compiled(_I, _MASKS, _I, _I, _I, _I, _I, _I)
def _chunked(masks: Any, group: Any, bit: Any, size: Any, unit: Any, longest: Any, chunk: Any) -> Any:
    """Chunked local attention: what is before the last token's chunk is not needed; in it, the unbroken run."""
    blocks = longest // chunk * chunk // size
    while blocks < longest // size and _has(masks, group, (blocks + 1) * (size // unit) - 1, bit):
        blocks += 1
    return blocks * size


@compiled(_I, _MASKS, _I, _I, _I, _I, _I, _I)
def _mamba(masks: Any, group: Any, bit: Any, size: Any, unit: Any, longest: Any, alignment: Any) -> Any:
    """Mamba: the last state that is held where a hit may end."""
    step = alignment if alignment < size and size % alignment == 0 else size
    for i in range(longest // step, 0, -1):
        if (step != size or i * size % alignment == 0) and _has(masks, group, i * step // unit - 1, bit):
            return i * step
    return 0


@compiled(_I, _GROUPS, _MASKS, _I, _I, _I, _I, _I)
def _hit(groups: Any, masks: Any, bit: Any, run: Any, unit: Any, alignment: Any, most: Any) -> Any:
    """Tokens that all groups agree on: each takes the length, or shortens it, until none does.

    `run` is the unbroken run of blocks in the first group, if that is known; else -1.
    """
    count = len(groups)
    hit = most
    full_hits = np.full(count, -1, np.int64)
    verified = np.zeros(count, np.bool_)  # EAGLE's last block was dropped at this length
    one_round = count == 1 or (count == 2 and groups[0, _KIND_AT] == _FULL)
    while True:
        now = hit
        for g in range(count):
            kind, size = groups[g, _KIND_AT], groups[g, _SIZE_AT]
            if kind == _FULL and full_hits[g] >= 0:
                now = min(now, full_hits[g])
                continue
            eagle = groups[g, _EAGLE_AT] != 0 and not verified[g]
            longest = now
            if eagle and kind != _MAMBA and count > 1:
                margin = unit if alignment == unit and kind == _FULL and size > unit else size
                longest = min(now + margin, most)
            if kind == _FULL:
                known = run if g == 0 else -1
                new = full_hits[g] = _full(masks, g, bit, known, size, unit, longest, alignment, eagle)
            elif kind == _SLIDING:
                new = _sliding(masks, g, bit, size, unit, longest, alignment, eagle, groups[g, _WINDOW_AT])
            elif kind == _CHUNKED:
                new = _chunked(masks, g, bit, size, unit, longest, groups[g, _WINDOW_AT])
            else:
                new = _mamba(masks, g, bit, size, unit, longest, alignment)
            if eagle:
                verified[g] = True
            elif new < now:
                verified[:] = False
            now = new
        if now >= hit:
            return now
        hit = now
        if one_round:
            return hit


@compiled(_I, _GROUPS, _MASKS, _I, _I, _I, _I, _I)
def _loadable(groups: Any, masks: Any, bit: Any, unit: Any, chunk_blocks: Any, computed: Any, most: Any) -> Any:
    """Tokens behind the first `computed` ones that can be loaded from where the groups were offloaded to."""
    tokens = 0
    settled = False
    while not settled:
        settled = True
        for g in range(len(groups)):
            kind, size = groups[g, _KIND_AT], groups[g, _SIZE_AT]
            chunk = size * chunk_blocks
            eagle = groups[g, _EAGLE_AT] != 0
            if most - computed < chunk:
                return 0
            start, stop = computed // chunk, (most + chunk - 1) // chunk
            stop = min(stop, masks.shape[1] * unit // chunk)
            hits = 0
            if kind == _FULL:
                while start + hits < stop and _has(masks, g, (start + hits + 1) * chunk // unit - 1, bit):
                    hits += 1
            else:
                window = size if kind == _MAMBA else groups[g, _WINDOW_AT]
                need = (window + chunk - 1) // chunk + (1 if eagle else 0)
                for i in range(stop - 1, start - 1, -1):
                    hits = hits + 1 if _has(masks, g, (i + 1) * chunk // unit - 1, bit) else 0
                    if hits == need:
                        hits = i + need - start
                        break
            if eagle:
                hits -= 1
            if hits <= 0:
                return 0
            end = min(most, (start + hits) * chunk)
            if end - computed < chunk:
                return 0
            if end < most and g:
                settled = False  # the groups before this one are asked again, for less
            most = end
            tokens = end - computed
    return tokens


@compiled(numba.none, _GROUPS, _MASKS, _COUNTS, _COUNTS, _I, _I, _I, _COUNTS)
def _hits(groups: Any, masks: Any, bits: Any, runs: Any, unit: Any, alignment: Any, most: Any, out: Any) -> None:
    for i in range(len(bits)):
        out[i] = _hit(groups, masks, bits[i], runs[i], unit, alignment, most) if runs[i] else 0


@compiled(numba.none, _GROUPS, _MASKS, _COUNTS, _I, _I, _COUNTS, _I, _COUNTS)
def _loads(groups: Any, masks: Any, bits: Any, unit: Any, chunk: Any, computed: Any, most: Any, out: Any) -> None:
    for i in range(len(bits)):
        out[i] = _loadable(groups, masks, bits[i], unit, chunk, computed[i], most)


class HitRules:
    """vLLM's rules for engines of one layout.

    Args:
        block_size: tokens per canonical block.
    """

    def __init__(self, layout: CacheLayout, block_size: int) -> None:
        self._block_size = block_size
        self._alignment = layout.alignment
        self._groups = np.array(
            [[_KIND[group.kind], group.block_size, group.window, group.eagle] for group in layout.groups], np.int64
        )
        self._windowed = any(group.kind is not Attention.FULL for group in layout.groups)

    @property
    def starts_plain(self) -> bool:
        """Whether the first group is what a plain engine has, so that its runs of blocks can be looked up as there."""
        return bool(self._groups[0, _KIND_AT] == _FULL and self._groups[0, _SIZE_AT] == self._block_size)

    @property
    def blocks_ahead(self) -> int:
        """Keys behind a possible hit that may be looked at: EAGLE looks at a block more."""
        return int(self._groups[:, _SIZE_AT].max()) // self._block_size

    def hits(
        self, masks: Words, keys: int, bits: Sequence[int], runs: Sequence[int] | None, prompt_tokens: int | None
    ) -> npt.NDArray[np.int64]:
        """Tokens that each pod takes from its own cache.

        Args:
            masks: [groups, keys, words], who holds which block.
            keys: of the prompt; of the masks' those behind the longest run are left out.
            bits: the pods' positions in the masks.
            runs: of each pod, blocks in the first group from the prompt's beginning; None: its masks tell.
            prompt_tokens: of the whole prompt, whose last token is always computed; None: it goes on behind the keys.
        """
        most = keys * self._block_size
        if prompt_tokens is not None:
            most = max(0, min(most, prompt_tokens - 1))
        if runs is not None:  # all others end with the first group
            most = min(most, masks.shape[1] * self._block_size)
        out = np.empty(len(bits), np.int64)
        known = np.full(len(bits), -1) if runs is None else np.array(runs, np.int64)
        _hits(self._groups, masks, np.array(bits, np.int64), known, self._block_size, self._alignment, most, out)
        return out

    def loads(
        self,
        masks: Words,
        bits: Sequence[int],
        computed: npt.NDArray[np.int64],
        chunk_blocks: int,
        prompt_tokens: int | None,
    ) -> npt.NDArray[np.int64]:
        """Tokens that each pod can load, behind the `computed` ones of its own cache, from a slower tier.

        Args:
            masks: as in `hits`, of that tier.
            chunk_blocks: blocks that are offloaded as one.
        """
        most = masks.shape[1] * self._block_size
        if prompt_tokens is not None:
            most = max(0, min(most, prompt_tokens - self._windowed))
        out = np.empty(len(bits), np.int64)
        _loads(self._groups, masks, np.array(bits, np.int64), self._block_size, chunk_blocks, computed, most, out)
        return out
