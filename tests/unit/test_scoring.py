"""A match as one number."""

import pytest

from serve_app.scoring import Strategy, score, score_all
from serve_app.types import CPU, GPU, EncodedKeys, Found, PodId, PodMatch, Tier

A, B = PodId("a"), PodId("b")
MATCH = PodMatch({GPU: 48, CPU: 16}, hit_blocks=5)


def test_strategies() -> None:
    """The example of the module's docstring."""
    assert score(MATCH, 100, Strategy.LONGEST_PREFIX) == pytest.approx(60.8)
    assert score(MATCH, 100, Strategy.HIGHEST_BLOCK_HIT) == 5
    assert score(MATCH, 100, Strategy.COVERAGE) == 0.64


def test_a_tier_that_nobody_has_weighed_counts_half() -> None:
    assert score(PodMatch({Tier("tape"): 10}), 100) == 5
    assert score(MATCH, 100, tier_weights={GPU: 0.0, CPU: 2.0}) == 32


@pytest.mark.parametrize("strategy", Strategy)
def test_nothing_held_and_nothing_asked(strategy: Strategy) -> None:
    assert score(PodMatch(), 100, strategy) == 0
    assert score(PodMatch(), 0, strategy) == 0


def test_prompts_are_summed() -> None:
    prompts = [EncodedKeys(b"", 100, 100), EncodedKeys(b"", 200, 200)]
    found = Found(prompts, [{A: MATCH, B: PodMatch()}, {A: PodMatch({GPU: 32}, hit_blocks=2)}], 16)
    assert score_all(found, Strategy.LONGEST_PREFIX) == pytest.approx({A: 92.8, B: 0})
    assert score_all(found, Strategy.HIGHEST_BLOCK_HIT) == {A: 7, B: 0}
    assert score_all(found, Strategy.COVERAGE) == pytest.approx({A: 0.64 + 0.16, B: 0})


def test_only_block_hits_look_beyond_the_first_gap() -> None:
    assert [strategy for strategy in Strategy if strategy.counts_hits] == [Strategy.HIGHEST_BLOCK_HIT]
