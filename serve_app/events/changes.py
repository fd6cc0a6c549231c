"""Changes of what an engine holds, merged: a set operation on a tier does not mind what happens in another tier.

gpu +a, gpu/1 +a, gpu +b, gpu -c   ->   gpu +ab, gpu -c, gpu/1 +a
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.types import BlockKey, BlockKeys, Tier


@dataclass(frozen=True, slots=True)
class Added:
    """The tier holds these blocks now."""

    tier: Tier
    keys: BlockKeys


@dataclass(frozen=True, slots=True)
class Removed:
    """The tier no longer holds these blocks."""

    tier: Tier
    keys: BlockKeys


@dataclass(frozen=True, slots=True)
class Cleared:
    """Every tier of the domain is empty."""


Change = Added | Removed | Cleared


class Changes:
    """Collects what a batch of events changes."""

    def __init__(self) -> None:
        self._before: list[Change] = []
        self._runs: dict[Tier, list[tuple[type[Added | Removed], list[BlockKey]]]] = {}

    def added(self, tier: Tier, keys: Iterable[BlockKey]) -> None:
        self._run(tier, Added).extend(keys)

    def removed(self, tier: Tier, keys: Iterable[BlockKey]) -> None:
        self._run(tier, Removed).extend(keys)

    def cleared(self) -> None:
        self._before = [Cleared()]  # what was before does not matter
        self._runs.clear()

    @property
    def made(self) -> list[Change]:
        """In an order in which they can be applied."""
        runs = [made(tier, b"".join(keys)) for tier, runs in self._runs.items() for made, keys in runs if keys]
        return [*self._before, *runs]

    def _run(self, tier: Tier, made: type[Added | Removed]) -> list[BlockKey]:
        runs = self._runs.setdefault(tier, [])
        if not runs or runs[-1][0] is not made:
            runs.append((made, []))
        return runs[-1][1]
