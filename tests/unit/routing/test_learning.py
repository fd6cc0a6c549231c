"""A pod's time of prefill: learned from many figures, not from one."""

from collections import Counter

import pytest

from serve_app.routing.learning import MIN_TOKENS, PRIOR_S_PER_TOKEN, PrefillRates
from tests.unit.routing.fleet import START_S, A, B, C, Router, served, text

US = 1e-6


def test_before_anything_was_served_all_are_equal() -> None:
    assert PrefillRates().s_per_token(A) == PRIOR_S_PER_TOKEN


def test_it_is_learned_from_the_tokens_that_were_computed() -> None:
    rates = PrefillRates()
    rates.observe(A, [served(4096, 0.31, cached=100_000)] * 32)
    assert rates.s_per_token(A) == pytest.approx(0.31 / 4096)


def test_an_outlier_changes_nothing() -> None:
    rates = PrefillRates()
    rates.observe(A, [served(1000, 0.1)] * 16)
    for figure in (served(1000, 60.0), served(1000, 1e-4)):
        rates.observe(A, [figure])
        assert rates.s_per_token(A) == pytest.approx(100 * US)


def test_short_prefills_and_wrong_figures_say_nothing() -> None:
    rates = PrefillRates()
    rates.observe(A, [served(MIN_TOKENS - 1, 9.0), served(1000, 0.0), served(0, 0.1, cached=5)])
    assert rates.s_per_token(A) == PRIOR_S_PER_TOKEN


def test_a_new_pod_takes_the_fleets_value_and_its_first_figure_does_not_set_it_apart() -> None:
    rates = PrefillRates()
    for pod in (A, B):
        rates.observe(pod, [served(1000, 0.2)] * 20)
    assert rates.s_per_token(C) == pytest.approx(200 * US)
    rates.observe(C, [served(1000, 30.0)])
    assert rates.s_per_token(C) == pytest.approx(200 * US)


def test_a_slow_first_request_does_not_set_a_pod_apart() -> None:
    """The first prefill compiles kernels. Whoever served it must not be avoided for ever."""
    rates = PrefillRates()
    rates.observe(A, [served(200, 3.0)])
    assert rates.s_per_token(B) == rates.s_per_token(A) == pytest.approx(0.015)
    rates.observe(B, [served(400, 0.8)])
    assert rates.s_per_token(A) == pytest.approx(rates.s_per_token(B)) == pytest.approx(0.002)


def test_a_pod_that_becomes_slow_is_known_as_slow_and_recovers() -> None:
    rates = PrefillRates()
    for pod in (A, B):
        rates.observe(pod, [served(1000, 0.1)] * 64)
    rates.observe(A, [served(1000, 0.4)] * 64)
    assert rates.s_per_token(A) > 3 * rates.s_per_token(B)
    rates.observe(A, [served(1000, 0.1)] * 64)
    assert rates.s_per_token(A) == pytest.approx(rates.s_per_token(B))


def test_a_slow_pod_gets_less_work() -> None:
    router = Router([A, B])
    router.chooser.served(A, [served(1000, 0.3)] * 64)
    router.chooser.served(B, [served(1000, 0.1)] * 64)
    got = Counter(router.route(text(f"prompt {i}", 60), START_S) for i in range(80))
    assert 2 * got[A] < got[B]
    assert got[A] > 5  # it is slow, not out of use


def test_a_pod_that_left_is_forgotten() -> None:
    rates = PrefillRates()
    rates.observe(A, [served(1000, 0.1)] * 64)
    rates.observe(B, [served(1000, 0.5)] * 64)
    rates.keep_only([A])
    assert rates.s_per_token(B) == rates.s_per_token(C)
