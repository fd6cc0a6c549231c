"""Public traces as workloads: what is read, what is refused and how, who gets which part, and the closed loop."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.bench_fleet import app
from benchmarks.fleet.agents import MAX_CONTEXT_TOKENS, MAX_THINK_S, AgentSessions
from benchmarks.fleet.engine import ReplicaConfig
from benchmarks.fleet.mooncake import MooncakeTrace
from benchmarks.fleet.requests import Record
from benchmarks.fleet.simulate import Run, SimulationConfig, simulate
from benchmarks.fleet.traces import (
    AGENTS_FILE,
    AgentSession,
    MooncakeLine,
    Part,
    TraceError,
    TraceSource,
    read_lines,
    read_sessions,
)
from scripts.download_traces import agent_session

BLOCK = 64
FLEET = SimulationConfig(replicas=2, replica=ReplicaConfig(kv_tokens=64 * 4_000, block_size_tokens=BLOCK))


def turn(blocks: int, think_s: float = 1.0, t: float = 0.0, first: int = 1, out: int = 20) -> dict[str, Any]:
    return {"t": t, "think_s": think_s, "in": blocks * BLOCK + 3, "out": out, "ids": [[first, blocks]]}


def session(name: str, *turns: dict[str, Any], system: int = 128, subagents: Sequence[Any] = ()) -> dict[str, Any]:
    return {
        "session": name,
        "block_tokens": BLOCK,
        "system_tokens": system,
        "tool_tokens": 64,
        "requests": list(turns),
        "subagents": list(subagents),
    }


def write(folder: Path, sessions: Sequence[Any]) -> TraceSource:
    with gzip.open(folder / AGENTS_FILE, "wt") as file:
        file.writelines(json.dumps(each) + "\n" for each in sessions)
    return TraceSource(folder, Part.ALL)


def play(source: TraceSource, users: int = 1, seed: int = 1) -> Run:
    return simulate(AgentSessions(read_sessions(source), seed, users), "least_loaded", FLEET)


def by_session(run: Run) -> Iterator[list[Record]]:
    for number in sorted({record.request.session for record in run.records}):
        yield [record for record in run.records if record.request.session == number]


def test_a_turn_comes_after_the_answer_and_the_pause(tmp_path: Path) -> None:
    turns = (turn(10), turn(12, 7.0, 30), turn(15, 900.0, 60), turn(16, 0.0, 61))
    run = play(write(tmp_path, [session("a", *turns)]))
    gaps = [later.request.arrival_s - before.finished_s for before, later in pairwise(run.records)]
    assert gaps == pytest.approx([7.0, MAX_THINK_S, 0.5])
    assert [record.request.prompt_tokens for record in run.records] == [643, 771, 963, 1_027]


def test_only_so_many_sessions_at_a_time_and_all_of_them(tmp_path: Path) -> None:
    source = write(tmp_path, [session(str(i), turn(5), turn(6), turn(7)) for i in range(7)])
    run = play(source, users=2)
    spans = [(each[0].request.arrival_s, each[-1].finished_s) for each in by_session(run)]
    assert len(spans) == 7
    for start_s, _ in spans:
        assert sum(other <= start_s < end for other, end in spans) <= 2
    assert len(run.records) == 21


def test_sessions_of_a_client_share_system_prompt_and_tools_only(tmp_path: Path) -> None:
    source = write(tmp_path, [session("a", turn(9)), session("b", turn(9)), session("c", turn(9), system=192)])
    one, two, other = (records[0].request.prompt_keys for records in by_session(play(source)))
    assert one[:3] == two[:3], "192 shared tokens are three blocks"
    assert not set(one[3:]) & set(two[3:])
    assert not set(one) & set(other), "another client"


def test_subagents_run_side_by_side_and_the_parent_waits_for_them(tmp_path: Path) -> None:
    agents = [
        {"t": 5.0, "requests": [turn(20, first=100), turn(21, 3.0, first=100)]},
        {"t": 5.0, "requests": [turn(30, first=200)]},
        {"t": 99.0, "requests": [turn(30, first=300)]},  # after the session's end
    ]
    run = play(write(tmp_path, [session("a", turn(10), turn(12, 1.0, 40), subagents=agents)]))
    parent, *children, last = sorted(run.records, key=lambda record: record.request.arrival_s)
    assert len(children) == 3
    assert [child.request.arrival_s for child in children[:2]] == pytest.approx([parent.finished_s + 0.5] * 2)
    assert last.request.prompt_tokens == 771
    assert last.request.arrival_s >= max(child.finished_s for child in children)


def test_a_session_ends_before_a_prompt_that_is_too_long(tmp_path: Path) -> None:
    too_long = MAX_CONTEXT_TOKENS // BLOCK + 1
    run = play(write(tmp_path, [session("a", turn(10), turn(too_long), turn(12)), session("b", turn(too_long))]))
    assert len(run.records) == 1


def test_seeds_change_the_order_and_not_the_requests(tmp_path: Path) -> None:
    source = write(tmp_path, [session(str(i), turn(5 + i), turn(9 + i)) for i in range(6)])
    first, again, other = (play(source, users=2, seed=seed) for seed in (1, 1, 2))

    def prompts(run: Run) -> list[bytes]:
        return [record.request.packed_prompt_keys for record in run.records]

    assert prompts(first) == prompts(again)
    assert prompts(first) != prompts(other)
    assert sorted(prompts(first)) == sorted(prompts(other))


def test_parts_share_no_session_and_leave_none_out(tmp_path: Path) -> None:
    source = write(tmp_path, [session(str(i), turn(5)) for i in range(7)])
    parts = {part: [each.session for each in read_sessions(TraceSource(source.folder, part))] for part in Part}
    assert parts[Part.TUNING] == ["0", "2", "4", "6"]
    assert parts[Part.REPORTING] == ["1", "3", "5"]
    assert sorted(parts[Part.TUNING] + parts[Part.REPORTING]) == parts[Part.ALL]


def test_parts_of_mooncakes_trace_are_halves_in_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    path.write_text("".join(json.dumps({**row, "timestamp": second * 1e3}) + "\n" for second in range(5)))

    def times(part: Part) -> list[float]:
        return [request.arrival_s for request in MooncakeTrace(path, 2.0, part).initial()]

    assert times(Part.TUNING) == [0.0, 0.5]
    assert times(Part.REPORTING) == [0.0, 0.5, 1.0], "its own time begins with its first line"
    assert len(times(Part.ALL)) == 5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "hash_ids"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1, "hash_ids": []}', "timestamp"),
        ('{"timestamp": 1, "input_length": "5", "output_length": 1, "hash_ids": []}', "input_length"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [-3]}', "hash_ids"),
    ],
)
def test_a_broken_line_is_told_in_one_sentence(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n' + line + "\n")
    with pytest.raises(TraceError, match=says) as told:
        list(read_lines(path, MooncakeLine))
    assert "line 2" in str(told.value)
    assert "download_traces.py" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    source = write(tmp_path, [session(str(i), turn(5)) for i in range(50)])
    path = source.folder / AGENTS_FILE
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TraceError, match="cannot be read"):
        list(read_lines(path, AgentSession))


def test_ids_that_do_not_cover_the_prompt_are_told(tmp_path: Path) -> None:
    wrong = {**turn(10), "ids": [[1, 4], [9, 5]]}
    source = write(tmp_path, [session("a", turn(5)), session("b", wrong)])
    with pytest.raises(TraceError, match=r"line 2: a prompt of 643 tokens has 9 block ids, not 10"):
        read_sessions(source)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policies", "best"], "no policy 'best'; there are ours"),
        (["--workload", "x"], "no workload 'x'; there are llmd-73"),
        (["--workload", "zipf", "--rates", "-3"], "a rate must be above 0, and -3 is not"),
        (["--workload", "zipf", "--rates", "fast"], "'fast' is no number"),
        (["--workload", "zipf", "--rates", "7"], "no step of 7/s; the steps are 30, 60, 90"),
        (["--workload", "mooncake-synthetic", "--rates", "1,2"], "a trace is replayed at one rate"),
        (["--workload", "agents-claude-code", "--traces", "/nowhere"], "no trace file /nowhere"),
    ],
)
def test_bad_input_gets_one_sentence_before_anything_runs(arguments: list[str], says: str) -> None:
    told = CliRunner().invoke(app, arguments, terminal_width=500)
    assert told.exit_code == 2
    assert says in " ".join(told.output.replace("│", " ").split())
    assert "Traceback" not in told.output


def test_downloaded_sessions_become_lines_that_are_read(tmp_path: Path) -> None:
    """A file of kv-cache-tester's: ids of its own, a last partial block, a subagent among the requests."""
    plain = {"type": "n", "out": 7, "think_time": 2.5}
    raw = {
        "block_size": BLOCK,
        "system_tokens": 128,
        "tool_tokens": 64,
        "requests": [
            {**plain, "t": 0.0, "in": 4 * BLOCK + 1, "hash_ids": [50, 51, 90, 91, 7]},
            {"type": "subagent", "t": 3.0, "requests": [{**plain, "t": 0.0, "in": BLOCK, "hash_ids": [400]}]},
            {**plain, "t": 9.0, "in": 5 * BLOCK, "hash_ids": [50, 51, 90, 12, 13]},
        ],
    }
    (read,) = read_sessions(write(tmp_path, [agent_session("trace_1", raw)]))
    assert [request.ids for request in read.requests] == [[(1, 4)], [(1, 3), (6, 2)]]
    assert read.requests[1].think_s == 2.5
    assert read.subagents[0].requests[0].ids == [(8, 1)]
    assert read.shared_blocks == 3
