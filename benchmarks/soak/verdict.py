"""Samples of a long run -> does anything grow?

In: series of (seconds since the start, value). Out: for each claim what was seen, and whether it holds. Nothing here
knows of processes or Redis, so that it can be tested by hand-made numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

Series = Sequence[tuple[float, float]]

RSS_SLOPE_MAX: Final = 1.0  # MB in ten minutes
TEN_MINUTES_S: Final = 600.0
WARM_UP_S: Final = 1200.0  # until what has a cap is full: a publisher's names of blocks that are gone take 15 minutes
# Whose memory this project answers for. vLLM's engines and what stands in for them here are measured and shown.
OURS: Final = frozenset({"publisher", "kvcache publish", "mirror", "valkey"})
_RSS_CLAIM: Final = f"RSS of every publisher, mirror and Valkey grows by less than {RSS_SLOPE_MAX:g} MB in 10 minutes"
JUDGED_MIN_S: Final = 600.0  # a slope over less is noise
_FIFTH: Final = 5


@dataclass
class ProcessSamples:
    """One process, a value each second or so."""

    kind: str
    rss_mb: list[tuple[float, float]] = field(default_factory=list)
    fds: list[tuple[float, float]] = field(default_factory=list)


def slope(series: Series) -> float:
    """Least squares, in units a second; 0 for less than two moments."""
    if len({at for at, _ in series}) < 2:
        return 0.0
    times, values = zip(*series, strict=True)
    return statistics.linear_regression(times, values).slope


def after(series: Series, start_s: float) -> Series:
    return [sample for sample in series if sample[0] >= start_s]


def growth(series: Series) -> float:
    """Median of the last fifth less the median of the first: what comes and goes in between does not count."""
    if not series:
        return 0.0
    size = max(1, len(series) // _FIFTH)
    values = [value for _, value in series]
    return statistics.median(values[-size:]) - statistics.median(values[:size])


def judged(processes: Mapping[str, ProcessSamples], warm_up_s: float) -> dict[str, dict[str, Any]]:
    """What each process' memory and file descriptors did after the warm-up."""
    report = {}
    for name, samples in processes.items():
        rss, fds = after(samples.rss_mb, warm_up_s), after(samples.fds, warm_up_s)
        if not rss:
            continue
        report[name] = {
            "kind": samples.kind,
            "rss_mb_first": round(rss[0][1], 1),
            "rss_mb_last": round(rss[-1][1], 1),
            "rss_mb_max": round(max(value for _, value in samples.rss_mb), 1),
            "rss_mb_per_10_min": round(slope(rss) * TEN_MINUTES_S, 3),
            "fds_last": int(fds[-1][1]),
            "fds_growth": growth(fds),
        }
    return report


def verdict(
    *,
    processes: Mapping[str, Mapping[str, Any]],
    judged_s: float,
    died: Sequence[str],
    redis: Mapping[str, float],
    truth: Mapping[str, int],
) -> dict[str, bool | None]:
    """Claim -> whether it holds; None: not judged, because the run was too short for it.

    Args:
        processes: of `judged`.
        judged_s: length of the run after its warm-up.
        died: processes that ended before they were told to.
        redis: `used_mb_max`, `limit_mb`, `evicted_keys`, `log_max`, `log_limit`.
        truth: `compared` and `wrong` answers of the mirror, beside what the engines hold.
    """
    long_enough = judged_s >= JUDGED_MIN_S
    slopes = all(one["rss_mb_per_10_min"] < RSS_SLOPE_MAX for one in processes.values() if one["kind"] in OURS)
    fds = all(one["fds_growth"] <= 0 for one in processes.values())
    return {
        _RSS_CLAIM: slopes if long_enough else None,
        "file descriptors of every process are flat": fds if long_enough else None,
        "Redis is bounded": redis["used_mb_max"] < redis["limit_mb"]
        and not redis["evicted_keys"]
        and redis["log_max"] <= redis["log_limit"],
        "the mirror says what the engines hold, 100%": truth["compared"] > 0 and not truth["wrong"],
        "no process has ended": not died,
    }
