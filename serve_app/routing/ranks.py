"""Data parallel ranks: each is a pod of its own to the index and the chooser; requests are sent to its replica.

    engine without ranks                  pod R
    rank n of an engine with several      pod R#n, record: replica R, rank n; the engine is told n with the request
    rank n of a gang of Serve replicas    pod R,   record: replica R, rank n; whoever sends to R has named the rank

A router learns from the records which pods are behind a replica. What it has seen of a living replica stays: a rank
whose publisher is away still takes requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serve_app.types import Domain, PodId


class Ranks:
    """Which pods are behind which replica, for the replicas whose engines have several ranks."""

    def __init__(self) -> None:
        self._pods: dict[PodId, list[PodId]] = {}  # replica -> its pods, in the order of their ranks
        self._rank: dict[PodId, tuple[PodId, int]] = {}  # pod -> its replica and rank

    def __bool__(self) -> bool:
        return bool(self._pods)

    def learn(self, domains: Iterable[Domain]) -> None:
        """Take in what the records say."""
        for domain in domains:
            pod, replica, rank = domain.pod, PodId(domain.replica), domain.rank
            if pod is None or rank is None or not replica or pod == replica or pod in self._rank:
                continue
            self._rank[pod] = replica, rank
            pods = self._pods.setdefault(replica, [])
            pods.append(pod)
            pods.sort(key=self._rank.__getitem__)

    def keep_only(self, replicas: Iterable[PodId]) -> None:
        """These replicas are there; others are gone."""
        for gone in self._pods.keys() - set(replicas):
            for pod in self._pods.pop(gone):
                del self._rank[pod]

    def pods(self, replica: PodId) -> Sequence[PodId]:
        """What can be chosen behind a replica: its ranks, or itself."""
        return self._pods.get(replica) or (replica,)

    def replica(self, pod: PodId) -> PodId:
        """Where requests for the pod are sent."""
        known = self._rank.get(pod)
        return pod if known is None else known[0]

    def rank(self, pod: PodId) -> int | None:
        """What the engine must be told; None: nothing."""
        known = self._rank.get(pod)
        return None if known is None else known[1]

    def best(self, ranked: Iterable[PodId]) -> dict[PodId, PodId]:
        """Replica -> its best pod, best replica first, of pods that are ranked best first."""
        best: dict[PodId, PodId] = {}
        for pod in ranked:
            best.setdefault(self.replica(pod), pod)
        return best
