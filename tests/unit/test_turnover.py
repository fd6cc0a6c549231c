"""Which pod's cache was turned over most lately."""

import pytest

from serve_app.routing.turnover import HALF_LIFE_S, PRIOR_TOKENS, Turnover
from serve_app.types import PodId

A, B, C = (PodId(name) for name in "abc")


def test_shares_are_of_the_highest() -> None:
    """The example of the module's docstring."""
    turnover = Turnover()
    assert turnover.shares([A, B], 100.0) == {A: 1.0, B: 1.0}
    turnover.add(A, 8192, 100.0)
    turnover.add(B, 2048, 100.0)
    assert turnover.shares([A, B, C], 100.0) == pytest.approx({A: 1.0, B: 0.4, C: 0.2})
    assert turnover.shares([B, C], 100.0) == pytest.approx({B: 1.0, C: 0.5})


@pytest.mark.parametrize("started_s", [0.0, 1e6])
def test_what_was_long_ago_counts_less(started_s: float) -> None:
    turnover = Turnover()
    turnover.add(A, PRIOR_TOKENS, started_s)
    assert turnover.shares([A, B], started_s + HALF_LIFE_S)[B] == pytest.approx(2 / 3)  # 1 of 1 + 1/2
    assert turnover.shares([A, B], started_s + 1000 * HALF_LIFE_S)[B] == pytest.approx(1.0)
    turnover.add(B, PRIOR_TOKENS, started_s + 1000 * HALF_LIFE_S)
    assert turnover.shares([A, B], started_s + 1000 * HALF_LIFE_S) == pytest.approx({A: 0.5, B: 1.0})
    turnover.keep_only([A])
    assert turnover.shares([A, B], started_s + 1000 * HALF_LIFE_S) == pytest.approx({A: 1.0, B: 1.0})
