"""The cost of a request at one pod."""

import pytest

from serve_app.routing.choice import Cost
from serve_app.routing.costs import CostWeights, cost, tokens_to_compute
from serve_app.types import CPU, GPU, PodMatch, Tier, Trust

MATCH = PodMatch({GPU: 600, CPU: 200})


def test_the_worked_example() -> None:
    """The one of the module's docstring."""
    compute = tokens_to_compute(1000, MATCH, 0)
    assert compute == 200
    terms = cost(compute, MATCH, 500, 3, 0.02, 1e-4, 1.0, 0, CostWeights())
    assert terms == pytest.approx(Cost(0.020, 0.0016, 0.050, 0.0024, 0.032768, 0.020))
    assert terms.ttft_s == pytest.approx(0.0740)
    assert terms.total_s == pytest.approx(0.126768)


def test_what_will_be_there_need_not_be_computed() -> None:
    assert tokens_to_compute(1000, MATCH, 960) == 40
    assert tokens_to_compute(1000, MATCH, 320) == 200  # it holds more already


def test_a_token_is_always_computed() -> None:
    assert tokens_to_compute(640, PodMatch({GPU: 640}), 640) == 1
    assert tokens_to_compute(0, PodMatch(), 0) == 1


def test_what_is_not_trusted_counts_less() -> None:
    assert tokens_to_compute(1000, PodMatch({GPU: 800}, trust=Trust.DEGRADED), 0) == 280


def test_new_blocks_cost_less_where_little_was_computed_and_more_where_they_push_others_out() -> None:
    rested, worn, full = (
        cost(1000, PodMatch(), 0, 0, 0.0, 1e-4, turnover, evicted, CostWeights())
        for turnover, evicted in ((0.25, 0), (1.0, 0), (1.0, 1000))
    )
    assert rested.displace_s == pytest.approx(worn.displace_s / 4)
    assert full.displace_s == pytest.approx(worn.displace_s * 2)
    assert rested.ttft_s == worn.ttft_s == full.ttft_s


def test_weights() -> None:
    weights = CostWeights(
        {CPU: 0.5}, unknown_tier_load=1.0, in_flight_tokens=10.0, imbalance_tokens=100.0, displace=0.0
    )
    terms = cost(200, PodMatch({CPU: 100, Tier("tape"): 100}), 0, 2, 0.5, 1e-3, 1.0, 0, weights)
    assert terms == pytest.approx(Cost(0.2, 0.15, 0.0, 0.02, 0.05, 0.0))
