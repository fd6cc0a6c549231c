"""A Chooser that is kept up to date by a Mirror, and the receipts of what it chose.

    mirror (its thread: loads, served requests, other routers' routes)  ->  catch_up()  ->  chooser, closed receipts

Used on one event loop; it takes what the mirror's thread has put down, and never waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from serve_app.index.mirror import Mirror
from serve_app.routing.chooser import Chooser
from serve_app.routing.receipts import Receipt, Receipts
from serve_app.types import PodId


class Desk:
    """Args: router: id of the router that this is, to know its own routes by."""

    def __init__(self, mirror: Mirror, chooser: Chooser, router: str = "") -> None:
        self.chooser = chooser
        self.receipts = Receipts()
        self._mirror = mirror
        self._router = router

    def catch_up(self, pods: Iterable[PodId]) -> list[Receipt]:
        """Take in what has become known since the last call. Returns the receipts that are complete now."""
        complete: list[Receipt] = []
        for pod, served in self._mirror.served():
            self.chooser.served(pod, served)
            complete += [done for one in served if (done := self.receipts.close(pod, one)) is not None]
        for router, route in self._mirror.routed():
            if router != self._router:
                self.chooser.routed(route.pod, route.keys, route.tokens, route.at_s)
        for pod in pods:
            load = self._mirror.load(pod)
            if load is not None:
                self.chooser.loaded(pod, load)
        return complete
