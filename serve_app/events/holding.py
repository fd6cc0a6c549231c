"""Which blocks a part of an engine holds, and in how many copies.

An engine may hold a block twice (vLLM does not de-duplicate: two equal prompts at once, or a prompt whose last block is
computed again to get logits) and then reports it stored twice and removed twice. So every key has a count:

    stored k, stored k, removed k, removed k  ->  there, -, -, gone
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from serve_app.types import BlockKey

_NEW: Final = object()


class Holding:
    """Blocks of one KV cache group in one tier.

    `held` are those that are known, with the number of copies; `old` those that are in doubt, oldest first. None is in
    both.
    """

    __slots__ = ("copies", "counted", "held", "old")

    def __init__(self, *, counted: bool = True) -> None:
        self.counted = counted
        self.held: dict[BlockKey, int] = {}
        self.old: dict[BlockKey, None] = {}
        self.copies = 0  # in `held`, altogether

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.held or key in self.old

    def __len__(self) -> int:
        return len(self.held) + len(self.old)

    def store(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """One more copy of each. Returns those that were not there."""
        held, old, new = self.held, self.old, []
        for key in keys:
            copies = held.get(key, 0)
            if copies and not self.counted:
                continue
            held[key] = copies + 1
            self.copies += 1
            if not copies and (not old or old.pop(key, _NEW) is _NEW):
                new.append(key)
        return new

    def remove(self, key: BlockKey) -> bool:
        """One copy less. Returns whether it was there and is gone."""
        copies = self.held.get(key, 0)
        if copies > 1:
            self.held[key] = copies - 1
            self.copies -= 1
            return False
        if copies:
            del self.held[key]
            self.copies -= 1
            return True
        return self.old.pop(key, _NEW) is not _NEW

    def confirm(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """They are there for certain. Returns those that were not."""
        back = []
        for key in keys:
            if key not in self.held:
                self.held[key] = 1
                self.copies += 1
                if self.old.pop(key, _NEW) is _NEW:
                    back.append(key)
        return back

    def doubt(self) -> None:
        """Any of them may be gone."""
        self.old.update(dict.fromkeys(self.held))
        self.held.clear()
        self.copies = 0

    def drop_old(self, count: int | None = None) -> list[BlockKey]:
        """Give up the oldest in doubt; None: all of them."""
        dropped = list(self.old if count is None else islice(self.old, count))
        for key in dropped:
            del self.old[key]
        return dropped

    def clear(self) -> None:
        self.held.clear()
        self.old.clear()
        self.copies = 0


class Together:
    """Blocks that each of several groups holds: what those groups are, looked up as one."""

    __slots__ = ("_holders", "_needed")

    def __init__(self, groups: int) -> None:
        self._needed = groups
        self._holders: dict[BlockKey, int] = {}  # groups that hold it

    def add(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """One more group holds them. Returns those that all do now."""
        complete = []
        for key in keys:
            holders = self._holders[key] = self._holders.get(key, 0) + 1
            if holders == self._needed:
                complete.append(key)
        return complete

    def remove(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """A group no longer holds them. Returns those that all did until now."""
        incomplete = []
        for key in keys:
            holders = self._holders.get(key, 0)
            if holders == self._needed:
                incomplete.append(key)
            if holders > 1:
                self._holders[key] = holders - 1
            else:
                self._holders.pop(key, None)
        return incomplete

    def keys(self) -> list[BlockKey]:
        """Those that all groups hold."""
        return [key for key, holders in self._holders.items() if holders == self._needed]
