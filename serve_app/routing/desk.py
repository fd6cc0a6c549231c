"""A Chooser that is kept up to date by a Mirror, and the receipts of what it chose.

    mirror (its thread: loads, served requests, other routers' routes)  ->  catch_up()  ->  chooser, closed receipts

Used on one event loop; it takes what the mirror's thread has put down, and never waits for it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from serve_app.index.mirror import Mirror
from serve_app.routing.chooser import Chooser
from serve_app.routing.prediction_check import PredictionCheck
from serve_app.routing.receipts import Open, Receipts
from serve_app.types import Epoch, PodId, Served

logger = logging.getLogger(__name__)


class Standing(NamedTuple):
    """What a pod has to do."""

    in_flight: int  # requests
    waiting: int  # of these, without their first token
    queued_tokens: int  # prefill that is not done


class Desk:
    """Args: router: id of the router that this is, to know its own routes by."""

    def __init__(self, mirror: Mirror, chooser: Chooser, router: str = "") -> None:
        self.chooser = chooser
        self.receipts = Receipts()
        self.check = PredictionCheck()
        self.counters: Counter[str] = Counter()
        self._epochs: dict[PodId, Epoch] = {}
        self._mirror = mirror
        self._router = router

    def distrusted(self) -> dict[PodId, tuple[Epoch, str]]:
        """Pods whose predictions do not hold: in which life of the engine, and the likely cause."""
        epochs = {domain.pod: domain.epoch for domain, _, _ in self._mirror.domains() if domain.pod is not None}
        for pod, epoch in self._epochs.items():
            if epochs.get(pod) != epoch:  # what was wrong with an engine's former life says nothing of this one
                self.check.forget(pod)
        self._epochs = epochs
        return {pod: (epochs[pod], cause) for pod, cause in self.check.causes.items() if pod in epochs}

    def catch_up(self, pods: Iterable[PodId]) -> list[Open]:
        """Take in what has become known since the last call. Returns the receipts that are complete now."""
        complete: list[Open] = []
        for pod, served in self._mirror.served():
            with self._one_item("what a pod has served"):
                complete += self._served(pod, served)
        for router, route in self._mirror.routed():
            if router != self._router:
                with self._one_item("what a router has routed"):
                    self.chooser.routed(route.pod, route.keys, route.tokens, route.at_s, route.tag, route.lease_s)
        for pod, progress in self._mirror.progress():
            with self._one_item("what has become of a pod's requests"):
                self.chooser.progress(pod, progress)
        for pod in pods:
            load = self._mirror.load(pod)
            if load is not None:
                self.chooser.loaded(pod, load)
        return complete

    def standing(self, pods: Sequence[PodId], now_s: float) -> dict[PodId, Standing]:
        """What each pod has to do, as a decision would see it."""
        in_flight = self.chooser.in_flight.counts(pods, now_s)
        waiting, queued = self.chooser.ledger.waiting(pods), self.chooser.ledger.queued(pods)
        return {pod: Standing(in_flight[pod], waiting[pod], round(queued[pod])) for pod in pods}

    def _served(self, pod: PodId, served: Sequence[Served]) -> list[Open]:
        self.chooser.served(pod, served)
        return self._close(pod, served)

    def answered(self, pod: PodId, served: Served) -> list[Open]:
        """A request's receipt, by who saw its answer pass. Its times are no engine's, and teach nothing."""
        return self._close(pod, [served])

    def _close(self, pod: PodId, served: Sequence[Served]) -> list[Open]:
        """The receipts of these requests."""
        spec, complete = self._mirror.spec(), []
        for done in filter(None, (self.receipts.close(pod, one) for one in served)):
            complete.append(done)
            if spec is not None:
                came = not done.expected or self._mirror.held([pod], done.expected)[0]
                self.check.observe(done.receipt, spec.block_size, came=came)
        return complete

    @contextmanager
    def _one_item(self, what: str) -> Iterator[None]:
        """What one pod or router has said cannot keep the others' from being taken in."""
        try:
            yield
        except Exception:
            self.counters["skipped_items"] += 1
            if self.counters["skipped_items"] == 1:
                logger.exception("%s cannot be taken in; it is skipped, as all further ones are, and counted", what)
