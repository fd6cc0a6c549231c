"""Bursts: what was routed a moment ago counts, though no pod has said anything of it yet."""

from collections import Counter

import pytest

from serve_app.index.memory import MemoryIndex
from tests.unit.routing.fleet import BLOCK_SIZE, START_S, A, B, C, D, Router, prompt, text

REPORT_S = 0.05  # between two reports of a pod


def test_different_prompts_between_two_load_reports_are_spread() -> None:
    router = Router()
    for pod in router.pods:
        router.reported(pod, 0, START_S)
    got = Counter(router.route(text(f"prompt {i}", 64), START_S + i * 0.001) for i in range(40))
    assert set(got.values()) == {10}


@pytest.mark.parametrize("blocks", [0, 1, 64])
def test_cold_requests_on_an_idle_fleet_are_spread(blocks: int) -> None:
    """Every one is done before the next comes, so no load tells the pods apart."""
    router = Router()
    got = Counter(router.answered(text(f"prompt {i}", blocks), START_S + 60.0 * i) for i in range(40))
    assert max(got.values()) - min(got.values()) <= 2
    assert len(got) == len(router.pods)


def test_ties_are_spread_whatever_comes_between_them() -> None:
    """Every other request has a home; of the rest nothing is known. These are still not all for the same pods."""
    router = Router()
    home = text("of a", 64)
    router.stored(A, home)
    got = Counter[str]()
    for i in range(30):
        now_s = START_S + 60.0 * i
        assert router.answered(home, now_s) == A
        choice = router.chooser.choose(router.pods, None, now_s + 30.0, why="no_body")
        router.chooser.sent(choice.ranked[0], None, choice, now_s + 30.0)
        got[choice.ranked[0]] += 1
    assert got == {B: 10, C: 10, D: 10}


def test_one_new_prefix_in_a_burst_stays_together_and_splits_when_queueing_costs_more() -> None:
    """Nothing is stored yet. 100 blocks to compute again weigh as much as a queue of some requests, not of many."""
    router = Router()
    prefix = text("document", 500)
    got = [router.route(prefix + text(f"question {i}", 2), START_S + i * 0.001) for i in range(150)]
    first = got[0]
    together = next(i for i, pod in enumerate(got) if pod != first)
    assert 2 < together < 100
    assert len(set(got)) > 1  # the prefix has been copied
    short = Router()
    prefix = text("short document", 50)
    got = [short.route(prefix + text(f"question {i}", 2), START_S + i * 0.001) for i in range(150)]
    assert next(i for i, pod in enumerate(got) if pod != got[0]) < together  # cheaper to copy: earlier
    assert len(set(got)) == len(short.pods)


def test_a_hot_prefix_goes_on_to_the_next_best_pod() -> None:
    """Who already has a part of it gets the copy."""
    router = Router()
    prefix = text("hot", 200)
    router.stored(B, prefix)
    router.stored(D, prefix[: len(prefix) // 2])
    got = [router.route(prefix + text(f"question {i}", 2), START_S) for i in range(40)]
    assert got[0] == B
    assert next(pod for pod in got if pod != B) == D


def test_after_the_split_the_copy_counts_at_once() -> None:
    """Only one request computes the prefix at the second pod: the ones after it find it there."""
    router = Router([A, B])
    prefix = text("hot", 100)
    router.stored(A, prefix)
    while router.route(prefix + text("q", 1), START_S) == A:
        pass
    assert router.choose(prefix).held_tokens[B] >= 100 * BLOCK_SIZE
    assert router.chooser.ledger.queued_tokens(B) >= 100 * BLOCK_SIZE


def test_a_short_prompt_that_all_share_draws_nobody_to_one_pod() -> None:
    """The one that computed the system prompt first holds a bit more of every prompt, but gets no more work."""
    router = Router()
    system = text("system", 8)
    router.stored(A, system)
    got = Counter(router.answered(system + text(f"user {i}", 100), START_S + 2.0 * i) for i in range(100))
    assert set(got) == {A, B, C, D}
    assert max(got.values()) <= 1.5 * 100 / len(router.pods)


def test_a_pod_that_is_behind_with_its_report_does_not_draw_the_burst() -> None:
    """Views are stale: nobody reports anything for seconds, and the last reports say that all are idle."""
    router = Router()
    for pod in router.pods:
        router.reported(pod, 0, START_S)
    got = Counter(router.route(text(f"prompt {i}", 40), START_S + 0.1 * i) for i in range(80))
    assert set(got.values()) == {20}
    router.reported(A, 0, START_S + 8.5)  # all of a's were answered
    router.reported(B, 20, START_S + 8.5)
    after = [router.route(text(f"later {i}", 40), START_S + 8.6) for i in range(10)]
    assert after == [A] * 10


def test_a_late_report_takes_nothing_away_that_it_cannot_have_seen() -> None:
    router = Router([A, B])
    router.reported(A, 0, START_S)
    router.reported(B, 1, START_S)
    sent_s = START_S + 0.5
    assert router.route(text("one", 400), sent_s) == A
    router.reported(A, 0, sent_s + REPORT_S)  # looked at before the request came there
    assert router.chooser.in_flight.count(A, sent_s + REPORT_S) == 1
    assert router.chooser.ledger.queued_tokens(A) > 0
    assert router.route(text("two", 400), sent_s + REPORT_S) == B


def test_two_routers_that_tell_each_other_agree() -> None:
    index = MemoryIndex()
    one, two = Router(index=index), Router(index=index)
    prefix = text("document", 300)
    one.stored(C, prefix[: len(prefix) // 4])
    got = Counter[str]()
    for i in range(60):
        now_s = START_S + 0.001 * i
        sender, other = (one, two) if i % 2 else (two, one)
        keys = prefix + text(f"question {i}", 2) if i % 3 else text(f"prompt {i}", 80)
        sent, found = sender.send(prompt(keys), now_s=now_s)
        for route in sender.chooser.route(sent, found):
            other.chooser.routed(route.pod, route.keys, route.tokens, now_s)
        got[sent.pod] += 1
        for pod in one.pods:
            assert one.chooser.in_flight.count(pod, now_s) == two.chooser.in_flight.count(pod, now_s)
            assert one.chooser.ledger.queued_tokens(pod) == two.chooser.ledger.queued_tokens(pod)
    probe = one.found(prompt(prefix + text("last", 10)))
    assert one.chooser.expected(one.pods, probe, START_S + 1) == two.chooser.expected(two.pods, probe, START_S + 1)
    assert len(got) == len(one.pods)


def test_what_another_router_sent_is_found_by_the_next_with_that_prefix() -> None:
    """Only the blocks that the pod did not hold are told; they go on where the index ends."""
    index = MemoryIndex()
    one, two = Router([A, B], index), Router([A, B], index)
    prefix = text("document", 300)
    one.stored(B, prefix[: len(prefix) // 2])
    sent, found = one.send(prompt(prefix))
    assert sent.pod == B
    (route,) = one.chooser.route(sent, found)
    assert route.keys == prefix[len(prefix) // 2 :]
    two.chooser.routed(route.pod, route.keys, route.tokens, START_S)
    assert two.choose(prefix).held_tokens[B] == 300 * BLOCK_SIZE
    assert two.choose(prefix).ranked[0] == B
