"""What a soak says of its samples."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.soak.verdict import ProcessSamples, after, growth, judged, slope, verdict

REDIS = {"used_mb_max": 100.0, "limit_mb": 256.0, "evicted_keys": 0, "log_max": 9, "log_limit": 10}
TRUTH = {"compared": 5, "wrong": 0}


def claims(
    mb_per_10_min: float = 0.0, judged_s: float = 3000.0, kind: str = "publisher", **changed: Any
) -> list[bool | None]:
    samples = ProcessSamples(kind)
    samples.rss_mb = [(float(at), 40 + at * mb_per_10_min / 600) for at in range(3600)]
    samples.fds = [(float(at), 12.0) for at in range(3600)]
    given: dict[str, Any] = {
        "processes": judged({"publisher-0": samples}, 600),
        "judged_s": judged_s,
        "died": [],
        "redis": REDIS,
        "truth": TRUTH,
    }
    return list(verdict(**given | changed).values())


def test_slope_is_that_of_least_squares() -> None:
    assert slope([(0, 1), (10, 3), (20, 5)]) == pytest.approx(0.2)
    assert slope([(0, 0), (1, 1), (2, 0)]) == pytest.approx(0)


@pytest.mark.parametrize("series", [[], [(1, 5)], [(1, 5), (1, 9)]])
def test_no_slope_without_two_moments(series: list[tuple[float, float]]) -> None:
    assert slope(series) == 0


def test_growth_leaves_out_what_comes_and_goes() -> None:
    flat = [(float(i), 9.0) for i in range(100)]
    assert growth([*flat[:50], (50.0, 300.0), *flat[51:]]) == 0
    assert growth([(at, value + (at > 70)) for at, value in flat]) == 1
    assert growth([]) == 0


def test_only_what_is_after_the_warm_up_is_judged() -> None:
    samples = ProcessSamples("mirror", [(0, 10), (600, 50), (1200, 51)], [(0, 3), (600, 9), (1200, 9)])
    assert after(samples.rss_mb, 600) == [(600, 50), (1200, 51)]
    report = judged({"m": samples, "never there": ProcessSamples("x")}, 600)
    assert report == {
        "m": {
            "kind": "mirror",
            "rss_mb_first": 50,
            "rss_mb_last": 51,
            "rss_mb_max": 51,
            "rss_mb_per_10_min": pytest.approx(1),
            "fds_last": 9,
            "fds_growth": 0,
        }
    }


def test_all_is_well() -> None:
    assert claims() == [True] * 5


def test_a_leak_a_short_run_and_an_early_end() -> None:
    assert claims(mb_per_10_min=1.1)[0] is False
    assert claims(mb_per_10_min=0.9)[0] is True
    assert claims(mb_per_10_min=99, kind="vLLM")[0] is True, "an engine's own memory is shown, not judged"
    assert claims(mb_per_10_min=9.9, judged_s=599)[:2] == [None, None]
    assert claims(died=["mirror"])[4] is False


def test_one_more_file_descriptor_is_a_leak() -> None:
    samples = ProcessSamples("mirror", [(0, 10)] * 2, [(0, 3), (1, 4)])
    assert claims(processes=judged({"m": samples}, 0))[1] is False


@pytest.mark.parametrize("seen", [{"used_mb_max": 256.0}, {"evicted_keys": 1}, {"log_max": 11}])
def test_redis_is_not_bounded(seen: dict[str, float]) -> None:
    assert claims(redis=REDIS | seen)[2] is False


@pytest.mark.parametrize("seen", [{"compared": 0}, {"wrong": 1}])
def test_truth_is_all_or_nothing(seen: dict[str, int]) -> None:
    assert claims(truth=TRUTH | seen)[3] is False
