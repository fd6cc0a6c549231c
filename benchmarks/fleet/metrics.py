"""Numbers of a run: for each step of the ladder, and for the run without its warm-up.

In: a `Run`. Out: plain dicts, ready for JSON. Times in seconds, shares between 0 and 1.

- hit rate: cached prompt tokens / prompt tokens, as the engines saw it when they first scheduled a request;
- output tokens/s: from a step's first arrival to the end of its last answer, as llm-d counts;
- goodput: requests per second of the same span whose time to first token is within the objective;
- share per replica: requests, and work (step time that load causes: prefill and context, without the fixed part of a
  step, which is spent whoever is there), relative to a fair share, so 1.0 is fair;
- windows: the same for work in windows of 10 s, over those in which the fleet did a tenth of its possible work or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.fleet.replica import Replica
from benchmarks.fleet.requests import Record
from benchmarks.fleet.simulate import Run
from benchmarks.fleet.workloads import Stage

UNFAIR = 1.15  # times the fair share of work
_BUSY_WINDOW = 0.1  # of the window's length, mean over replicas


def summarise(run: Run, stages: Sequence[Stage], ttft_slo_s: float) -> dict[str, Any]:
    """Everything about one run."""
    by_stage: list[list[Record]] = [[] for _ in stages]
    for record in run.records:
        by_stage[record.request.stage].append(record)
    measured = [record for record in run.records if not stages[record.request.stage].warm_up]
    return {
        "stages": [
            {"rate_per_s": stage.rate_per_s, "warm_up": stage.warm_up, **_of(records, len(run.replicas), ttft_slo_s)}
            for stage, records in zip(stages, by_stage, strict=True)
            if records
        ],
        "overall": {**_of(measured, len(run.replicas), ttft_slo_s), **_balance(run, stages)},
    }


def _of(records: Sequence[Record], replicas: int, ttft_slo_s: float) -> dict[str, Any]:
    ttft_s = np.array([record.ttft_s for record in records])
    latency_s = np.array([record.finished_s - record.request.arrival_s for record in records])
    prompt_tokens = sum(record.request.prompt_tokens for record in records)
    output_tokens = sum(record.request.output_tokens for record in records)
    span_s = max(record.finished_s for record in records) - min(record.request.arrival_s for record in records)
    p50, p90, p99 = (float(value) for value in np.percentile(ttft_s, [50, 90, 99]))
    in_time = int(np.count_nonzero(ttft_s <= ttft_slo_s))
    share = np.bincount([record.replica for record in records], minlength=replicas) * replicas / len(records)
    return {
        "requests": len(records),
        "span_s": span_s,
        "ttft_mean_s": float(ttft_s.mean()),
        "ttft_p50_s": p50,
        "ttft_p90_s": p90,
        "ttft_p99_s": p99,
        "latency_mean_s": float(latency_s.mean()),
        "output_tokens_per_s": output_tokens / span_s,
        "hit_rate": sum(record.cached_tokens for record in records) / prompt_tokens,
        "loaded_rate": sum(record.loaded_tokens for record in records) / prompt_tokens,
        "goodput_per_s": in_time / span_s,
        "in_time": in_time / len(records),
        "preemptions": sum(record.preemptions for record in records),
        "rejections": sum(record.rejections for record in records),
        "request_share": [float(value) for value in share],
        "max_request_share": float(share.max()),
    }


def _balance(run: Run, stages: Sequence[Stage]) -> dict[str, Any]:
    replicas = run.replicas
    start_s = min((r.request.arrival_s for r in run.records if not stages[r.request.stage].warm_up), default=0.0)
    work_s = _work(replicas)[int(start_s / Replica.WINDOW_S) :]
    total_s = work_s.sum(axis=0)
    busy = work_s[work_s.mean(axis=1) >= _BUSY_WINDOW * Replica.WINDOW_S]
    shares = busy / busy.mean(axis=1, keepdims=True)
    return {
        "work_share": [float(value) for value in total_s / max(total_s.mean(), 1e-9)],
        "ranked_work_share": sorted((float(value) for value in total_s / max(total_s.mean(), 1e-9)), reverse=True),
        "max_work_share": float(total_s.max() / max(total_s.mean(), 1e-9)),
        "busy_share": [replica.busy_s / run.end_s for replica in replicas],
        "window_max_work_share": float(shares.max()) if len(shares) else 0.0,
        "unfair_windows": float((shares.max(axis=1) > UNFAIR).mean()) if len(shares) else 0.0,
        "longest_unfair_s": _longest(shares > UNFAIR) * Replica.WINDOW_S if len(shares) else 0.0,
        "peak_waiting": max(replica.peak_waiting for replica in replicas),
        "prefill_tokens": sum(replica.prefill_tokens for replica in replicas),
        "steps": sum(replica.steps for replica in replicas),
    }


def _work(replicas: Sequence[Replica]) -> npt.NDArray[np.float64]:
    """[windows, replicas], seconds."""
    windows = max(len(replica.work_s) for replica in replicas)
    return np.array([replica.work_s + [0.0] * (windows - len(replica.work_s)) for replica in replicas]).T


def _longest(unfair: npt.NDArray[np.bool_]) -> int:
    """The longest run of windows in which one and the same replica is above its share."""
    longest = 0
    for of_replica in unfair.T:
        run = 0
        for over in of_replica:
            run = run + 1 if over else 0
            longest = max(longest, run)
    return longest


def mean_of_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summaries of one policy with several seeds -> one, number by number; lists are averaged place by place."""
    first = runs[0]
    return {
        "stages": [
            _mean([run["stages"][i] for run in runs if i < len(run["stages"])]) for i in range(len(first["stages"]))
        ],
        "overall": _mean([run["overall"] for run in runs]),
    }


def _mean(values: Sequence[Any]) -> Any:
    match values[0]:
        case dict():
            return {key: _mean([value[key] for value in values]) for key in values[0]}
        case list():
            return [_mean(items) for items in zip(*values, strict=True)]
        case bool() | str():
            return values[0]
    return float(np.mean(values))
