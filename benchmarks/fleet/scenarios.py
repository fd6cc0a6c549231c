"""The workloads by name, each with the fleet it is meant for.

llm-d's two are its published precise-prefix-cache runs, as issue 5 gives them: "73%" and "37%" is the share of the
fleet's KV memory that all prompts together need. SGLang's is bench_serving's generated shared prefix with its default
lengths. The others are ours, and sized so that the prompts do not fit into one replica but do into the fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.fleet.agents import AgentSessions
from benchmarks.fleet.engine import ReplicaConfig
from benchmarks.fleet.ladders import no_reuse, shared_prefix, with_rates, zipf
from benchmarks.fleet.mooncake import MooncakeTrace
from benchmarks.fleet.sessions import AGENTS, CHAT, Conversations
from benchmarks.fleet.traces import CONVERSATION_FILE, SYNTHETIC_FILE, TraceSource, read_sessions
from benchmarks.fleet.workloads import Scenario, Stage, Workload


def ladder(warm_up: tuple[float, float] | None, steps: Mapping[float, float]) -> list[Stage]:
    """(rate, seconds) to warm up with, and rate -> seconds."""
    first = [Stage(*warm_up, warm_up=True)] if warm_up else []
    return [*first, *(Stage(rate, seconds) for rate, seconds in steps.items())]


LLMD_73 = ladder(
    (15, 50),
    {
        **{3: 20, 10: 20, 15: 20, 20: 38, 22: 34, 25: 30, 30: 25, 35: 21},
        **{40: 38, 43: 36, 46: 33, 49: 30, 52: 29, 55: 27, 57: 26, 60: 25},
    },
)
LLMD_37 = ladder((9, 30), {3: 210, 4: 180, 5: 120, 6: 120, 8: 90, 10: 70, 12: 60, 15: 50, 20: 50})
SGLANG = ladder((20, 52), {20: 52, 40: 26, 80: 26, 120: 26})
ZIPF = ladder((30, 30), {30: 60, 60: 60, 90: 60})
NO_REUSE = ladder((20, 15), {20: 60, 35: 60, 45: 60})

CHAT_RATES = ladder((3, 60), {2: 90, 4: 90, 6: 90})
AGENT_RATES = ladder((1, 60), {1: 90, 2: 90, 3: 90})
AGENT_USERS = 48  # sessions at a time
TRACE_REPLICA = ReplicaConfig(kv_tokens=461_376, block_size_tokens=64)  # block size as in llm-d's guide


def _one_rate(rates: Sequence[float] | None, usual: float) -> float:
    if rates and len(rates) > 1:
        raise ValueError("a trace is replayed at one rate; give one")
    return rates[0] if rates else usual


def _agent_sessions(seed: int, rates: Sequence[float] | None, traces: TraceSource) -> Workload:
    """The rate is the number of sessions at a time."""
    return AgentSessions(read_sessions(traces), seed, round(_one_rate(rates, AGENT_USERS)))


def _mooncake(file: str, usual_speedup: float) -> Callable[[int, Sequence[float] | None, TraceSource], Workload]:
    """The rate is a speed-up. The seed changes only what routers do at random."""
    return lambda _seed, rates, traces: MooncakeTrace(
        traces.folder / file, _one_rate(rates, usual_speedup), traces.part, TRACE_REPLICA.block_size_tokens
    )


SCENARIOS: Sequence[Scenario] = (
    Scenario(
        "llmd-73",
        "llm-d, 150 groups x 5 prompts, 6000 + 1200 -> 1000 tokens, 8 replicas, Poisson",
        8,
        ReplicaConfig(kv_tokens=307_328),
        with_rates(lambda seed, stages: shared_prefix(seed, stages, 150, 5, 6_000, 1_200, 1_000), LLMD_73),
    ),
    Scenario(
        "llmd-37",
        "llm-d, 83 groups x 3 prompts, 8000 + 1000 -> 1000 tokens, 4 replicas, constant rates",
        4,
        ReplicaConfig(kv_tokens=461_376),
        with_rates(
            lambda seed, stages: shared_prefix(seed, stages, 83, 3, 8_000, 1_000, 1_000, poisson=False), LLMD_37
        ),
    ),
    Scenario(
        "sglang-gsp",
        "SGLang generated shared prefix, 64 groups x 16 prompts, 2048 + 128 -> 256 tokens, 4 replicas",
        4,
        ReplicaConfig(kv_tokens=80_000),
        with_rates(lambda seed, stages: shared_prefix(seed, stages, 64, 16, 2_048, 128, 256), SGLANG),
    ),
    Scenario(
        "zipf",
        "200 system prompts of 6000 tokens, Zipf 1.1, ~400 new tokens -> ~250, 8 replicas",
        8,
        ReplicaConfig(kv_tokens=307_328),
        with_rates(lambda seed, stages: zipf(seed, stages, 200, 1.1, 6_000, 400, 250), ZIPF),
    ),
    Scenario(
        "no-reuse",
        "new prompts of ~2000 tokens -> ~250, 8 replicas",
        8,
        ReplicaConfig(kv_tokens=307_328),
        with_rates(lambda seed, stages: no_reuse(seed, stages, 2_000, 250), NO_REUSE),
    ),
    Scenario(
        "chat",
        "conversations of ~8 turns and 16 s between them, 20 system prompts of 1024 tokens, 8 replicas",
        8,
        ReplicaConfig(kv_tokens=307_328),
        with_rates(lambda seed, stages: Conversations(seed, stages, CHAT), CHAT_RATES),
    ),
    Scenario(
        "agents",
        "tool loops of ~15 steps and 1.7 s between them, 12 system prompts of 8192 tokens, 8 replicas",
        8,
        ReplicaConfig(kv_tokens=307_328),
        with_rates(lambda seed, stages: Conversations(seed, stages, AGENTS), AGENT_RATES),
    ),
    Scenario(
        "agents-claude-code",
        "48 coding-agent sessions at a time from a public trace, closed loop, 8 replicas",
        8,
        TRACE_REPLICA,
        _agent_sessions,
    ),
    Scenario(
        "mooncake-conversation",
        "Mooncake's conversation trace, four times as fast, 8 replicas",
        8,
        TRACE_REPLICA,
        _mooncake(CONVERSATION_FILE, 4.0),
    ),
    Scenario(
        "mooncake-synthetic",
        "Mooncake's synthetic trace, twice as fast, 8 replicas",
        8,
        TRACE_REPLICA,
        _mooncake(SYNTHETIC_FILE, 2.0),
    ),
)


def scenario(name: str) -> Scenario:
    for candidate in SCENARIOS:
        if candidate.name == name:
            return candidate
    raise KeyError(f"no workload {name!r}; there are {', '.join(s.name for s in SCENARIOS)}")
