"""The event loop, the workloads and the numbers: time, delays, determinism, and what llm-d's ladder is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fleet.engine import ReplicaConfig
from benchmarks.fleet.ladders import Ladder, shared_prefix
from benchmarks.fleet.metrics import mean_of_seeds, summarise
from benchmarks.fleet.mooncake import MooncakeTrace
from benchmarks.fleet.policies import FleetInfo, Policy
from benchmarks.fleet.registry import POLICIES
from benchmarks.fleet.requests import FleetView, LoadReport, Record, Request
from benchmarks.fleet.scenarios import SCENARIOS, scenario
from benchmarks.fleet.sessions import Conversations, Talk
from benchmarks.fleet.simulate import Simulation, SimulationConfig, simulate
from benchmarks.fleet.traces import TraceSource
from benchmarks.fleet.workloads import Builder, Keys, Stage
from serve_app.types import GPU, BlockKeys, Tier

TALK = Talk(3, 1.0, 320, 100, 60, 40, 4, 0.5, 0.05)
STAGES = [Stage(5, 10, warm_up=True), Stage(10, 20), Stage(20, 10)]
CONFIG = SimulationConfig(replicas=3, replica=ReplicaConfig(kv_tokens=16 * 600))


def ladder(seed: int = 1) -> Ladder:
    made = shared_prefix(seed, STAGES, 7, 4, 320, 100, 40)
    assert isinstance(made, Ladder)
    return made


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_every_request(policy: str) -> None:
    for workload in (ladder(), Conversations(1, STAGES, TALK)):
        run = simulate(workload, policy, CONFIG)
        assert len(run.records) >= 450
        for record in run.records:
            request = record.request
            assert request.arrival_s <= record.routed_s < record.first_token_s <= record.finished_s <= run.end_s
            assert 0 <= record.replica < 3
        decoded = sum(replica.decode_tokens for replica in run.replicas)
        preempted = sum(replica.preemptions for replica in run.replicas)  # its prompt's end gives a token once more
        assert 0 <= sum(record.request.output_tokens - 1 for record in run.records) - decoded <= preempted


def test_same_seed_same_run_and_other_seed_another() -> None:
    def times(seed: int) -> list[float]:
        run = simulate(ladder(seed), "least_loaded", SimulationConfig(3, CONFIG.replica, seed=seed))
        return [record.finished_s for record in run.records]

    assert times(1) == times(1)
    assert times(1) != times(2)


def test_every_policy_gets_the_same_requests() -> None:
    """Also in conversations, whose requests depend on when the answers come."""

    def requests(policy: str) -> dict[int, list[tuple[int, int]]]:
        sessions: dict[int, list[tuple[int, int]]] = {}
        for record in simulate(Conversations(3, STAGES, TALK), policy, CONFIG).records:
            request = record.request
            sessions.setdefault(request.session, []).append((request.prompt_tokens, request.output_tokens))
        return sessions

    assert requests("round_robin") == requests("ours")


def test_a_turn_follows_the_answer() -> None:
    run = simulate(Conversations(1, STAGES, TALK), "least_loaded", CONFIG)
    last: dict[int, Record] = {}
    for record in run.records:
        before = last.get(record.request.session)
        if before is not None:
            assert record.request.arrival_s >= before.finished_s + TALK.min_think_s
            known = (*before.request.prompt_keys, *before.request.answer_keys)
            assert tuple(record.request.prompt_keys[: len(known)]) == known
        last[record.request.session] = record


def test_a_draining_step_begins_after_the_last_answer_of_the_one_before() -> None:
    run = simulate(ladder(), "round_robin", CONFIG)
    for stage in (1, 2):
        ended = max(r.finished_s for r in run.records if r.request.stage == stage - 1)
        assert min(r.request.arrival_s for r in run.records if r.request.stage == stage) > ended


class Watcher(Policy):
    """Notes when it hears what."""

    wants_events = True

    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self.now_s = 0.0
        self.heard: list[tuple[str, float]] = []

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        assert now_s >= self.now_s
        assert all(at_s <= now_s + 1e-9 for _, at_s in self.heard)
        self.now_s = now_s
        self.outbox.append(request.id)
        return self.rng.choice(view.candidates())

    def on_stored(self, replica: int, keys: BlockKeys, now_s: float, tier: Tier = GPU) -> None:
        assert keys
        assert len(keys) % 8 == 0
        self.heard.append(("stored", now_s))

    def on_load_report(self, replica: int, report: LoadReport, now_s: float) -> None:
        assert report.in_flight >= 0
        assert now_s >= report.taken_at_s
        self.heard.append(("report", now_s))

    def on_peer(self, router: int, message: Any, now_s: float) -> None:
        self.heard.append(("peer", now_s))


def test_nothing_is_heard_before_its_time() -> None:
    config = SimulationConfig(3, CONFIG.replica, routers=2, event_delay_s=0.5, report_interval_s=0.2)
    simulation = Simulation(ladder(), Watcher, config)
    run = simulation.run()
    for router in simulation.routers:
        assert isinstance(router.policy, Watcher)
        assert {"stored", "report", "peer"} <= {what for what, _ in router.policy.heard}
    assert {record.router for record in run.records} == {0, 1}


def test_exact_view_counts_what_is_in_flight() -> None:
    seen: list[tuple[float, int, list[int]]] = []

    class Reader(Policy):
        def route(self, request: Request, now_s: float, view: FleetView) -> int:
            chosen = self.rng.choice(view.candidates())
            seen.append((now_s, chosen, list(view.in_flight)))
            return chosen

    run = simulate(ladder(), Reader, SimulationConfig(3, CONFIG.replica, report_interval_s=0))
    for now_s, _, in_flight in seen[::20]:
        for replica in range(3):
            true = sum(r.replica == replica and r.routed_s < now_s < r.finished_s for r in run.records)
            assert in_flight[replica] == true


def test_a_full_queue_sends_requests_elsewhere_and_back_later() -> None:
    config = SimulationConfig(2, ReplicaConfig(kv_tokens=16 * 200, max_num_seqs=2, max_waiting=1))
    run = simulate(ladder(), "round_robin", config)
    assert sum(record.rejections for record in run.records) > 0
    assert all(record.finished_s > 0 for record in run.records)
    assert max(record.routed_s - record.request.arrival_s for record in run.records) > 0.05


def test_better_information_gives_more_hits() -> None:
    hits = {}
    for policy in ("round_robin", "ours", "oracle"):
        run = simulate(ladder(), policy, SimulationConfig(replicas=3, replica=ReplicaConfig(kv_tokens=16 * 160)))
        hits[policy] = summarise(run, STAGES, 2.0)["overall"]["hit_rate"]
    assert hits["round_robin"] < hits["ours"] <= hits["oracle"]


def test_summary_by_hand() -> None:
    class Two:
        stages: Sequence[Stage] = (Stage(1, 2),)
        min_think_s = float("inf")

        def initial(self) -> Iterator[Request]:
            builder = Builder(Keys())
            yield builder.request(0.0, (), 1_600, 11, 0)
            yield builder.request(10.0, (), 1_600, 11, 0)

        def after(self, record: Record) -> Iterable[Request]:
            return ()

    run = simulate(Two(), "round_robin", SimulationConfig(replicas=2))
    summary = summarise(run, Two.stages, 0.5)
    whole = summary["overall"]
    ttft_s = 0.011 + 1_600 * 4e-8 + 1_600 / 15_926
    assert whole["ttft_p50_s"] == pytest.approx(ttft_s)
    assert whole["output_tokens_per_s"] == pytest.approx(22 / run.end_s)
    assert whole["request_share"] == [1.0, 1.0]
    assert whole["goodput_per_s"] == pytest.approx(2 / run.end_s)
    assert mean_of_seeds([summary, summary])["overall"]["ttft_p90_s"] == pytest.approx(whole["ttft_p90_s"])


def test_llmd_ladder_is_the_published_one() -> None:
    chosen = scenario("llmd-73")
    workload = chosen.make(1, None, TraceSource())
    assert [stage.rate_per_s for stage in workload.stages] == [
        *(15, 3, 10, 15, 20, 22, 25, 30, 35),
        *(40, 43, 46, 49, 52, 55, 57, 60),
    ]
    warm_up = list(workload.initial())
    assert len(warm_up) == 750
    assert len({request.prompt_keys for request in warm_up}) == 750, "every prompt once"
    assert len({request.prompt_keys[374] for request in warm_up}) == 150
    assert {(r.prompt_tokens, r.output_tokens) for r in warm_up} == {(7_200, 1_000)}
    working_set = 150 * 6_000 + 750 * 1_200
    assert working_set / (chosen.replicas * chosen.replica.kv_tokens) == pytest.approx(0.73, abs=0.01)
    other = scenario("llmd-37")
    assert (83 * 8_000 + 249 * 1_000) / (other.replicas * other.replica.kv_tokens) == pytest.approx(0.37, abs=0.13)


def test_workload_names_are_distinct_and_unknown_ones_are_told() -> None:
    assert len({s.name for s in SCENARIOS}) == len(SCENARIOS)
    with pytest.raises(KeyError, match="llmd-73"):
        scenario("nothing")


def test_mooncake_trace(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1_200, "output_length": 20, "hash_ids": [0, 1, 2]},
        {"timestamp": 3_000, "input_length": 1_600, "output_length": 5, "hash_ids": [0, 1, 3, 4]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = MooncakeTrace(path, speedup=2.0).initial()
    assert (first.arrival_s, second.arrival_s) == (0.0, 1.5)
    assert (len(first.prompt_keys), len(second.prompt_keys)) == (75, 100)
    assert first.prompt_keys[:64] == second.prompt_keys[:64]
    assert first.prompt_keys[64] != second.prompt_keys[64]
    run = simulate(MooncakeTrace(path), "least_loaded", SimulationConfig(replicas=1))
    assert [record.cached_tokens for record in run.records] == [0, 1_024]
