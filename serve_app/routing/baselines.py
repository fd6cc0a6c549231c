"""Choices that need no cache knowledge: baselines to compare with, and what is left when that knowledge is missing."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import xxhash

from serve_app.types import PodId


class Turns:
    """An order for equal candidates that changes with every call, so that a tie never always goes to the first."""

    def __init__(self) -> None:
        self._turn = 0

    def next(self, pods: Sequence[PodId]) -> dict[PodId, int]:
        """Place of each pod this time."""
        self._turn += 1
        count = max(len(pods), 1)
        return {pod: (i - self._turn) % count for i, pod in enumerate(pods)}


def by_load(pods: Sequence[PodId], in_flight: Mapping[PodId, int], turn: Mapping[PodId, int]) -> list[PodId]:
    """Fewest requests in flight first."""
    return sorted(pods, key=lambda pod: (in_flight.get(pod, 0), turn[pod]))


class SessionRing:
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016): a session stays with one pod.

    Pods stand on a ring at `POINTS` places each; a session goes to the next pod on it, unless that one has more than
    `BOUND` times the average number of requests: then to the next after it. A pod that comes or goes moves only the
    sessions next to it.
    """

    POINTS = 64
    BOUND = 1.25

    def __init__(self) -> None:
        self._pods: list[PodId] = []
        self._ring: list[tuple[int, PodId]] = []

    def order(self, session: str, pods: Sequence[PodId], in_flight: Mapping[PodId, int]) -> list[PodId]:
        """All pods, the session's own first."""
        if list(pods) != self._pods:
            self._pods = list(pods)
            self._ring = sorted((_digest(f"{pod}/{point}"), pod) for pod in pods for point in range(self.POINTS))
        start = bisect.bisect(self._ring, (_digest(session), PodId("")))
        met = dict.fromkeys(pod for _, pod in self._ring[start:] + self._ring[:start])
        most = self.BOUND * (sum(in_flight.get(pod, 0) for pod in pods) + 1) / max(len(pods), 1)
        return sorted(met, key=lambda pod: in_flight.get(pod, 0) + 1 > most + 1)  # stable: the ring's order is kept


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
