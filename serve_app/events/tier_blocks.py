"""The blocks of one tier of an engine, by KV cache group, and as the index names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from serve_app.events.engine_groups import EngineLayout
from serve_app.events.holding import Holding, Together
from serve_app.types import BlockKey, Tier, group_tier


class TierBlocks:
    """Args:
    tier: where the blocks are.
    groups: the engine's.
    counted: whether copies count (Holding).
    """

    __slots__ = ("_names", "_together", "holdings")

    def __init__(self, tier: Tier, groups: EngineLayout, *, counted: bool = True) -> None:
        self.holdings = [Holding(counted=counted) for _ in groups.members]
        places = range(len(groups.layout.groups))
        members = [groups.engine_groups(place) for place in places]
        together = [Together(len(own)) if len(own) > 1 else None for own in members]
        names = [group_tier(tier, place) for place in places]
        # By the engine's group; of one that nobody looks up nothing is stored.
        self._names = [names[max(place, 0)] for place in groups.members]
        self._together = [together[max(place, 0)] for place in groups.members]

    @property
    def copies(self) -> int:
        return sum(holding.copies for holding in self.holdings)

    def __len__(self) -> int:
        return sum(map(len, self.holdings))

    def changed(self, group: int, keys: Iterable[BlockKey], change: Callable[[Tier, Iterable[BlockKey]], None]) -> None:
        """Blocks came to, or went from, an engine's group: tell what that changes in the index.

        Args:
            change: `Changes.added` or `Changes.removed`.
        """
        together = self._together[group]
        if together is not None:
            keys = together.remove(keys) if change.__name__ == "removed" else together.add(keys)
        change(self._names[group], keys)

    def snapshot(self) -> Iterator[tuple[Tier, Iterable[BlockKey]]]:
        """All blocks by their tier's name in the index."""
        for name, together, holding in {
            name: (name, together, holding)
            for name, together, holding in zip(self._names, self._together, self.holdings, strict=True)
        }.values():
            yield name, together.keys() if together is not None else [*holding.old, *holding.held]
