"""Routing policies on a simulated fleet of GPU replicas: time to first token, tokens/s, hit rate, balance.

In: nothing but the package (and the trace files, for the workloads that replay them). Out:
benchmarks/results/fleet.json, plots beside it, a Markdown table on the terminal. Every policy gets the same
requests of the same seeds; numbers are means over the seeds. The simulator is in benchmarks/fleet/, its own checks
in tests/unit/test_fleet_*.py.

    benchmarks/bench_fleet.py --quick                                       # under a minute: is it better or worse
    benchmarks/bench_fleet.py --workload llmd-73 --policies ours,longest_prefix --rates 20,60
    benchmarks/bench_fleet.py --event-delay 0.1 --routers 4                 # stale views
    benchmarks/bench_fleet.py --workload sglang-gsp --merge                 # the file's other workloads stay
    benchmarks/bench_fleet.py --workload agents-claude-code --kv-tokens 307200 --part tuning
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from benchmarks.fleet.metrics import mean_of_seeds, summarise  # noqa: E402
from benchmarks.fleet.registry import POLICIES  # noqa: E402
from benchmarks.fleet.scenarios import SCENARIOS, scenario  # noqa: E402
from benchmarks.fleet.simulate import SimulationConfig, simulate  # noqa: E402
from benchmarks.fleet.traces import TRACES, Part, TraceSource  # noqa: E402

QUICK_WORKLOADS = "llmd-73,zipf,no-reuse"
QUICK_RATES = {"llmd-73": (20.0, 60.0), "zipf": (60.0,), "no-reuse": (35.0,)}
DEFAULT_POLICIES = ",".join(POLICIES)
console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Job:
    """One simulation; goes to another process."""

    workload: str
    policy: str
    seed: int
    rates: tuple[float, ...] | None
    config: SimulationConfig
    ttft_slo_s: float
    traces: TraceSource
    kv_tokens: int  # GPU memory of a replica for KV; 0: the workload's own
    cpu_tokens: int  # CPU tier of a replica; 0: none
    max_waiting: int  # 0: any number


def run_job(job: Job) -> dict[str, Any]:
    chosen = scenario(job.workload)
    workload = chosen.make(job.seed, job.rates, job.traces)
    replica = replace(
        chosen.replica,
        kv_tokens=job.kv_tokens or chosen.replica.kv_tokens,
        cpu_tokens=job.cpu_tokens,
        max_waiting=job.max_waiting or None,
    )
    config = replace(job.config, replicas=chosen.replicas, replica=replica, seed=job.seed)
    start_s = time.perf_counter()
    run = simulate(workload, job.policy, config)
    summary = summarise(run, workload.stages, job.ttft_slo_s)
    summary["real_s"] = time.perf_counter() - start_s
    return summary


def run_all(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    if processes <= 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_job, job): job for job in jobs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def table(workload: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: the whole ladder without warm-up, then its last step."""
    lines = [
        f"### {workload}",
        "",
        (
            "| policy | TTFT mean | p50 | p90 | p99 | output tokens/s | hit rate | in time | max work share "
            "| unfair for | at rate | TTFT p90 | output tokens/s | hit rate | goodput |"
        ),
        "|---|" + "---:|" * 14,
    ]
    for policy, summary in summaries.items():
        whole = summary["overall"]
        last = max((s for s in summary["stages"] if not s["warm_up"]), key=lambda step: step["rate_per_s"])
        lines.append(
            f"| {policy} | {whole['ttft_mean_s']:.3f} s | {whole['ttft_p50_s']:.3f} s | {whole['ttft_p90_s']:.3f} s "
            f"| {whole['ttft_p99_s']:.3f} s | {whole['output_tokens_per_s']:,.0f} | {whole['hit_rate']:.4f} "
            f"| {whole['in_time']:.1%} | {whole['max_work_share']:.2f} | {whole['longest_unfair_s']:.0f} s "
            f"| {last['rate_per_s']:g}/s | {last['ttft_p90_s']:.3f} s | {last['output_tokens_per_s']:,.0f} "
            f"| {last['hit_rate']:.4f} | {last['goodput_per_s']:.2f}/s |"
        )
    return "\n".join(lines)


def scalars(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Without the lists: what is kept of each single seed."""
    return {name: value for name, value in numbers.items() if not isinstance(value, list)}


def names(text: str, known: Sequence[str], what: str) -> list[str]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(f"no {what} {name!r}; there are {', '.join(known)}")
    return chosen


def positive_rates(text: str) -> tuple[float, ...] | None:
    """Comma separated -> numbers; None if there are none."""
    rates = []
    for each in filter(None, (part.strip() for part in text.split(","))):
        try:
            rate = float(each)
        except ValueError:
            raise typer.BadParameter(f"{each!r} is no number", param_hint="--rates") from None
        if not 0 < rate < math.inf:
            raise typer.BadParameter(f"a rate must be above 0, and {each} is not", param_hint="--rates")
        rates.append(rate)
    return tuple(rates) or None


def check(workload: str, rates: tuple[float, ...] | None, traces: TraceSource) -> None:
    """Make it once, so that what is wrong with it is told before anything runs."""
    try:
        scenario(workload).make(1, rates, traces)
    except ValueError as error:
        raise typer.BadParameter(f"workload {workload}: {error}") from None


def kept_workloads(path: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The workloads that a file has already; what is merged with them must have been run alike."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    other = {name for name, value in parameters.items() if before["parameters"].get(name, value) != value}
    if other:
        raise typer.BadParameter(f"{path} was made with another {', '.join(sorted(other))}: not merged")
    return dict(before["workloads"])


@app.command()
def main(
    workload: Annotated[str, typer.Option(help="names, comma separated, or `all`")] = "all",
    policies: Annotated[str, typer.Option(help="names, comma separated")] = DEFAULT_POLICIES,
    seeds: Annotated[int, typer.Option(help="runs of each, with other requests", min=1)] = 3,
    rates: Annotated[str, typer.Option(help="steps of the ladder to run besides the warm-up; default: all")] = "",
    event_delay: Annotated[float, typer.Option(help="s until a router sees a cache event", min=0)] = 0.01,
    report_interval: Annotated[float, typer.Option(help="s between load reports; 0: loads are exact", min=0)] = 0.1,
    routers: Annotated[int, typer.Option(help="routers, each with its own view", min=1)] = 1,
    ttft_slo: Annotated[float, typer.Option(help="s, for goodput")] = 2.0,
    cpu_tokens: Annotated[int, typer.Option(help="CPU tier of each replica, in tokens; 0: none", min=0)] = 0,
    max_waiting: Annotated[int, typer.Option(help="requests that may wait at a replica; 0: any number", min=0)] = 0,
    kv_tokens: Annotated[int, typer.Option(help="GPU memory of each replica for KV; 0: the workload's", min=0)] = 0,
    traces: Annotated[Path, typer.Option(help="folder of the trace files")] = TRACES,
    part: Annotated[Part, typer.Option(help="which part of a trace to replay")] = Part.REPORTING,
    quick: Annotated[bool, typer.Option(help="one seed, few rates, three workloads")] = False,
    output: Annotated[Path, typer.Option(help="JSON; plots go to `plots` beside it")] = ROOT
    / "benchmarks/results/fleet.json",
    jobs: Annotated[int, typer.Option(help="processes")] = 2,
    plots: Annotated[bool, typer.Option(help="draw PNG files")] = True,
    merge: Annotated[bool, typer.Option(help="keep the other workloads that the output file has")] = False,
) -> None:
    """Run policies on workloads and compare them."""
    known = [s.name for s in SCENARIOS]
    if workload == "all":
        workload = QUICK_WORKLOADS if quick else ",".join(known)
    workloads = names(workload, known, "workload")
    chosen = names(policies, list(POLICIES), "policy")
    wanted = positive_rates(rates)
    source = TraceSource(traces, part)
    for name in workloads:
        check(name, wanted, source)
    base = SimulationConfig(routers=routers, event_delay_s=event_delay, report_interval_s=report_interval)
    parameters: dict[str, Any] = {
        "seeds": 1 if quick else seeds,
        "quick": quick,
        "event_delay_s": event_delay,
        "report_interval_s": report_interval,
        "routers": routers,
        "ttft_slo_s": ttft_slo,
        "kv_tokens": kv_tokens,
        "cpu_tokens": cpu_tokens,
        "max_waiting": max_waiting,
        "part": part.value,
        "python": platform.python_version(),
    }
    report = {"parameters": parameters, "workloads": kept_workloads(output, parameters) if merge else {}}
    todo = [
        Job(
            name,
            policy,
            seed,
            wanted or (QUICK_RATES.get(name) if quick else None),
            base,
            ttft_slo,
            source,
            kv_tokens,
            cpu_tokens,
            max_waiting,
        )
        for name in workloads
        for seed in range(1, (1 if quick else seeds) + 1)
        for policy in chosen
    ]
    results: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("simulating", total=len(todo))
        for job, summary in run_all(todo, jobs):
            results.setdefault((job.workload, job.policy), {})[job.seed] = summary
            done = f"{job.workload} {job.policy} seed {job.seed}"
            progress.update(task, advance=1, description=done)
            if not console.is_terminal:  # no bar there
                print(f"{done}: {summary['real_s']:.1f} s", file=sys.stderr, flush=True)
    for name in workloads:
        means = {
            policy: mean_of_seeds([results[name, policy][seed] for seed in sorted(results[name, policy])])
            for policy in chosen
        }
        report["workloads"][name] = {
            "what": scenario(name).what,
            "rates": wanted or (QUICK_RATES.get(name) if quick else None),
            "mean": means,
            "seeds": {
                policy: {seed: scalars(summary["overall"]) for seed, summary in sorted(results[name, policy].items())}
                for policy in chosen
            },
        }
        print(f"\n{table(name, means)}")
        if plots and find_spec("matplotlib"):
            from benchmarks.fleet.plots import plot_all

            plot_all(name, means, output.parent / "plots")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"\nwritten: {output}")


if __name__ == "__main__":
    app()
