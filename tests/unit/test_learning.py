"""Prefill rates of pods, from the requests that they have served."""

import pytest

from serve_app.routing.learning import PRIOR_S_PER_TOKEN, PrefillRates
from serve_app.types import PodId, Served

A, B, C = (PodId(name) for name in "abc")


def served(tokens: int, prefill_s: float, cached: int = 0) -> Served:
    return Served("x", tokens + cached, cached, 0.0, prefill_s)


def test_until_something_was_served_all_are_alike() -> None:
    rates = PrefillRates()
    rates.observe(A, [served(100, 9.0), served(127, 9.0, cached=5000), served(1000, 0.0)])  # say nothing
    assert rates.s_per_token(A) == rates.s_per_token(B) == PRIOR_S_PER_TOKEN


def test_a_slow_first_request_does_not_set_a_pod_apart() -> None:
    """The first prefill compiles kernels. Whoever served it must not be avoided for ever."""
    rates = PrefillRates()
    rates.observe(A, [served(200, 3.0)])
    assert rates.s_per_token(B) == rates.s_per_token(A) == pytest.approx(0.015)
    rates.observe(B, [served(400, 0.8)])
    assert rates.s_per_token(A) == pytest.approx(rates.s_per_token(B)) == pytest.approx(0.002)


def test_a_slow_pod_is_learned_and_an_outlier_is_not() -> None:
    rates = PrefillRates()
    for _ in range(40):
        rates.observe(A, [served(1000, 0.1)])
        rates.observe(B, [served(1000, 0.4)])
    assert rates.s_per_token(B) / rates.s_per_token(A) == pytest.approx(4)
    assert rates.s_per_token(C) == rates.s_per_token(A)
    rates.observe(A, [served(1000, 60.0)])
    assert rates.s_per_token(A) == pytest.approx(1e-4)
    rates.keep_only([A])
    assert rates.s_per_token(B) == rates.s_per_token(C)
