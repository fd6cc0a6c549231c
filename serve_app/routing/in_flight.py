"""Requests in flight at each pod: what the pod said last, and what was sent to it since."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from serve_app.types import PodId, PodLoad

REPORT_DELAY_S = 0.15  # the replica looks every 20 ms, its publisher reports every 50 ms
FORGET_S = 30.0
REPORT_VALID_S = 5.0  # a replica reports every second at least: an older report is of one that is not heard any more


class InFlight:
    """A report is at least `REPORT_DELAY_S` old when it arrives, so a request counts on top of a report that came less
    than that after it was sent. A request that no report followed is forgotten after `FORGET_S`.
    """

    def __init__(self) -> None:
        self._sent: dict[PodId, deque[float]] = {}
        self._reports: dict[PodId, PodLoad] = {}

    def sent(self, pod: PodId, now_s: float) -> None:
        self._sent.setdefault(pod, deque()).append(now_s)

    def withdrawn(self, pod: PodId) -> None:
        """The last request that was sent there has not gone there after all."""
        if self._sent.get(pod):
            self._sent[pod].pop()

    def reported(self, pod: PodId, report: PodLoad) -> bool:
        """Returns whether it is news."""
        if report is self._reports.get(pod):
            return False
        self._reports[pod] = report
        return True

    def report(self, pod: PodId, now_s: float) -> PodLoad | None:
        """What the pod said last, if that was lately."""
        report = self._reports.get(pod)
        return report if report is not None and now_s - report.received_at_s < REPORT_VALID_S else None

    def count(self, pod: PodId, now_s: float) -> int:
        """Best estimate for one pod."""
        report, sent = self.report(pod, now_s), self._sent.get(pod)
        if sent:
            known_until_s = now_s - FORGET_S
            if report is not None:
                known_until_s = max(known_until_s, report.received_at_s - REPORT_DELAY_S)
            while sent and sent[0] <= known_until_s:
                sent.popleft()
        return (report.in_flight if report is not None else 0) + len(sent or ())

    def keep_only(self, pods: Iterable[PodId]) -> None:
        keep = set(pods)
        for known in (self._sent, self._reports):
            for pod in known.keys() - keep:
                del known[pod]
