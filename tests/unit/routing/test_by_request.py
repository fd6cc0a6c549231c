"""Load by request id: every way in which a request ends, and pods that say nothing, or no longer."""

from __future__ import annotations

from collections import Counter

import pytest

from serve_app.routing import in_flight as in_flight_module
from serve_app.routing.early import MAX as EARLY_MAX
from serve_app.routing.early import Early
from serve_app.routing.in_flight import ACCEPT_S, FORGET_S, REPORT_VALID_S, InFlight
from serve_app.routing.ledger import LATE_S, Ledger
from serve_app.routing.suspicion import suspicion
from serve_app.types import PodId, PodLoad, Progress, request_tag
from tests.unit.routing.fleet import START_S, A, B, C, D, Router, prompt, text

ONE, TWO = request_tag("one"), request_tag("two")


def test_a_tag_is_of_the_whole_id() -> None:
    assert request_tag("") == b""
    assert len({request_tag(name) for name in ("a", "b", "x" * 500, "x" * 501, "\ud800")}) == 5


@pytest.mark.parametrize("end", [Progress(prefilled=ONE), Progress(ended=ONE), Progress(ONE, ONE, ONE)])
def test_a_request_stops_queueing_with_its_first_token_or_its_end(end: Progress) -> None:
    """Whatever was stored meanwhile, and though others still run: aborted, cut short, shorter than a block."""
    ledger = Ledger()
    ledger.sent(A, text("x", 6), 48_000, START_S, tag=ONE)
    ledger.sent(A, b"", 7, START_S, tag=TWO)
    ledger.progress(A, Progress(accepted=ONE + TWO))
    ledger.settle(lambda pods, keys: [True] * len(pods), START_S + 1)  # BlockStored does not free load
    ledger.reported(A, PodLoad(2, START_S + 1))
    assert ledger.queued_tokens(A) == 48_007
    ledger.progress(B, end)
    assert ledger.queued_tokens(A) == 48_007
    ledger.progress(A, end)
    assert ledger.queued_tokens(A) == 7


def test_a_request_of_several_prompts_ends_as_a_whole() -> None:
    ledger = Ledger()
    for i in range(3):
        ledger.sent(A, text(f"{i}", 2), 32, START_S, tag=ONE)
    ledger.progress(A, Progress(accepted=ONE, prefilled=ONE))
    assert ledger.queued_tokens(A) == 0


def test_what_never_comes_to_an_engine_is_forgotten_soon() -> None:
    """The client hung up before, or the replica refused it and could not say so."""
    ledger, in_flight = Ledger(), InFlight()
    ledger.progress(A, Progress(accepted=TWO))  # it tells of its requests
    in_flight.progress(A, Progress(accepted=TWO))
    ledger.sent(A, text("x", 6), 96, START_S, tag=ONE)
    in_flight.sent(A, START_S, ONE)
    for after_s, tokens, count in ((ACCEPT_S - 0.1, 96, 1), (ACCEPT_S, 0, 0)):
        ledger.settle(lambda pods, keys: [False] * len(pods), START_S + after_s)
        in_flight.reported(A, PodLoad(0, START_S + after_s))
        assert ledger.queued_tokens(A) == tokens
        assert in_flight.count(A, START_S + after_s) == count


def test_what_is_accepted_may_take_its_time() -> None:
    ledger = Ledger()
    ledger.sent(A, text("x", 6), 96, START_S, tag=ONE)
    ledger.progress(A, Progress(accepted=ONE))
    ledger.settle(lambda pods, keys: [False] * len(pods), START_S + 6 * ACCEPT_S)
    assert ledger.queued_tokens(A) == 96


def test_a_pod_may_tell_of_a_request_before_its_router_does() -> None:
    ledger, in_flight = Ledger(), InFlight()
    for told in (ledger, in_flight):
        told.progress(A, Progress(accepted=ONE, prefilled=ONE))
    in_flight.reported(A, PodLoad(1, START_S))
    ledger.sent(A, text("x", 6), 96, START_S, tag=ONE)
    in_flight.sent(A, START_S, ONE)
    assert (ledger.queued_tokens(A), in_flight.count(A, START_S)) == (0, 1)
    ledger.sent(A, text("x", 6), 96, START_S, tag=ONE)  # another request of a client that gives all one id
    assert ledger.queued_tokens(A) == 96


def test_a_request_counts_once_whenever_it_is_reported() -> None:
    in_flight = InFlight()
    in_flight.progress(A, Progress(accepted=TWO))
    in_flight.sent(A, START_S, ONE)
    in_flight.reported(A, PodLoad(1, START_S + 1))  # it is still being tokenized there: the one in flight is another
    assert in_flight.count(A, START_S + 1) == 2
    in_flight.progress(A, Progress(accepted=ONE))
    in_flight.reported(A, PodLoad(2, START_S + 2))
    assert in_flight.count(A, START_S + 2) == 2
    in_flight.sent(A, START_S + 2, b"three---")
    in_flight.withdrawn(A, b"three---")
    in_flight.sent(A, START_S + 2, b"four----")
    in_flight.progress(A, Progress(ended=b"four----"))  # refused
    assert in_flight.count(A, START_S + 2) == 2


def test_lost_reports_are_made_up_for() -> None:
    """Redis was away when the pod told of the end: it has fewer requests now than are open here."""
    ledger = Ledger()
    for i, tag in enumerate((ONE, TWO, b"three---")):
        ledger.sent(A, text(f"{i}", 2), 10**i, START_S + i, tag=tag)
    ledger.progress(A, Progress(accepted=ONE + TWO))
    ledger.reported(A, PodLoad(2, START_S + 5))
    assert ledger.queued_tokens(A) == 111
    ledger.reported(A, PodLoad(1, START_S + 6))
    assert ledger.queued_tokens(A) == 110
    ledger.reported(A, PodLoad(0, START_S + 7))
    assert ledger.queued_tokens(A) == 100  # it may not have come there yet


def test_what_is_known_of_requests_is_bounded() -> None:
    """Of pods that tell of them, and of pods that do not."""
    in_flight, early = InFlight(), Early()
    in_flight.progress(A, Progress(accepted=TWO))
    for i in range(20_000):
        for pod in (A, B):
            in_flight.sent(pod, START_S + i / 100, request_tag(f"{i}"))
        early.told(A, request_tag(f"{i}"))
    for known in (in_flight._sent, in_flight._on_the_way):
        assert max(map(len, known.values())) <= 100 * max(FORGET_S, ACCEPT_S) + 1
    assert not early.was_told(A, request_tag("0"))
    assert early.was_told(A, request_tag("19999"))
    assert len(early._told) < EARLY_MAX


def test_suspicion_is_of_who_is_later_than_the_fleet() -> None:
    """The examples of the module's docstring."""
    assert suspicion({}, 3) == {}
    assert suspicion({C: 6.0}, 3) == {C: 42.0}
    assert suspicion({A: 3.0, B: 3.0, C: 5.0}, 3) == {C: 6.0}
    assert suspicion({B: 5.0}, 2) == {B: 30.0}


class Fleet:
    """Pods that answer a request in `SERVICE_S`; some say nothing of it, some are frozen."""

    SERVICE_S = 1.0
    STEP_S = 0.05

    def __init__(self, silent: tuple[PodId, ...] = (), *, stored: bool = True) -> None:
        self.router = Router()
        self.now_s = START_S
        self.silent = silent
        self.frozen: set[PodId] = set()
        self.share: Counter[PodId] = Counter()
        self._stored = stored
        self._running: dict[PodId, list[tuple[float, bytes]]] = {pod: [] for pod in (A, B, C, D)}
        self._number = 0

    def run(self, seconds: float, prefix: str = "") -> None:
        """20 requests a second, all of one prefix if it has a name."""
        self.share.clear()
        for _ in range(round(seconds / self.STEP_S)):
            self.now_s += self.STEP_S
            self._send(prefix or f"text {self._number}")
            for pod in self._running:
                if pod not in self.frozen:
                    self._work(pod)

    def _send(self, prefix: str) -> None:
        self._number += 1
        router, tag = self.router, request_tag(f"{self._number}")
        found = router.found(prompt(text(prefix, 8) + text(f"end {self._number}", 1)))
        choice = router.chooser.choose(router.pods, found, self.now_s)
        pod = choice.ranked[0]
        router.chooser.sent(pod, found, choice, self.now_s, tag)
        self.share[pod] += 1
        self._running[pod].append((self.now_s + self.SERVICE_S, tag))
        if self._stored and pod not in self.frozen:
            router.stored(pod, found.prompts[0].keys)

    def _work(self, pod: PodId) -> None:
        tags = [tag for _, tag in self._running[pod]]
        ended = [tag for end_s, tag in self._running[pod] if end_s <= self.now_s]
        self._running[pod] = [(end_s, tag) for end_s, tag in self._running[pod] if end_s > self.now_s]
        if pod in self.silent:
            return
        every = b"".join(tags)  # told again and again: nobody minds
        self.router.chooser.progress(pod, Progress(every, every, b"".join(ended)))
        self.router.reported(pod, len(self._running[pod]), self.now_s)


@pytest.mark.parametrize("stored", [True, False])
def test_a_pod_that_reports_nothing_gets_its_share(stored: bool) -> None:
    """As one of plain vLLM does: its events come, or not even these."""
    fleet = Fleet(silent=(D,), stored=stored)
    fleet.run(10)  # to warm up
    fleet.run(60)
    assert 0.15 < fleet.share[D] / fleet.share.total() < 0.4, fleet.share


def test_a_fleet_that_reports_nothing_is_balanced() -> None:
    fleet = Fleet(silent=(A, B, C, D), stored=False)
    fleet.run(60)
    assert max(fleet.share.values()) < 0.35 * fleet.share.total(), fleet.share


def test_a_frozen_pod_is_left_alone_and_comes_back() -> None:
    """It holds what everybody wants."""
    fleet = Fleet()
    fleet.run(10, "hot")
    holder = fleet.share.most_common(1)[0][0]
    fleet.frozen.add(holder)
    fleet.run(LATE_S + 2, "hot")
    fleet.run(20, "hot")
    assert fleet.share[holder] <= 0.01 * fleet.share.total(), fleet.share
    fleet.frozen.clear()
    fleet.run(REPORT_VALID_S)
    fleet.run(20)
    assert fleet.share[holder] > 0.1 * fleet.share.total(), fleet.share


def test_a_slow_fleet_is_not_suspected() -> None:
    fleet = Fleet()
    fleet.run(10)
    fleet.frozen.update((A, B, C, D))
    fleet.run(10)
    assert max(fleet.share.values()) < 0.5 * fleet.share.total(), fleet.share


def test_leases_of_a_pod_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight_module, "LEASES_MAX", 3)
    in_flight = InFlight()
    for i in range(10):
        in_flight.sent(PodId("a"), 0.0, request_tag(f"r{i}"))
        in_flight.lease(PodId("a"), request_tag(f"r{i}"), 100.0)
    assert in_flight.count(PodId("a"), 1.0) == 3
    assert in_flight.count(PodId("a"), 100.0) == 0
