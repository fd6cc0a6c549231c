"""Who gets the request, and why."""

import pytest

from serve_app.scoring import Strategy, score
from serve_app.selection import LoadLedger, Outcome, Policy, Selector
from serve_app.types import CPU, GPU, PodId, PodLoad, PodMatch, Tier

A, B, C = (PodId(name) for name in "abc")


def test_the_highest_score_comes_first_and_the_rest_in_order() -> None:
    choice = Selector().choose([A, B, C], {A: 9}, {A: 64, B: 32, C: 0})
    assert choice.ranked == [A, B, C]
    assert choice.outcome is Outcome.HIT


def test_equal_scores_go_to_the_least_loaded() -> None:
    assert Selector().choose([A, B, C], {A: 2, B: 1, C: 3}, {A: 64, B: 64, C: 64}).ranked == [B, A, C]


def test_no_match_goes_to_the_least_loaded() -> None:
    choice = Selector().choose([A, B, C], {A: 2, B: 1, C: 0}, {A: 0, B: 0, C: 0})
    assert choice.ranked[0] == C
    assert choice.outcome is Outcome.MISS


def test_missing_knowledge_goes_to_the_least_loaded_under_its_reason() -> None:
    choice = Selector().choose([A, B], {A: 1}, None, "no_index")
    assert choice.ranked[0] == B
    assert (choice.outcome, choice.reason) == (Outcome.FALLBACK, "no_index")


@pytest.mark.parametrize("scores", [None, {}, {A: 5, B: 5, C: 5}])
def test_ties_take_turns(scores: dict[PodId, float] | None) -> None:
    selector = Selector()
    firsts = [selector.choose([A, B, C], {}, scores).ranked[0] for _ in range(6)]
    assert sorted(firsts) == [A, A, B, B, C, C]


def test_baselines() -> None:
    round_robin = Selector(Policy.ROUND_ROBIN)
    firsts = [round_robin.choose([A, B], {A: 9}, {A: 64, B: 0}).ranked[0] for _ in range(4)]
    assert firsts in ([A, B, A, B], [B, A, B, A])
    assert Selector(Policy.LEAST_LOADED).choose([A, B], {A: 9}, {A: 64, B: 0}).ranked == [B, A]


def test_no_pods() -> None:
    assert Selector().choose([], {}, {}).ranked == []


def test_ledger_counts_what_was_sent_on_top_of_what_was_reported() -> None:
    ledger = LoadLedger()
    ledger.sent(A, 10.0)
    ledger.sent(A, 10.1)
    assert ledger.in_flight(A, None, 10.2) == 2
    assert ledger.in_flight(B, PodLoad(3, 10.0), 10.2) == 3
    assert ledger.in_flight(A, PodLoad(1, 10.2), 10.2) == 2  # the report can have seen the first, not the second
    assert ledger.in_flight(A, PodLoad(2, 10.3), 10.3) == 2
    assert ledger.in_flight(A, PodLoad(0, 11.0), 11.0) == 0


def test_ledger_forgets_what_nobody_reports() -> None:
    ledger = LoadLedger()
    ledger.sent(A, 10.0)
    assert ledger.in_flight(A, None, 10.0 + LoadLedger.FORGET_S + 0.1) == 0
    ledger.sent(B, 10.0)
    ledger.keep_only([A])
    assert ledger.in_flight(B, None, 10.0) == 0


def test_strategies() -> None:
    """The example of the module's docstring."""
    match = PodMatch({GPU: 48, CPU: 16}, hit_blocks=5)
    assert score(match, 100, Strategy.LONGEST_PREFIX) == pytest.approx(60.8)
    assert score(match, 100, Strategy.HIGHEST_BLOCK_HIT) == 5
    assert score(match, 100, Strategy.COVERAGE) == 0.64
    assert score(PodMatch({Tier("tape"): 10}), 100) == 5
    assert score(PodMatch(), 0, Strategy.COVERAGE) == 0
