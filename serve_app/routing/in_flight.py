"""Requests in flight at each pod: what the pod said last, and what was sent to it and is not in that.

A replica of ours says of every request when its engine has accepted it, and when it has ended: then a request counts on
top of the report until it is one of these. Of others only the time is known: a report is at least `REPORT_DELAY_S` old
when it arrives, so a request counts on top of a report that came less than that after it was sent.

A pod that reports nothing is not idle. It is taken to need as long for a request as those that report do:

    a, b   report 6 and 10 in flight, and were sent 40 and 60 requests in the last 30 s     16 for 100 requests
    c      reports nothing, and was sent 50                                                 8
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from serve_app.routing.early import Early
from serve_app.types import PodId, PodLoad, Progress, RequestTag

REPORT_DELAY_S = 0.15  # the replica looks every 20 ms, its publisher reports every 50 ms
REPORT_LATE_S = 3.0
FORGET_S = 30.0
REPORT_VALID_S = 5.0  # a replica reports every second at least: an older report is of one that is not heard any more
ACCEPT_S = 10.0  # a request that no engine has accepted in this time has not come to one


class InFlight:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._sent: dict[PodId, deque[float]] = {}  # times of the last FORGET_S
        self._on_the_way: dict[PodId, dict[RequestTag, float]] = {}  # not yet accepted, as far as is known
        self._early = Early()
        self._tells: set[PodId] = set()  # pods that say what becomes of each request
        self._reports: dict[PodId, PodLoad] = {}

    def sent(self, pod: PodId, now_s: float, tag: RequestTag = b"") -> None:
        self._sent.setdefault(pod, deque()).append(now_s)
        if tag and not self._early.was_told(pod, tag):
            self._on_the_way.setdefault(pod, {})[tag] = now_s

    def withdrawn(self, pod: PodId, tag: RequestTag = b"") -> None:
        """The last request that was sent there has not gone there after all."""
        if self._sent.get(pod):
            self._sent[pod].pop()
        self._on_the_way.get(pod, {}).pop(tag, None)

    def progress(self, pod: PodId, progress: Progress) -> None:
        """What has become of requests there."""
        accepted, _, ended = progress.tags()
        if accepted:
            self._tells.add(pod)
        on_the_way = self._on_the_way.get(pod, {})
        for tag in accepted:
            if on_the_way.pop(tag, None) is None:
                self._early.told(pod, tag)
        for tag in ended:
            on_the_way.pop(tag, None)

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

    def tells(self, pod: PodId, now_s: float) -> bool:
        """Whether the pod says what becomes of each request, and did so lately."""
        return pod in self._tells and self.report(pod, now_s) is not None

    def overdue_s(self, pod: PodId, now_s: float) -> float:
        """How long the report is overdue of a pod that has said what becomes of each request."""
        report = self._reports.get(pod)
        if report is None or pod not in self._tells:
            return 0.0
        return max(now_s - report.received_at_s - REPORT_LATE_S, 0.0)

    def counts(self, pods: Sequence[PodId], now_s: float) -> dict[PodId, int]:
        """Best estimate for each of them."""
        counts: dict[PodId, int] = {}
        silent: list[PodId] = []
        reported, sent_to_these = 0, 0
        for pod in pods:
            sent = self._lately(pod, now_s)
            report = self.report(pod, now_s)
            if report is None:
                silent.append(pod)
                counts[pod] = len(sent)
                continue
            counts[pod] = report.in_flight + self._on_top(pod, report, sent, now_s)
            reported += counts[pod]
            sent_to_these += len(sent)
        if silent and sent_to_these:
            for pod in silent:
                counts[pod] = round(reported * counts[pod] / sent_to_these)
        return counts

    def count(self, pod: PodId, now_s: float) -> int:
        """Best estimate for one pod, by itself."""
        return self.counts((pod,), now_s)[pod]

    def keep_only(self, pods: Iterable[PodId]) -> None:
        keep = set(pods)
        known: Mapping[PodId, object]
        for known in (self._sent, self._reports, self._on_the_way):
            for pod in known.keys() - keep:
                del known[pod]
        self._tells &= keep

    def _lately(self, pod: PodId, now_s: float) -> deque[float]:
        sent = self._sent.get(pod)
        if sent is None:
            return deque()
        while sent and sent[0] <= now_s - FORGET_S:
            sent.popleft()
        return sent

    def _on_top(self, pod: PodId, report: PodLoad, sent: deque[float], now_s: float) -> int:
        """Of what was sent there: what the report cannot know of."""
        if pod in self._tells:
            on_the_way = self._on_the_way.get(pod, {})
            while on_the_way and (oldest := next(iter(on_the_way.items())))[1] <= now_s - ACCEPT_S:
                del on_the_way[oldest[0]]
            return len(on_the_way)
        known_until_s = report.received_at_s - REPORT_DELAY_S
        count = 0
        for at_s in reversed(sent):
            if at_s <= known_until_s:
                break
            count += 1
        return count
