"""Choices that look at load or session only."""

from collections import Counter

from serve_app.routing.baselines import SessionRing, by_load
from serve_app.routing.choice import Policy
from serve_app.types import PodId
from tests.unit.routing.fleet import START_S, A, B, C, Router

PODS = [PodId(f"pod {i}") for i in range(8)]
SESSIONS = [f"session {i}" for i in range(2000)]


def test_by_load_and_equal_ones_by_turn() -> None:
    assert by_load([A, B, C], {A: 2, C: 2}, {A: 1, B: 2, C: 0}) == [B, C, A]


def test_a_session_keeps_its_pod_and_all_pods_have_sessions() -> None:
    ring, other = SessionRing(), SessionRing()
    homes = {session: ring.order(session, PODS, {})[0] for session in SESSIONS}
    assert homes == {session: other.order(session, PODS, {})[0] for session in SESSIONS}  # routers agree
    share = Counter(homes.values())
    assert set(share) == set(PODS)
    assert max(share.values()) < 1.6 * len(SESSIONS) / len(PODS)
    assert sorted(ring.order("x", PODS, {})) == sorted(PODS)


def test_a_pod_that_goes_moves_its_own_sessions_only_and_spreads_them() -> None:
    ring = SessionRing()
    before = {session: ring.order(session, PODS, {}) for session in SESSIONS}
    left = PODS[:3] + PODS[4:]
    after = {session: ring.order(session, left, {}) for session in SESSIONS}
    moved = {session for session in SESSIONS if before[session][0] != after[session][0]}
    assert moved == {session for session in SESSIONS if before[session][0] == PODS[3]}
    assert all(after[session][0] == before[session][1] for session in moved)  # to the next on the ring
    assert len({after[session][0] for session in moved}) > 4
    assert before == {session: ring.order(session, PODS, {}) for session in SESSIONS}  # and back again


def test_a_pod_over_the_bound_is_passed_over() -> None:
    ring = SessionRing()
    home, neighbour, *_ = ring.order("s", PODS, {})
    fair = dict.fromkeys(PODS, 10)
    assert ring.order("s", PODS, fair | {home: 11})[0] == home
    assert ring.order("s", PODS, fair | {home: 20})[0] == neighbour
    assert ring.order("s", PODS, fair | {home: 20})[-1] == home


def test_no_session_has_a_pod_far_above_the_average() -> None:
    """One session sends everything: bounded load spreads it."""
    router = Router([A, B, C], policy=Policy.SESSION)
    got: Counter[str] = Counter()
    for _ in range(300):
        choice = router.chooser.choose(router.pods, None, START_S, session="the only one")
        router.chooser.sent(choice.ranked[0], None, choice, START_S)
        got[choice.ranked[0]] += 1
    assert max(got.values()) <= SessionRing.BOUND * 100 + 2
