"""What pods have told of requests that are not known yet: another router's route may arrive later than that."""

from __future__ import annotations

from collections import OrderedDict

from serve_app.types import PodId, RequestTag

MAX = 4096


class Early:
    """The last `MAX` that nobody has asked about."""

    def __init__(self) -> None:
        self._told: OrderedDict[tuple[PodId, RequestTag], None] = OrderedDict()

    def told(self, pod: PodId, tag: RequestTag) -> None:
        self._told[pod, tag] = None
        if len(self._told) > MAX:
            self._told.popitem(last=False)

    def was_told(self, pod: PodId, tag: RequestTag) -> bool:
        """Asked once of a request."""
        return self._told.pop((pod, tag), False) is None
