"""Which pod's cache was turned over most lately."""

import pytest

from serve_app.routing.turnover import HALF_LIFE_S, Turnover
from serve_app.types import PodId

A, B, C = (PodId(name) for name in "abc")


def test_shares_are_of_the_highest() -> None:
    turnover = Turnover()
    assert turnover.shares([A, B]) == {A: 1.0, B: 1.0}
    turnover.add(A, 800, 100.0)
    turnover.add(B, 200, 100.0)
    assert turnover.shares([A, B, C]) == {A: 1.0, B: 0.25, C: 0.0}
    assert turnover.shares([B, C]) == {B: 1.0, C: 0.0}


@pytest.mark.parametrize("started_s", [0.0, 1e6])
def test_what_was_long_ago_counts_less(started_s: float) -> None:
    turnover = Turnover()
    turnover.add(A, 400, started_s)
    turnover.add(B, 400, started_s + HALF_LIFE_S)
    assert turnover.shares([A, B]) == pytest.approx({A: 0.5, B: 1.0})
    turnover.add(B, 400, started_s + 1000 * HALF_LIFE_S)
    assert turnover.shares([A, B])[A] < 1e-9
    turnover.keep_only([A])
    assert turnover.shares([A, B])[B] == 0.0
