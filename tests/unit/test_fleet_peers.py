"""The peers of 2026: each port against its original's own public test cases, named with the case, or by hand."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

import pytest

from benchmarks.fleet.policies import FleetInfo
from benchmarks.fleet.policies_aibrix import AIBrixPrefixCache, imbalanced, pick_matched
from benchmarks.fleet.policies_cache import PendingPrefill
from benchmarks.fleet.policies_dynamo import DynamoKvRouter
from benchmarks.fleet.policies_llmd import LLMDScorers, NoHitLru, active_scores, queue_scores
from benchmarks.fleet.policies_lmetric import LMetric, lmetric
from benchmarks.fleet.policies_preble import WINDOW_S, Preble, WindowedLoad
from benchmarks.fleet.policies_sglang import SGLangCacheAware, VllmRouter
from benchmarks.fleet.policies_sticky import StickySessions
from benchmarks.fleet.requests import FleetView, LoadReport, Request
from benchmarks.fleet.workloads import Builder, Keys
from serve_app.types import CPU, GPU, BlockKey, Tier

SIZE = 16


def fleet(replicas: int) -> FleetInfo:
    return FleetInfo(replicas, SIZE, 1_000, 8_192)


def view(*in_flight: int) -> FleetView:
    return FleetView(list(in_flight), [None] * len(in_flight))


def rng() -> random.Random:
    return random.Random(0)


def prompt(builder: Builder, blocks: int, session: int = 0, known: Iterable[BlockKey] = ()) -> Request:
    return builder.request(0.0, tuple(known), blocks * SIZE, 5, session)


def packed(request: Request, blocks: int) -> bytes:
    return b"".join(request.prompt_keys[:blocks])


# -- LMetric: lmetric_test.go of llm-d-router; (blocks held of 100 or 1,000, requests) of two endpoints ----------------


@pytest.mark.parametrize(
    ("total", "first", "second", "best"),
    [
        (100, (80, 1), (80, 8), 0),  # PrefersLowerDecodeBatchSizeForSamePrefixMiss
        (100, (90, 4), (40, 1), 0),  # BalancesPrefixMissAgainstDecodeBatchSize
        (100, (90, 20), (40, 0), 1),  # DecodeBatchSizeCanOutweighPrefixHit
        (100, (75, 1), (50, 2), 0),  # IsInvariantToCommonISLScale
        (1_000, (750, 1), (500, 2), 0),
    ],
)
def test_lmetric_as_in_llmds_cases(total: int, first: tuple[int, int], second: tuple[int, int], best: int) -> None:
    costs = [lmetric((total - held) * SIZE, 0, requests) for held, requests in (first, second)]
    assert costs.index(min(costs)) == best
    assert lmetric(320, 0, 3) == lmetric(320, 0, 3), "UsesDecodeBatchSizeNotInFlightTokens"


def test_lmetric_counts_what_is_queued_until_its_first_token() -> None:
    builder = Builder(Keys())
    policy, plain = LMetric(fleet(2), rng()), LMetric(fleet(2), rng(), queued=False)
    long, short = prompt(builder, 100), prompt(builder, 10)
    for each in (policy, plain):
        each.on_stored(0, packed(short, 8), 0.0)
        first = each.route(long, 0.0, view(0, 9))
        assert first == 0, "1600 x 1 against 1600 x 10"
    assert policy.route(short, 0.0, view(1, 1)) == 1, "(1600 + 32) x 2 against 160 x 2"
    assert plain.route(short, 0.0, view(1, 1)) == 0, "32 x 2 against 160 x 2"
    policy.on_first_token(0, long, 1.0)
    assert policy.route(prompt(builder, 10, known=short.prompt_keys), 1.0, view(1, 3)) == 0


def test_pending_prefill_comes_back_to_nothing() -> None:
    builder, pending = Builder(Keys()), PendingPrefill()
    one, other = prompt(builder, 4), prompt(builder, 8)
    pending.add(one, 64)
    pending.add(other, 100)
    pending.done(one)
    pending.done(one)
    assert pending.total == 100


# -- llm-d's scorers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "scores"),
    [((10, 5, 0), (0.0, 0.5, 1.0)), ((5, 5), (1.0, 1.0)), ((0, 0), (1.0, 1.0))],  # TestQueueScorer
)
def test_queue_scorer(waiting: tuple[int, ...], scores: tuple[float, ...]) -> None:
    assert tuple(queue_scores(dict(enumerate(waiting))).values()) == scores


@pytest.mark.parametrize(
    ("in_flight", "scores"),
    [
        ((0, 0, 0), (1.0, 1.0, 1.0)),  # "no load attribute set"
        ((3, 0, 6), (0.5, 1.0, 0.0)),  # "all endpoints have different request counts"
        ((4, 0, 1), (0.0, 1.0, 0.75)),  # "some endpoints have load data"
        ((3, 11), (1 - 3 / 11, 0.0)),  # DefaultParamsProduceContinuousScores
    ],
)
def test_active_request_scorer(in_flight: tuple[int, ...], scores: tuple[float, ...]) -> None:
    assert tuple(active_scores(dict(enumerate(in_flight))).values()) == pytest.approx(scores)


def test_no_hit_lru_scorer() -> None:
    """TestNoHitLRUScorer, then TestNoHitLRUPreferLeastRecentlyUsedAfterColdRequests step by step."""
    lru, three = NoHitLru(), [0, 1, 2]
    assert lru.scores(three, is_cold=True) == {0: 1.0, 1: 0.5, 2: 0.0}
    assert lru.scores(three, is_cold=False) == {0: 0.5, 1: 0.5, 2: 0.5}
    assert lru.scores([0], is_cold=True) == {0: 1.0}
    lru.sent(0)
    assert lru.scores(three, is_cold=True) == {1: 1.0, 2: 0.5, 0: 0.0}
    lru.sent(1)
    assert _best(lru.scores(three, is_cold=True)) == 2
    lru.sent(2)
    assert _best(lru.scores(three, is_cold=True)) == 0


def _best(scores: Mapping[int, float]) -> int:
    return max(scores, key=scores.__getitem__)


def test_llmd_weighs_prefix_against_load() -> None:
    """3 x 1 + 2 x 0.5 + 2 x 0 + 2 x 0.5 = 5 for the full one that has it; 0 + 2 x 1 + 2 x 1 + 1 = 5 for an idle one."""
    builder = Builder(Keys())
    request = prompt(builder, 10)
    for used, chosen in ((0.4, 0), (0.6, 1)):
        policy = LLMDScorers(fleet(2), rng())
        policy.on_stored(0, packed(request, 10), 0.0)
        loads = view(5, 0)
        loads.reports = [LoadReport(0.0, 5, 4, 0, used), LoadReport(0.0, 0, 0, 0, 0.0)]
        assert policy.route(request, 0.0, loads) == chosen


def test_llmd_takes_what_was_just_routed_as_held_for_some_seconds() -> None:
    builder, policy = Builder(Keys()), LLMDScorers(fleet(4), rng())
    request = prompt(builder, 10)
    home = policy.route(request, 0.0, view(0, 0, 0, 0))
    assert policy.expected_blocks(request, range(4), 1.9)[home] == 10
    assert policy.expected_blocks(request, range(4), 5.0)[home] == 0


# -- Dynamo: selector/default.rs ---------------------------------------------------------------------------------------


def _dynamo(decay: float = 0.0) -> DynamoKvRouter:
    return DynamoKvRouter(fleet(2), rng(), overlap_credit_decay=decay)


@pytest.mark.parametrize(("decay", "chosen"), [(0.0, 0), (1.0, 1)])
def test_dynamo_credit_decay(decay: float, chosen: int) -> None:
    """test_overlap_credit_decay_can_prefer_less_loaded_cold_worker: 64 tokens, all held, 48 queued there."""
    builder, policy = Builder(Keys()), _dynamo(decay)
    request, queued = prompt(builder, 4), prompt(builder, 3)
    policy.on_stored(0, packed(request, 4), 0.0)
    policy._active[0].prefill.add(queued, 48)
    assert policy.route(request, 0.0, view(1, 0)) == chosen


@pytest.mark.parametrize(("tier", "cost"), [(GPU, 6 + 10), (CPU, 10 - 0.75 * 4 + 10)])
def test_dynamo_credit_by_tier(tier: Tier, cost: float) -> None:
    builder, policy = Builder(Keys()), _dynamo()
    request = prompt(builder, 10)
    policy.on_stored(0, packed(request, 4), 0.0, tier)
    costs, uncached = policy._costs(request, [0, 1])
    assert costs == {0: cost, 1: 20}
    assert uncached == {0: 96, 1: 160}


def test_dynamo_holds_requests_while_all_are_over_the_threshold() -> None:
    builder, policy = Builder(Keys()), _dynamo()
    busy, first, second = (prompt(builder, 4) for _ in range(3))
    for active in policy._active:
        active.prefill.add(busy, 16 * 8_192 + 1)
    assert policy.route(first, 0.0, view(1, 1)) is None
    policy._active[1].prefill.done(busy)
    assert policy.route(second, 0.0, view(1, 0)) is None, "the first one's turn comes first"
    assert policy.route(first, 0.0, view(1, 0)) == 1
    assert policy.route(second, 0.0, view(1, 1)) is not None


# -- SGLang and vLLM's router: cache_aware.rs --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SGLangCacheAware, VllmRouter])
def test_cache_aware_with_balanced_load(kind: type[SGLangCacheAware]) -> None:
    """test_cache_aware_with_balanced_load: the same text, then its beginning."""
    builder, policy = Builder(Keys()), kind(fleet(2), rng())
    whole = prompt(builder, 11)
    home = policy.route(whole, 0.0, view(0, 0))
    loads = view(*(9 if replica == home else 0 for replica in range(2)))
    assert policy.route(whole, 0.0, loads) == home
    assert policy.route(prompt(builder, 5, known=whole.prompt_keys[:5]), 0.0, loads) == home


def test_cache_aware_with_imbalanced_load() -> None:
    """test_cache_aware_with_imbalanced_load: thresholds 5 and 2.0, loads 20 and 0."""
    builder = Builder(Keys())
    policy = SGLangCacheAware(fleet(2), rng(), 0.5, 5, 2.0)
    text = prompt(builder, 4)
    assert policy.route(text, 0.0, view(0, 0)) == 0
    assert [policy.route(text, 0.0, view(20, 0)) for _ in range(5)] == [1] * 5
    assert policy.route(text, 0.0, view(5, 0)) == 0, "the first tenant of the match keeps it"


def test_a_short_match_goes_to_the_least_loaded() -> None:
    builder, policy = Builder(Keys()), SGLangCacheAware(fleet(2), rng())
    first = prompt(builder, 10)
    assert policy.route(first, 0.0, view(0, 0)) == 0
    assert policy.route(prompt(builder, 10, known=first.prompt_keys[:3]), 0.0, view(1, 0)) == 1, "0.3 is not above 0.3"
    assert policy.route(prompt(builder, 10, known=first.prompt_keys[:4]), 0.0, view(1, 0)) == 0


def test_vllm_router_keeps_a_session_by_its_key() -> None:
    builder, policy = Builder(Keys()), VllmRouter(fleet(2), rng())
    assert policy.route(prompt(builder, 4, session=7), 0.0, view(0, 3)) == 0
    assert policy.route(prompt(builder, 4, session=7), 0.0, view(9, 3)) == 0, "other text, same session"
    assert policy.route(prompt(builder, 4, session=7), 0.0, view(90, 3)) == 1, "uneven load moves it"
    assert policy.route(prompt(builder, 4, session=7), 0.0, view(3, 9)) == 1


# -- AIBrix: prefix_cache_test.go --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "uneven"),
    [
        ([], False),
        ([0, 0, 0], False),
        ([10, 10, 10], False),
        ([0, 0, 5], False),
        ([0, 7], False),
        ([0, 8], True),
        ([5, 5, 5, 15], True),
        ([0, 0, 0, 15], True),
        ([0, 100], True),
        ([0, 0, 5, 20], True),
        ([100], False),
        ([0, 5, 50, 100], True),
        ([0, 0, 50, 100], True),
    ],
)
def test_aibrix_load_gate(loads: list[int], uneven: bool) -> None:
    """TestGetTargetPodListOnLoadImbalance."""
    assert imbalanced(loads) is uneven


def test_aibrix_takes_the_best_match_within_one_deviation() -> None:
    assert pick_matched({0: 1, 1: 2, 2: 3}, {0: 50, 1: 90}) == 1
    assert pick_matched({0: 1, 1: 2, 2: 9}, {0: 50, 2: 90}) == 0, "9 is above 4 + 3.6"
    assert pick_matched({0: 1, 1: 1, 2: 9}, {2: 90}) is None
    assert pick_matched({0: 3, 1: 2}, {0: 50, 1: 50}) == 1


def test_aibrix_falls_back_to_the_fewest_requests() -> None:
    builder, policy = Builder(Keys()), AIBrixPrefixCache(fleet(3), rng())
    request = prompt(builder, 10)
    assert policy.route(request, 0.0, view(2, 1, 3)) == 1
    policy.on_stored(2, packed(request, 5), 0.0)
    assert policy.route(request, 0.0, view(2, 1, 2)) == 2
    assert policy.route(request, 0.0, view(2, 1, 30)) == 1, "the gate is shut"


# -- Sticky sessions: sticky_least_loaded.rs, and the spill ------------------------------------------------------------


def test_sticky_sessions() -> None:
    """test_same_session_sticky and test_new_sessions_balance_across_replicas."""
    builder, policy = Builder(Keys()), StickySessions(fleet(3), rng())
    homes = [policy.route(prompt(builder, 4, session), 0.0, view(0, 0, 0)) for session in range(3)]
    assert sorted(homes) == [0, 1, 2]
    assert [policy.route(prompt(builder, 4, session), 0.0, view(5, 5, 5)) for session in range(3)] == homes


def test_a_sticky_session_spills_and_stays_there() -> None:
    builder, policy = Builder(Keys()), StickySessions(fleet(3), rng())
    home = policy.route(prompt(builder, 4, 1), 0.0, view(0, 0, 0))
    busy = view(*(20 if replica == home else replica for replica in range(3)))
    moved = policy.route(prompt(builder, 4, 1), 0.0, busy)
    assert moved == min({0, 1, 2} - {home})
    assert policy.route(prompt(builder, 4, 1), 0.0, view(0, 0, 0)) == moved


# -- Preble ------------------------------------------------------------------------------------------------------------


def test_preble_explores_the_least_load_and_exploits_a_long_match() -> None:
    builder, policy = Builder(Keys()), Preble(fleet(2), rng())
    first = prompt(builder, 100)
    assert policy.route(first, 0.0, view(0, 0)) == 0
    assert policy.route(prompt(builder, 100), 0.0, view(0, 0)) == 1
    longer = prompt(builder, 150, known=first.prompt_keys)
    assert policy.route(longer, 1.0, view(0, 0)) == 0, "two thirds are known there"
    assert policy.route(prompt(builder, 300, known=first.prompt_keys), 2.0, view(0, 0)) == 1, "a third is not enough"


def test_preble_moves_a_prefix_from_a_replica_that_carries_twice_as_much() -> None:
    builder, policy = Builder(Keys()), Preble(fleet(2), rng())
    hot = prompt(builder, 1_000)
    homes = [policy.route(hot, float(i), view(0, 0)) for i in range(40)]
    assert homes[:3] == [0, 0, 0]
    assert 1 in homes


def test_windowed_load_forgets() -> None:
    load = WindowedLoad()
    load.add(0.0, 2.0)
    load.add(100.0, 1.0)
    assert load.total_s(WINDOW_S) == 3.0
    assert load.total_s(WINDOW_S + 1.0) == 1.0
