"""What uneven load costs: nothing for chance, much for a pod that has a share too many."""

from collections import Counter

import pytest

from serve_app.routing.imbalance import FEW, imbalance
from tests.unit.routing.fleet import START_S, A, B, C, D, Router, text


def test_the_worked_examples() -> None:
    """Those of the module's docstring."""
    assert imbalance({A: 130, B: 100, C: 90, D: 80}) == pytest.approx({A: 0.05, B: 0, C: 0, D: 0})
    assert imbalance({A: 200, B: 100, C: 90, D: 10}) == pytest.approx({A: 1.4, B: 0.65, C: 0.65, D: 0})


def test_no_pods_one_pod_and_an_idle_fleet() -> None:
    assert imbalance({}) == {}
    assert imbalance({A: 70}) == {A: 0}
    assert imbalance({A: 0, B: 0}) == {A: 0, B: 0}


@pytest.mark.parametrize("times", [1, 10])
def test_it_is_the_share_that_counts(times: int) -> None:
    full = {A: int(4 * FEW) * times, B: int(FEW) * times, C: int(FEW) * times}
    assert imbalance(full) == pytest.approx(imbalance({pod: count // times for pod, count in full.items()}))


def test_a_few_requests_are_no_imbalance_however_they_lie() -> None:
    assert set(imbalance({A: int(FEW) // 4, B: 0, C: 0}).values()) == {0}


def test_a_hit_is_kept_until_its_pod_has_far_more_than_its_share() -> None:
    """The pod that holds the prompt has the least, as many as the others, and ever more of the requests."""
    keys = text("x", 100)
    chosen = []
    for at_a in (20, 100, 130, 160, 200, 300):
        router = Router()
        router.stored(A, keys)
        for pod in router.pods:
            router.reported(pod, at_a if pod == A else 100, START_S)
        chosen.append(router.choose(keys).ranked[0] == A)
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[:3] == [True] * 3
    assert not chosen[-1]


def test_a_prefix_that_everybody_wants_spreads_over_a_fleet_of_any_size() -> None:
    """One hot system prompt, requests that stay for long: nobody gets twice its share of them."""
    for others in (0, 200):
        router = Router()
        keys = text("system", 60)
        router.stored(A, keys)
        for pod in router.pods:
            router.reported(pod, others, START_S)
        got = Counter(router.route(keys + text(f"question {i}", 2), START_S + i * 0.001) for i in range(1000))
        in_flight = [got[pod] + others for pod in router.pods]
        assert max(in_flight) < 1.6 * sum(in_flight) / len(in_flight)
