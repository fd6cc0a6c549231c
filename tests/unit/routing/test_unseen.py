"""Several routers, each of which hears of the others' routes late."""

from __future__ import annotations

from collections import Counter

import pytest

from serve_app.index.memory import MemoryIndex
from serve_app.routing.unseen import UNSEEN_S, Unseen, places
from serve_app.types import BlockKey
from tests.unit.routing.fleet import START_S, A, B, C, D, Router, text

EVERY_S = 0.005  # between two requests of the other routers
PODS = [A, B, C, D]


def others_route(router: Router, tokens: int) -> None:
    """Other routers send so much to every pod alike, for a while; all of it is answered, and was seen to be."""
    for i in range(400):
        router.chooser.routed(PODS[i % len(PODS)], text(f"of others {i}", 4), tokens, START_S + i * EVERY_S)
        router.stored(PODS[i % len(PODS)], text(f"of others {i}", 4))
    for pod in PODS:
        router.reported(pod, 0, NOW_S)


NOW_S = START_S + 400 * EVERY_S + 1.0


def test_with_one_router_nothing_is_unseen() -> None:
    router = Router()
    for i in range(100):
        router.route(text(f"prompt {i}", 40), START_S + i * EVERY_S)
    assert router.chooser.unseen.tokens(START_S + 100 * EVERY_S) == 0


def test_an_unseen_request_counts_as_large_as_others_are() -> None:
    unseen = Unseen()
    for i in range(2000):
        unseen.routed(1000 if i % 2 else 3000, i * EVERY_S)
    assert unseen.tokens(2000 * EVERY_S) == pytest.approx(2000, rel=0.05)


def test_it_counts_less_when_others_seldom_route_and_nothing_when_they_stop() -> None:
    unseen = Unseen()
    for i in range(200):
        unseen.routed(2000, i * 10 * UNSEEN_S)  # every tenth time there is one
    now_s = 200 * 10 * UNSEEN_S
    assert unseen.tokens(now_s) == pytest.approx(200, rel=0.2)
    assert unseen.tokens(now_s + 60.0) < 1


def test_every_prompt_has_its_own_order_of_pods_and_all_routers_the_same() -> None:
    first = Counter[str]()
    for i in range(400):
        drawn = places(BlockKey(text(f"prefix {i}", 1)), PODS)
        assert drawn == places(BlockKey(text(f"prefix {i}", 1)), reversed(PODS))
        first[min(drawn, key=drawn.__getitem__)] += 1
    assert min(first.values()) > 60


def test_routers_that_have_not_heard_of_each_other_send_a_new_prefix_to_the_same_pod() -> None:
    index = MemoryIndex()
    one, two = Router(PODS, index), Router(PODS, index)
    for router in (one, two):
        others_route(router, 4000)
    got = Counter[str]()
    for i in range(40):
        keys = text(f"document {i}", 100)
        chosen = one.choose(keys + text("question 1", 2), NOW_S).ranked[0]
        assert two.choose(keys + text("question 2", 2), NOW_S).ranked[0] == chosen
        got[chosen] += 1
    assert set(got) == set(PODS)  # other prefixes go elsewhere: nobody crowds


def test_a_pod_that_holds_more_than_an_unseen_request_may_cost_stays_the_first() -> None:
    router = Router(PODS)
    others_route(router, 1000)
    for i in range(20):
        keys = text(f"document {i}", 200)
        router.stored(C, keys)
        assert router.choose(keys, NOW_S).ranked[0] == C
