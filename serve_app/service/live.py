"""What the page at /kvcache/ shows of one model: its fleet, and the last decisions."""

from __future__ import annotations

import time
from collections.abc import Sequence

from serve_app.blocks import KEY_BYTES
from serve_app.service import views
from serve_app.service.backend import Backend
from serve_app.service.recent import HOLDERS_SHOWN, Recent, place_of
from serve_app.service.refused import Refused, refusing

SHOWN_MAX = 100  # decisions in an answer
OPEN_MAX = 20


class Live:
    """Used on one event loop. Args: models: names of all that the service knows."""

    def __init__(self, backend: Backend, models: Sequence[str]) -> None:
        self._backend = backend
        self._models = list(models)
        self._recent = Recent(backend.receipts)

    async def overview(self) -> views.Overview:
        """Raises:
        Refused: there is no index, with the reason.
        """
        await self._recent.catch_up()
        total, by_replica = self._recent.traffic()
        with refusing():
            fleet, branches = await self._backend.fleet(), await self._branches()
        return views.Overview(str(self._backend.model), self._models, time.time(), fleet, total, by_replica, branches)

    async def decisions(self, after: str, limit: str) -> views.Decisions:
        """Args, as they stand in the query:
            after: id of the last one that is known; empty: none is.
            limit: so many at most.

        Raises:
            Refused: one of them is wrong.
        """
        place, count = _place(after), _count(limit)
        await self._recent.catch_up()
        complete = [
            views.Decision(seen.receipt, seen.conversation, seen.id) for seen in self._recent.after(place, count)
        ]
        pending = [
            views.Decision(one.receipt, self._recent.conversation(one.trail.tail))
            for one in self._backend.open_receipts(OPEN_MAX)
        ]
        return views.Decisions(complete, pending, self._recent.last)

    async def _branches(self) -> list[views.Branch]:
        beginnings = self._recent.beginnings()
        if not beginnings:
            return []
        holders = await self._backend.holders(b"".join([one.path[-KEY_BYTES:] for one in beginnings]))
        return [
            views.Branch(one.blocks, one.requests, list(map(str, pods[:HOLDERS_SHOWN])), len(pods), one.parent)
            for one, pods in zip(beginnings, holders, strict=True)
        ]


def _place(after: str) -> tuple[int, int]:
    try:
        return place_of(after) if after else (0, 0)
    except ValueError as error:
        message = "after must be the id of a decision, as `last` gave it"
        raise Refused(422, "invalid_field", message, field="after") from error


def _count(limit: str) -> int:
    if not limit.isdecimal() or not 1 <= int(limit[:10]) <= SHOWN_MAX:
        raise Refused(422, "invalid_field", f"limit must be 1 to {SHOWN_MAX}", field="limit")
    return int(limit)
