"""Choices that were made and have not ended: who has which request, until when it counts there.

Whoever asked says what became of it. What nobody speaks of ends with its lease.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from serve_app.types import PodId

OPEN_MAX = 100_000


class Reservation(NamedTuple):
    """A choice whose request has not ended; times are monotonic, in seconds."""

    model: str
    pod: PodId
    chosen_at_s: float  # monotonic
    until_s: float
    first_token_at_s: float | None = None


class Reservations:
    """By request id. Used on one event loop."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Reservation] = OrderedDict()
        self.expired = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str, new: Reservation) -> list[tuple[str, Reservation]]:
        """Returns those that have to end for it: a former one of this id, or the oldest beyond the cap."""
        ended = []
        if (former := self._open.pop(request_id, None)) is not None:
            ended.append((request_id, former))
        self._open[request_id] = new
        if len(self._open) > OPEN_MAX:
            ended.append(self._open.popitem(last=False))
        return ended

    def get(self, request_id: str) -> Reservation | None:
        return self._open.get(request_id)

    def first_token(self, request_id: str, now_s: float) -> None:
        known = self._open.get(request_id)
        if known is not None and known.first_token_at_s is None:
            self._open[request_id] = known._replace(first_token_at_s=now_s)

    def end(self, request_id: str) -> Reservation | None:
        """None: there is no such choice, or not any more."""
        return self._open.pop(request_id, None)

    def expire(self, now_s: float) -> list[tuple[str, Reservation]]:
        """Ends those whose lease is over. Leases differ, so all are looked at."""
        over = [(request_id, one) for request_id, one in self._open.items() if one.until_s <= now_s]
        for request_id, _ in over:
            del self._open[request_id]
        self.expired += len(over)
        return over
