"""Which pods have which LoRA adapter, and what it costs to send a request where its adapter is not.

In: what the engines say they have (`Domain.adapters`, `adapter_slots`), and what was routed. Out: seconds by pod.

    `base:tales` is at a; b has room for another adapter, c has as many as it may, d loads none by itself
    a 0      b one load      c two loads: what it pushes out is loaded again later      d out of the question

A pod that was sent a request for an adapter counts as having it for a while, for it loads it first: otherwise a burst
for a new adapter would have it loaded everywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from serve_app.types import Domain, PodId

LOAD_S = 0.5  # of one adapter, until somebody sets it
NEVER_S = 1000.0  # the pod would answer that it knows no such model
COMING_S = 30.0
_COMING_MAX = 64  # of one pod


class _Has(NamedTuple):
    names: frozenset[str]
    slots: int


class Adapters:
    """Used on one event loop. Args: load_s: seconds that a load takes."""

    def __init__(self, load_s: float = LOAD_S) -> None:
        self._load_s = load_s
        self._has: dict[PodId, _Has] = {}
        self._coming: dict[PodId, OrderedDict[str, float]] = {}  # when each was sent there last; the oldest first

    def learn(self, domains: Iterable[Domain]) -> None:
        """What the engines say."""
        self._has = {
            domain.pod: _Has(frozenset(domain.adapters), domain.adapter_slots)
            for domain in domains
            if domain.pod is not None and (domain.adapters or domain.adapter_slots)
        }
        self._coming = {pod: names for pod, names in self._coming.items() if pod in self._has}

    def knows(self, name: str) -> bool:
        """Whether some pod has it, or may load it: `base:adapter`, as Ray Serve LLM calls those."""
        at_need = ":" in name
        return bool(name) and any(name in has.names or (at_need and has.slots) for has in self._has.values())

    def sent(self, name: str, pod: PodId, now_s: float) -> None:
        """A request for the adapter goes to the pod."""
        if not name or pod not in self._has:
            return
        coming = self._coming.setdefault(pod, OrderedDict())
        coming[name] = now_s
        coming.move_to_end(name)
        while len(coming) > _COMING_MAX or next(iter(coming.values())) <= now_s - COMING_S:
            coming.popitem(last=False)

    def cost_s(self, name: str, pods: Collection[PodId], now_s: float) -> dict[PodId, float]:
        """Of the pods that do not have it. Nothing, if it is no adapter, as far as is known."""
        if not self.knows(name):
            return {}
        return {pod: cost for pod in pods if (cost := self._cost_s(name, pod, now_s))}

    def _cost_s(self, name: str, pod: PodId, now_s: float) -> float:
        has = self._has.get(pod)
        if has is None:
            return NEVER_S
        coming: Mapping[str, float] = self._coming.get(pod, {})
        if name in has.names or now_s - coming.get(name, -COMING_S) < COMING_S:
            return 0.0
        if not has.slots:
            return NEVER_S
        return self._load_s if len(has.names | coming.keys()) < has.slots else 2 * self._load_s
