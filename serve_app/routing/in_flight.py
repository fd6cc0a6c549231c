"""Requests in flight at each pod: what the pod said last, and what was sent to it and is not in that.

A replica of ours says of every request when its engine has accepted it, and when it has ended: then a request counts on
top of the report until it is one of these. Of others only the time is known: a report is at least `REPORT_DELAY_S` old
when it arrives, so a request counts on top of a report that came less than that after it was sent.

A pod that reports nothing is not idle. It is taken to need as long for a request as those that report do:

    a, b   report 6 and 10 in flight, and were sent 40 and 60 requests in the last 30 s     16 for 100 requests
    c      reports nothing, and was sent 50                                                 8

unless who sends says when each has ended (`lease`): then the count of those that have not is what is known.
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
LEASES_MAX = 10_000  # of a pod; more of them have long been lost
ACCEPT_S = 10.0  # a request that no engine has accepted in this time has not come to one


class InFlight:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._sent: dict[PodId, deque[float]] = {}  # times of the last FORGET_S
        self._on_the_way: dict[PodId, dict[RequestTag, float]] = {}  # not yet accepted, as far as is known
        self._early = Early()
        self._tells: set[PodId] = set()  # pods that say what becomes of each request
        self._reports: dict[PodId, PodLoad] = {}
        self._leases: dict[PodId, dict[RequestTag, float]] = {}  # until when; their sender tells when they end

    def sent(self, pod: PodId, now_s: float, tag: RequestTag = b"") -> None:
        self._lately(pod, now_s)
        self._sent.setdefault(pod, deque()).append(now_s)
        if tag and not self._early.was_told(pod, tag):
            self._not_lost(pod, now_s)
            self._on_the_way.setdefault(pod, {})[tag] = now_s

    def lease(self, pod: PodId, tag: RequestTag, until_s: float) -> None:
        """The request that was just sent there counts until its end is told, or until then."""
        leases = self._leases.setdefault(pod, {})
        leases[tag] = until_s
        if len(leases) > LEASES_MAX:
            del leases[next(iter(leases))]

    def withdrawn(self, pod: PodId, tag: RequestTag = b"") -> None:
        """The last request that was sent there has not gone there after all."""
        if self._sent.get(pod):
            self._sent[pod].pop()
        self._on_the_way.get(pod, {}).pop(tag, None)
        self._leases.get(pod, {}).pop(tag, None)

    def progress(self, pod: PodId, progress: Progress) -> None:
        """What has become of requests there, by the pod or by who has a lease."""
        accepted, _, ended = progress.tags()
        if accepted:
            self._tells.add(pod)
        on_the_way = self._on_the_way.get(pod, {})
        for tag in accepted:
            if on_the_way.pop(tag, None) is None:
                self._early.told(pod, tag)
        leases = self._leases.get(pod, {})
        for tag in ended:
            on_the_way.pop(tag, None)
            leases.pop(tag, None)

    def reported(self, pod: PodId, report: PodLoad) -> bool:
        """Returns whether it is news."""
        if report is self._reports.get(pod):
            return False
        self._reports[pod] = report
        return True

    def reports(self, pods: Iterable[PodId], now_s: float) -> dict[PodId, PodLoad]:
        """What each of them said last, if that was lately."""
        known, since_s = self._reports, now_s - REPORT_VALID_S
        return {
            pod: report for pod in pods if (report := known.get(pod)) is not None and report.received_at_s > since_s
        }

    def overdue_s(self, now_s: float) -> dict[PodId, float]:
        """How long the report is overdue, of pods that have said what becomes of each request."""
        due_s = now_s - REPORT_LATE_S
        return {
            pod: due_s - report.received_at_s
            for pod, report in self._reports.items()
            if report.received_at_s < due_s and pod in self._tells
        }

    def counts(self, pods: Sequence[PodId], now_s: float) -> dict[PodId, int]:
        """Best estimate for each of them."""
        reports, counts = self.reports(pods, now_s), dict[PodId, int]()
        for pod in pods:
            report = reports.get(pod)
            counts[pod] = 0 if report is None else report.in_flight + self._on_top(pod, report, now_s)
        if len(reports) < len(pods):
            of_these = sum(counts.values())
            sent_to_these = sum(len(self._lately(pod, now_s)) for pod in reports)
            for pod in pods:
                if pod in self._leases and pod not in reports:
                    counts[pod] = self._leased(pod, now_s)
                elif pod not in reports:
                    sent = len(self._lately(pod, now_s))
                    counts[pod] = round(of_these * sent / sent_to_these) if sent_to_these else sent
        return counts

    def count(self, pod: PodId, now_s: float) -> int:
        """Best estimate for one pod, by itself."""
        return self.counts((pod,), now_s)[pod]

    def keep_only(self, pods: Iterable[PodId]) -> None:
        keep = set(pods)
        known: Mapping[PodId, object]
        for known in (self._sent, self._reports, self._on_the_way, self._leases):
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

    def _on_top(self, pod: PodId, report: PodLoad, now_s: float) -> int:
        """Of what was sent there: what the report cannot know of."""
        if pod in self._tells:
            return self._not_lost(pod, now_s)
        known_until_s = report.received_at_s - REPORT_DELAY_S
        count = 0
        for at_s in reversed(self._sent.get(pod, ())):
            if at_s <= known_until_s:
                break
            count += 1
        return count

    def _leased(self, pod: PodId, now_s: float) -> int:
        leases = self._leases[pod]
        for tag in [tag for tag, until_s in leases.items() if until_s <= now_s]:
            del leases[tag]
        return len(leases)

    def _not_lost(self, pod: PodId, now_s: float) -> int:
        """How many are on the way there, and have not been for too long."""
        on_the_way = self._on_the_way.get(pod)
        while on_the_way and (oldest := next(iter(on_the_way.items())))[1] <= now_s - ACCEPT_S:
            del on_the_way[oldest[0]]
        return len(on_the_way) if on_the_way else 0
