"""Which cells `make bench-real` runs, and that its result file is whole after each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real.cells import Cell, Pace, Results, plan
from benchmarks.real.report import Row
from benchmarks.real.systems import System
from benchmarks.real.workload import Name, Scenario, Size, scenarios
from serve_app.errors import ConfigError

SIZE = Size(
    documents=3, document_tokens=100, turns=4, zipf_documents=6, zipf_chains=2, zipf_asks=5, lmcache_documents=5
)


@pytest.fixture(scope="module")
def every(model_path: str) -> list[Scenario]:
    return scenarios(SIZE, model_path)


def row_of(cell: Cell) -> Row:
    return Row(
        scenario=cell.scenario.name.value,
        system=cell.system.value,
        requests=3,
        failed=0,
        mean_ttft_s=1.0,
        p50_ttft_s=1.0,
        p90_ttft_s=1.0,
        cached_share=0.5,
        oracle_share=0.6,
        requests_per_engine={"a": 3},
        wall_s=1.0,
        between_s=0.0,
        took_s=2.0,
        phases=[],
        decisions={},
        decided_by={},
        prediction_error_tokens=None,
    )


def results(path: Path, every: list[Scenario], **workload: Any) -> Results:
    about = {"command": "test", "commit": "0", "versions": {}, "workload": workload}
    return Results(path, about, {each.name.value: each.title for each in every})


def test_every_stack_is_started_once(every: list[Scenario]) -> None:
    stacks = [cell.stack for cell in plan(list(System), every)]
    changes = [stack for i, stack in enumerate(stacks) if i == 0 or stacks[i - 1] != stack]
    assert len(changes) == len(set(stacks))
    with_lmcache = [cell for cell in plan(list(System), every) if cell.scenario.shape.lmcache]
    assert len({cell.stack for cell in with_lmcache}) == len(with_lmcache)  # its server cannot be emptied


def test_systems_that_know_prefixes_run_everything(every: list[Scenario]) -> None:
    ran = {cell.key for cell in plan(list(System), every)}
    assert {(system.value, name.value) for system in System if system.knows_prefixes for name in Name} <= ran
    assert ("round_robin", "base") in ran
    assert ("round_robin", "bypass") not in ran


def test_a_run_that_was_cut_off_goes_on_where_it_was(every: list[Scenario], tmp_path: Path) -> None:
    first, second, third = plan([System.KV_AWARE], every)[:3]
    before = results(tmp_path / "real.json", every, documents=3)
    before.done(first, row_of(first), {"answers": []})
    before.failed(second, TimeoutError("no engine"))
    written = json.loads((tmp_path / "real.json").read_text())
    assert written["failures"] == [
        {"system": "kv_aware", "scenario": second.key[1], "error": "TimeoutError: no engine"}
    ]
    assert "not run" in (tmp_path / "real.md").read_text()

    after = results(tmp_path / "real.json", every, documents=3)
    after.take_over()
    assert [after.has(cell) for cell in (first, second, third)] == [True, False, False]
    after.done(second, row_of(second), {"answers": []})
    written = json.loads((tmp_path / "real.json").read_text())
    assert [(row["system"], row["scenario"]) for row in written["rows"]] == [first.key, second.key]
    assert (written["failures"], len(written["requests"])) == ([], 2)


def test_another_workload_is_not_gone_on_with(every: list[Scenario], tmp_path: Path) -> None:
    (cell, *_) = plan([System.KV_AWARE], every)
    results(tmp_path / "real.json", every, documents=3).done(cell, row_of(cell), {})
    with pytest.raises(ConfigError):
        results(tmp_path / "real.json", every, documents=4).take_over()


def test_estimate_counts_down_to_nothing(every: list[Scenario]) -> None:
    cells = plan([System.KV_AWARE], every)
    pace = Pace(cells)
    assert pace.left().startswith(f"(0 of {len(cells)} done")
    for cell in cells:
        pace.passed(cell)
    assert pace.left() == f"({len(cells)} of {len(cells)} done, about 0 min left)"
