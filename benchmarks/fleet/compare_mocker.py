"""The simulator beside Dynamo's offline mocker: one trace with the same fixed step times, replayed by both.

In: the mocker (pip install --no-deps ai-dynamo-runtime). Out: a table of token hit rate and time to first token,
with round robin (which compares the engines alone) and with Dynamo's KV router (which compares our port of its cost,
too). The trace is a Mooncake file of shared prefixes that do not fit into one replica's cache, made from a seed.

    python -m benchmarks.fleet.compare_mocker [--seeds 3]      from the repository's root

With the mocker's timing model `fixed`, a step takes `PREFILL_S` if any prompt is computed in it, and `DECODE_S` more if
anybody decodes; so `Timing` has the same two terms. Neither router sees events late. What is left of a difference in
round robin's times is rounding: the trace's milliseconds fall on the grid of 10 ms steps, and a request that comes just
when a step begins is in it or not by the last bit of a sum.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fleet.engine import ReplicaConfig, Timing
from benchmarks.fleet.mooncake import TRACE_BLOCK_TOKENS, MooncakeTrace
from benchmarks.fleet.requests import BLOCK_SIZE_TOKENS
from benchmarks.fleet.simulate import SimulationConfig, simulate

PREFILL_S, DECODE_S = 0.06, 0.01
REPLICAS = 4
POLICIES = {"round_robin": "round_robin", "kv_router": "dynamo"}  # the mocker's name -> ours


class Case(NamedTuple):
    """A trace, and the caches that it meets."""

    name: str
    rate_per_s: float
    kv_blocks: int  # of a replica
    requests: int = 1_500


CASES = (
    Case("roomy, light", 8, 12_000),
    Case("tight, light", 8, 4_000),
    Case("tight, busy", 20, 4_000),
    Case("full", 20, 1_200, 800),
)


class Result(NamedTuple):
    hit_rate: float
    ttft_mean_s: float
    ttft_p90_s: float
    preemptions: float


def write_trace(path: Path, case: Case, seed: int) -> None:
    """60 groups of skewed popularity; a prompt is its group's 4 blocks of 512 tokens, and 1 or 2 of its own."""
    rng = random.Random(seed)
    at_s, own = 0.0, 10_000
    with path.open("w") as file:
        for _ in range(case.requests):
            at_s += rng.expovariate(case.rate_per_s)
            group = min(int(rng.paretovariate(0.7)), 60)
            blocks = rng.randint(1, 2)
            tokens = (4 + blocks) * TRACE_BLOCK_TOKENS - rng.randrange(TRACE_BLOCK_TOKENS)
            ids = [*range(group * 4, group * 4 + 4), *range(own, own + blocks)]
            own += blocks
            row = {
                "timestamp": round(at_s * 1e3),
                "input_length": tokens,
                "output_length": rng.randint(40, 200),
                "hash_ids": ids,
            }
            file.write(json.dumps(row) + "\n")


def mocker(path: Path, case: Case, mode: str) -> Result:
    os.environ.setdefault("DYN_LOG", "error")  # it logs every decision
    from dynamo._core import run_mocker_trace_replay

    engine = {
        "backend": "vllm",
        "num_gpu_blocks": case.kv_blocks,
        "block_size": BLOCK_SIZE_TOKENS,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8_192,
        "timing_model": {"type": "fixed", "prefill_ms": PREFILL_S * 1e3, "decode_ms": DECODE_S * 1e3},
    }
    replay: Any = run_mocker_trace_replay(
        [path],
        {"engine": engine},
        num_workers=REPLICAS,
        router_mode=mode,
        trace_block_size=TRACE_BLOCK_TOKENS,
        capture_per_request=True,
    )
    rows = replay.per_request
    return _result(
        [row["ttft_ms"] / 1e3 for row in rows],
        replay.summary["first_admission_prefix_cache_reused_ratio"],
        sum(row["readmission_count"] for row in rows),
    )


def ours(path: Path, case: Case, policy: str) -> Result:
    config = SimulationConfig(
        replicas=REPLICAS,
        replica=ReplicaConfig(
            kv_tokens=case.kv_blocks * BLOCK_SIZE_TOKENS,
            max_num_seqs=256,
            timing=Timing(0.0, DECODE_S, PREFILL_S, 0.0, float("inf")),
        ),
        event_delay_s=0.0,
        report_interval_s=0.0,
    )
    records = simulate(MooncakeTrace(path), policy, config).records
    cached = sum(record.cached_tokens for record in records) / sum(record.request.prompt_tokens for record in records)
    return _result([r.ttft_s for r in records], cached, sum(r.preemptions for r in records))


def _result(ttft_s: Sequence[float], hit_rate: float, preemptions: float) -> Result:
    return Result(hit_rate, statistics.fmean(ttft_s), statistics.quantiles(ttft_s, n=10)[-1], preemptions)


def compare(case: Case, seeds: Sequence[int], mode: str) -> tuple[Result, Result]:
    """Means over the seeds: the mocker's, ours."""
    both: list[tuple[Result, Result]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        for seed in seeds:
            write_trace(path, case, seed)
            both.append((mocker(path, case, mode), ours(path, case, POLICIES[mode])))
    theirs, mine = (Result(*map(statistics.fmean, zip(*runs, strict=True))) for runs in zip(*both, strict=True))
    return theirs, mine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(1, parser.parse_args().seeds + 1)
    print("| trace | router | | hit rate | TTFT mean | TTFT p90 | preemptions |\n|---|---|---|---:|---:|---:|---:|")
    for case in CASES:
        for mode in POLICIES:
            for who, result in zip(("mocker", "simulator"), compare(case, seeds, mode), strict=True):
                print(
                    f"| {case.name} | {mode} | {who} | {result.hit_rate:.4f} | {result.ttft_mean_s * 1e3:.1f} ms "
                    f"| {result.ttft_p90_s * 1e3:.1f} ms | {result.preemptions:.0f} |"
                )


if __name__ == "__main__":
    main()
