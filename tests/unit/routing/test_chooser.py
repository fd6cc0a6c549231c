"""Who gets the request, and what the decision says of it."""

from collections import Counter

import pytest

from serve_app.routing.choice import Outcome, Policy
from serve_app.routing.costs import CostWeights
from serve_app.scoring import Strategy
from serve_app.types import CPU, Found
from tests.unit.routing.fleet import BLOCK_SIZE, START_S, A, B, C, D, Router, prompt, served, text


def test_the_longest_prefix_wins_on_an_idle_fleet_and_the_rest_follow() -> None:
    router = Router([A, B, C])
    keys = text("x", 100)
    router.stored(B, keys)
    router.stored(C, keys[: len(keys) // 2])
    choice = router.choose(keys)
    assert choice.ranked == [B, C, A]
    assert (choice.outcome, choice.reason) == (Outcome.HIT, "prefix")
    assert choice.held_tokens == {A: 0, B: 1600, C: 800}
    assert choice.costs[A].compute_s > choice.costs[C].compute_s > choice.costs[B].compute_s


def test_a_busy_holder_loses_to_an_idle_pod() -> None:
    router = Router([A, B])
    keys = text("x", 100)
    router.stored(A, keys)
    router.reported(A, 50, START_S)
    choice = router.choose(keys)
    assert choice.ranked == [B, A]
    assert (choice.outcome, choice.reason) == (Outcome.MISS, "balance")


def test_a_cold_prompt_is_a_miss() -> None:
    choice = Router().choose(text("x", 10))
    assert (choice.outcome, choice.reason) == (Outcome.MISS, "no_prefix")


def test_a_slower_tier_is_better_than_nothing_and_worse_than_the_gpu() -> None:
    router = Router([A, B, C])
    keys = text("x", 100)
    router.stored(B, keys, CPU)
    router.stored(C, keys)
    assert router.choose(keys).ranked == [C, B, A]
    dear = Router([A, B], weights=CostWeights(tier_load={CPU: 5.0}))
    dear.stored(B, keys, CPU)
    assert dear.choose(keys).ranked == [A, B]  # an operator may say that loading costs more than computing


def test_a_request_that_reads_no_cache_finds_nothing_in_one() -> None:
    router = Router([A, B])
    keys = text("x", 100)
    router.stored(A, keys)
    router.reported(A, 3, START_S)
    choice = router.chooser.choose(router.pods, router.found(prompt(keys)).without_matches(), START_S)
    assert choice.ranked == [B, A]
    assert choice.outcome is Outcome.MISS


def test_full_pods_come_last_in_their_order() -> None:
    router = Router()
    keys = text("x", 100)
    router.stored(A, keys)
    router.stored(B, keys[: len(keys) // 2])
    choice = router.choose(keys)
    assert choice.ranked[:2] == [A, B]
    last = choice.with_last({A, B})
    assert last.ranked[2:] == [A, B]
    assert last.ranked[:2] == choice.ranked[2:]
    assert (last.costs, last.held_tokens) == (choice.costs, choice.held_tokens)
    assert choice.with_last(set(choice.ranked)).ranked == choice.ranked
    assert choice.with_last(()) is choice


def test_a_request_that_a_full_pod_did_not_get_counts_where_it_went() -> None:
    router = Router([A, B])
    keys = text("x", 100)
    router.stored(A, keys)
    found = router.found(prompt(keys))
    choice = router.chooser.choose(router.pods, found, START_S).with_last({A})
    router.chooser.sent(choice.ranked[0], found, choice, START_S)
    assert router.chooser.in_flight.count(A, START_S) == 0
    assert router.chooser.in_flight.count(B, START_S) == 1
    assert router.chooser.ledger.queued_tokens(B) == found.prompt_tokens


def test_a_pod_that_is_drained_is_not_chosen_and_leaves_nothing_behind() -> None:
    router = Router([A, B])
    keys = text("x", 100)
    router.stored(A, keys)
    for _ in range(5):
        assert router.route(keys + text("y", 50)) == A
    router.chooser.served(A, [served(1000, 9.0)] * 64)
    router.reported(A, 5, START_S, 700)
    router.pods = [B]  # the index has it still: its blocks are not what makes it a candidate
    router.chooser.keep_only([B])
    assert router.choose(keys).ranked == [B]
    chooser = router.chooser
    assert chooser.in_flight.count(A, START_S) == 0
    assert A not in chooser.in_flight.reports([A], START_S)
    assert chooser.ledger.queued_tokens(A) == 0
    assert chooser.ledger.speculative_blocks(keys, {A: 0}, START_S) == {}
    assert chooser.rates.s_per_token(A) == chooser.rates.s_per_token(C)
    assert not chooser._with_room
    assert chooser.turnover.shares([A, B], START_S)[A] == chooser.turnover.shares([A, B], START_S)[B]


def test_a_pod_that_comes_under_a_removed_ones_place_inherits_nothing() -> None:
    router = Router([A, B])
    keys = text("x", 100)
    router.route(keys)
    router.chooser.keep_only([])
    router.pods = [C, D]
    assert router.choose(keys).held_tokens == {C: 0, D: 0}
    assert router.choose(keys).outcome is Outcome.MISS


def test_a_new_pod_gets_work_at_once() -> None:
    router = Router([A, B])
    for i in range(20):
        router.route(text(f"prompt {i}", 50))
    router.pods.append(C)
    assert [router.route(text(f"later {i}", 50)) for i in range(8)] == [C] * 8


@pytest.mark.parametrize(
    ("unused", "at_b"),
    [
        (0, 2),  # both are full: as much here as there
        (
            300,
            3,
        ),  # B lost its blocks: what is new pushes nothing out there; a queue of two prompts is worth the eviction
        (45, 2),  # there is room for one, and what is under way counts
    ],
)
def test_new_prompts_go_where_there_is_room(unused: int, at_b: int) -> None:
    router = Router([A, B])
    for pod, of_pod in ((A, 0), (B, unused)):
        router.route(text(f"before {pod}", 4000), START_S)  # alike: their caches have been turned over
        router.stored(pod, text(f"before {A}", 4000) + text(f"before {B}", 4000))
        router.reported(pod, 0, START_S + 1, of_pod)
    got = Counter(router.route(text(f"document {i}", 45), START_S + 2) for i in range(4))
    assert got[B] == at_b


def test_what_another_pod_holds_is_no_better_off_where_there_is_room() -> None:
    router = Router([A, B])
    keys = text("x", 45)
    router.stored(A, keys)
    router.reported(B, 0, START_S, 300)
    assert router.choose(keys).ranked == [A, B]


def test_prompts_of_a_request_are_summed() -> None:
    router = Router([A, B, C])
    one, two, three = text("one", 40), text("two", 40), text("three", 40)
    router.stored(A, one)
    router.stored(B, two)
    router.stored(B, three)
    found = router.found(prompt(one), prompt(two), prompt(three))
    choice = router.chooser.choose(router.pods, found, START_S)
    assert choice.ranked == [B, A, C]
    assert choice.held_tokens == {A: 640, B: 1280, C: 0}
    sent = router.chooser.sent(B, found, choice, START_S)
    assert router.chooser.ledger.queued_tokens(B) == found.prompt_tokens - 1280
    assert router.chooser.in_flight.count(B, START_S) == 1
    after = router.chooser.choose(router.pods, found, START_S)
    assert after.costs[B].queue_s == pytest.approx((found.prompt_tokens - 1280) / 15_000)  # once, not per prompt
    assert after.costs[B].decode_s == pytest.approx(8 / 15_000)
    assert [(route.keys, route.tokens) for route in router.chooser.route(sent, found)] == [
        (one, 645),
        (b"", 5),
        (b"", 5),
    ]
    router.chooser.withdraw(sent)
    assert router.chooser.ledger.queued_tokens(B) == 0
    assert router.chooser.in_flight.count(B, START_S) == 0


def test_of_an_incomplete_prompt_the_known_part_decides() -> None:
    router = Router([A, B])
    known = text("known", 60)
    router.stored(B, known)
    late = prompt(known, rest_tokens=3000, complete=False)
    choice = router.chooser.choose(router.pods, router.found(late), START_S, why="tokens_late")
    assert choice.ranked == [B, A]
    assert (choice.outcome, choice.reason) == (Outcome.HIT, "tokens_late")
    nothing = router.found(prompt(b"", rest_tokens=3000, complete=False))
    choice = router.chooser.choose(router.pods, nothing, START_S, why="tokens_late")
    assert (choice.outcome, choice.reason) == (Outcome.MISS, "tokens_late")
    first = choice.ranked[0]
    router.chooser.sent(first, nothing, choice, START_S)
    assert router.chooser.ledger.queued_tokens(first) == 3000
    assert router.chooser.choose(router.pods, nothing, START_S).ranked[0] != first


def test_of_an_incomplete_prompt_the_rest_is_queued_though_the_known_part_is_held() -> None:
    router = Router([A, B])
    system = text("system", 60)
    for pod in router.pods:
        router.stored(pod, system)
    got = Counter[str]()
    for i in range(4):
        late = prompt(system, rest_tokens=30_000, complete=False)
        sent, _ = router.send(late, now_s=START_S + i)  # each after the ledger was compared with the index
        got[sent.pod] += 1
    assert got == {A: 2, B: 2}
    assert router.chooser.ledger.queued_tokens(A) == 60_000
    router.reported(A, 0, START_S + 10)
    assert router.chooser.ledger.queued_tokens(A) == 0


def test_a_pod_that_is_not_heard_any_more_is_not_full_for_ever() -> None:
    router = Router([A, B])
    router.reported(A, 60, START_S, 700)
    assert router.chooser.in_flight.count(A, START_S + 1) == 60
    assert router.chooser.in_flight.count(A, START_S + 6) == 0
    router.stored(B, text("x", 40))
    assert router.choose(text("y", 45), START_S + 1).costs[B].displace_s > 0.07  # A would have room
    assert router.choose(text("y", 45), START_S + 6).costs[B].displace_s < 0.05


def test_without_knowledge_the_load_decides_and_the_reason_is_told() -> None:
    router = Router([A, B, C])
    for pod, in_flight in ((A, 3), (B, 1), (C, 2)):
        router.reported(pod, in_flight, START_S)
    choice = router.chooser.choose(router.pods, None, START_S, why="no_index")
    assert choice.ranked == [B, C, A]
    assert (choice.outcome, choice.reason, dict(choice.costs)) == (Outcome.FALLBACK, "no_index", {})
    sent = router.chooser.sent(B, None, choice, START_S)
    assert sent.entries == ()
    assert router.chooser.in_flight.count(B, START_S) == 2


def test_without_knowledge_a_session_stays() -> None:
    router = Router()
    firsts = {router.chooser.choose(router.pods, None, START_S, why="x", session="s").ranked[0] for _ in range(20)}
    assert len(firsts) == 1


@pytest.mark.parametrize("policy", Policy)
def test_no_pods(policy: Policy) -> None:
    router = Router([], policy=policy)
    assert router.choose(text("x", 3)).ranked == []
    assert router.chooser.choose([], None, START_S, session="s").ranked == []


@pytest.mark.parametrize("policy", [Policy.LEAST_LOADED, Policy.SESSION, Policy.ROUND_ROBIN, Policy.KV_AWARE])
def test_ties_take_turns(policy: Policy) -> None:
    """Without a session, a prompt that is known, or a load, no pod is better than another."""
    router = Router([A, B, C], policy=policy)
    got: Counter[str] = Counter()
    for i in range(12):
        choice = router.chooser.choose(router.pods, None, START_S + 60.0 * i)
        router.chooser.sent(choice.ranked[0], None, choice, START_S + 60.0 * i)
        got[choice.ranked[0]] += 1
    assert got == {A: 4, B: 4, C: 4}


def test_round_robin_asks_for_nothing() -> None:
    router = Router([A, B], policy=Policy.ROUND_ROBIN)
    router.stored(A, text("x", 9))
    router.reported(B, 99, START_S)
    got = [router.route(text("x", 9)) for _ in range(6)]
    assert got in ([A, B] * 3, [B, A] * 3)
    choice = router.choose(text("x", 9))
    assert (choice.outcome, choice.reason) == (Outcome.BASELINE, "round_robin")


def test_least_loaded_looks_at_the_load_only() -> None:
    router = Router([A, B], policy=Policy.LEAST_LOADED)
    router.stored(A, text("x", 9))
    router.reported(A, 2, START_S)
    assert [router.route(text("x", 9)) for _ in range(2)] == [B, B]
    assert router.choose(text("x", 9)).outcome is Outcome.BASELINE


@pytest.mark.parametrize("strategy", [Strategy.LONGEST_PREFIX, Strategy.HIGHEST_BLOCK_HIT, Strategy.COVERAGE])
def test_strategies_of_scores(strategy: Strategy) -> None:
    """The highest score, whatever the load; equal scores by load."""
    router = Router([A, B, C], strategy=strategy)
    keys = text("x", 10)
    router.stored(A, keys)
    router.stored(B, keys[: len(keys) // 2])
    router.stored(C, keys[: len(keys) // 2])
    router.reported(A, 50, START_S)
    router.reported(B, 2, START_S)
    found = Found(
        [prompt(keys)],
        [router.index.match(keys, router.pods, count_hits=strategy.counts_hits)],
        BLOCK_SIZE,
    )
    choice = router.chooser.choose(router.pods, found, START_S)
    assert choice.ranked == [A, C, B]
    assert (choice.outcome, dict(choice.costs)) == (Outcome.HIT, {})
    sent = router.chooser.sent(A, found, choice, START_S)
    assert router.chooser.route(sent, found) == []  # it rests on no costs: nothing of it is in a ledger
    assert router.chooser.in_flight.count(A, START_S) == 51
    router.chooser.withdraw(sent)
    cold = router.choose(text("cold", 10))
    assert cold.ranked == [C, B, A]
    assert cold.outcome is Outcome.MISS
