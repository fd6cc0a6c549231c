"""The event loop: routers and replicas in simulated time.

In: a workload, a policy and the fleet's parameters. Out: `Run`, every request's record and every replica's counters.

Time goes from event to event: an arrival, a first token, an end, a load report. Before an event, every replica runs the
steps that start before it. A step may end after it, and what it yields (outcomes, cache events) becomes an event of its
own, seen at its own time. A request that follows from an answer comes at least `min_think_s` after it, so time never
advances by more than that at once and no replica has run past an arrival.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from benchmarks.fleet.cache import SharedCache
from benchmarks.fleet.engine import LogEntry, ReplicaConfig, What
from benchmarks.fleet.policies import FleetInfo, RoutingPolicy
from benchmarks.fleet.registry import ORACLE, POLICIES, PolicyFactory
from benchmarks.fleet.replica import Replica
from benchmarks.fleet.requests import FleetView, LoadReport, Record, Request
from benchmarks.fleet.workloads import Workload
from serve_app.types import BlockKey

HEARTBEAT_S = 1.0  # a replica reports this often, even if nothing has changed
RETRY_S = 0.05  # a request that every replica refuses, or that waits at the router, is tried again after this


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    replicas: int = 8
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)
    routers: int = 1  # each with its own view; a request goes to one of them at random
    event_delay_s: float = 0.01  # from the end of the engine's step to the routers' index
    report_interval_s: float = 0.1  # a replica reports its load this often, if it has changed; 0: the view is exact
    report_delay_s: float = 0.01
    sees_progress: bool = True  # a router learns when its own requests get a first token and end
    seed: int = 0


@dataclass(slots=True)
class Run:
    """What came of a simulation."""

    records: list[Record]
    replicas: list[Replica]
    end_s: float
    decisions: int


class _Router:
    """One router: its policy, its view, and how the two are kept up to date."""

    def __init__(self, policy: RoutingPolicy, replicas: int) -> None:
        self.policy = policy
        self.sent: list[deque[float]] = [deque() for _ in range(replicas)]  # since the last report, by time
        self.view = FleetView([0] * replicas, [None] * replicas)

    def report(self, replica: int, report: LoadReport, now_s: float) -> None:
        """A report arrives. It counts what was sent until it was taken."""
        sent = self.sent[replica]
        while sent and sent[0] <= report.taken_at_s:
            sent.popleft()
        self.view.in_flight[replica] = report.in_flight + len(sent)
        self.view.reports[replica] = report
        self.policy.on_load_report(replica, report, now_s)

    def route(self, record: Record, now_s: float, fleet: list[Replica]) -> bool:
        """Send the request to a replica that takes it. Returns False if none does, or if it must wait."""
        self.view.closed.clear()
        while len(self.view.closed) < len(fleet):
            chosen = self.policy.route(record.request, now_s, self.view)
            if chosen is None:
                return False
            if fleet[chosen].submit(record, now_s):
                record.replica = chosen
                record.routed_s = now_s
                self.sent[chosen].append(now_s)
                self.view.in_flight[chosen] += 1
                return True
            record.rejections += 1
            self.view.closed.add(chosen)
        return False


class Simulation:
    """Args: policy: name in registry.POLICIES, or a factory."""

    def __init__(self, workload: Workload, policy: str | PolicyFactory, config: SimulationConfig) -> None:
        self.config = config
        self.workload = workload
        self.now_s = 0.0
        self.records: list[Record] = []
        self.decisions = 0
        rng = random.Random(config.seed)
        shared: set[BlockKey] = set()
        self.replicas = [
            Replica(i, config.replica, SharedCache(shared) if policy == ORACLE else None)
            for i in range(config.replicas)
        ]
        factory = POLICIES[policy] if isinstance(policy, str) else policy
        size = config.replica.block_size_tokens
        shared_by_routers: dict[str, Any] = {}
        self.routers = [
            _Router(
                factory(
                    FleetInfo(
                        config.replicas,
                        size,
                        config.replica.kv_tokens // size,
                        config.replica.max_num_batched_tokens,
                        config.routers,
                        i,
                        shared_by_routers,
                    ),
                    random.Random(rng.random()),
                ),
                config.replicas,
            )
            for i in range(config.routers)
        ]
        self._rng = rng
        self._in_flight = [0] * config.replicas  # as it is
        self._reported: list[tuple[int, int] | None] = [
            None
        ] * config.replicas  # steps and requests, by the last report
        self._reported_at_s = [0.0] * config.replicas
        self._wants_events = any(router.policy.wants_events for router in self.routers)
        self._unseen: list[deque[LogEntry]] = [deque() for _ in self.replicas]  # cache events on their way
        self._mail: deque[tuple[float, int, Any]] = deque()  # on its way between routers: time sent, sender, message
        self._queue: list[tuple[float, int, What | None, Record]] = []  # arrivals (None) and outcomes
        self._numbers = itertools.count()
        self._initial = workload.initial()
        self._last_initial: Record | None = None

    def run(self) -> Run:
        config, queue = self.config, self._queue
        next_report_s = config.report_interval_s or float("inf")
        reports: deque[tuple[float, dict[int, LoadReport]]] = deque()  # on their way, with time of arrival
        self._next_initial()
        open_requests = 0
        while queue or open_requests:
            until_s = self.now_s + self.workload.min_think_s
            if queue:
                until_s = min(until_s, queue[0][0])
            until_s = min(until_s, next_report_s)
            if reports:
                until_s = min(until_s, reports[0][0])
            self._advance(until_s)
            if queue and queue[0][0] <= until_s:  # maybe one that has just come up
                self.now_s, _, what, record = heapq.heappop(queue)
                if what is None:
                    open_requests += self._arrive(record)
                else:
                    open_requests -= self._progress(what, record)
                continue
            self.now_s = until_s
            if reports and reports[0][0] <= until_s:
                for replica, report in reports.popleft()[1].items():
                    for router in self.routers:
                        router.report(replica, report, until_s)
            if until_s >= next_report_s:
                if changed := self._changed_reports(until_s):
                    reports.append((until_s + config.report_delay_s, changed))
                next_report_s += config.report_interval_s
        return Run(self.records, self.replicas, self.now_s, self.decisions)

    def _advance(self, until_s: float) -> None:
        for replica in self.replicas:
            if replica.time_s < until_s and replica.has_work:
                replica.advance(until_s)
                for time_s, what, record in replica.outcomes:
                    heapq.heappush(self._queue, (time_s, next(self._numbers), what, record))
                replica.outcomes.clear()
                if self._wants_events:
                    self._unseen[replica.index].extend(replica.log)
                replica.log.clear()

    def _arrive(self, record: Record) -> int:
        """Route it. Returns how many requests are in the fleet that were not before."""
        if record is self._last_initial:
            self._next_initial()
        if self._wants_events:
            self._deliver_events()
        router = self.routers[record.router]
        if self.config.report_interval_s == 0:
            for replica in self.replicas:
                report = replica.report(self.now_s, self._in_flight[replica.index])
                router.report(replica.index, report, self.now_s)
        self.decisions += 1
        accepted = router.route(record, self.now_s, self.replicas)
        self._collect(record.router)
        if not accepted:
            heapq.heappush(self._queue, (self.now_s + RETRY_S, next(self._numbers), None, record))
            return 0
        self._in_flight[record.replica] += 1
        return 1

    def _progress(self, what: What, record: Record) -> int:
        """A first token or an end. Returns how many requests have left the fleet."""
        router = self.routers[record.router]
        if what is What.FIRST_TOKEN:
            if self.config.sees_progress:
                router.policy.on_first_token(record.replica, record.request, self.now_s)
                self._collect(record.router)
            return 0
        self._in_flight[record.replica] -= 1
        if self.config.sees_progress:
            router.view.in_flight[record.replica] = max(0, router.view.in_flight[record.replica] - 1)
            router.policy.on_finished(record.replica, record.request, self.now_s)
            self._collect(record.router)
        for request in self.workload.after(record):
            self._push(request)
        return 1

    def _deliver_events(self) -> None:
        """What has been published at least `event_delay_s` ago reaches every router."""
        seen_until_s = self.now_s - self.config.event_delay_s
        mail = self._mail
        while mail and mail[0][0] <= seen_until_s:
            sent_s, sender, message = mail.popleft()
            for i, router in enumerate(self.routers):
                if i != sender:
                    router.policy.on_peer(sender, message, sent_s + self.config.event_delay_s)
        for replica, unseen in enumerate(self._unseen):
            while unseen and unseen[0].time_s <= seen_until_s:
                time_s, tier, events = unseen.popleft()
                at_s = time_s + self.config.event_delay_s
                for stored, keys in events:
                    packed = b"".join(keys)
                    for router in self.routers:
                        if stored:
                            router.policy.on_stored(replica, packed, at_s, tier)
                        else:
                            router.policy.on_removed(replica, packed, at_s, tier)

    def _collect(self, router: int) -> None:
        """What a router has to say to the others is on its way."""
        outbox = self.routers[router].policy.outbox
        if outbox:
            self._mail += [(self.now_s, router, message) for message in outbox]
            outbox.clear()

    def _changed_reports(self, now_s: float) -> dict[int, LoadReport]:
        """What the replicas have to say. One that has done nothing since its last report is silent for a second."""
        reports = {}
        for replica in self.replicas:
            index = replica.index
            state = replica.steps, self._in_flight[index]
            if state != self._reported[index] or now_s - self._reported_at_s[index] >= HEARTBEAT_S:
                self._reported[index], self._reported_at_s[index] = state, now_s
                reports[index] = replica.report(now_s, self._in_flight[index])
        return reports

    def _next_initial(self) -> None:
        """Put the next request that depends on no answer into the queue. One at a time: there may be many."""
        request = next(self._initial, None)
        self._last_initial = self._push(request) if request is not None else None

    def _push(self, request: Request) -> Record:
        record = Record(request, router=self._rng.randrange(len(self.routers)))
        self.records.append(record)
        heapq.heappush(self._queue, (request.arrival_s, next(self._numbers), None, record))
        return record


def simulate(workload: Workload, policy: str | PolicyFactory, config: SimulationConfig) -> Run:
    """Run to the end."""
    return Simulation(workload, policy, config).run()
