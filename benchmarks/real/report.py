"""Outcomes -> rows, a table on the terminal, and the same table as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.real.run import Outcome

_COLUMNS = ("system", "mean TTFT", "p50", "p90", "cached", "oracle", "requests per engine", "failed")


@dataclass(frozen=True, slots=True)
class Row:
    """One system in one scenario. Requests that did not pass the router are not in it."""

    scenario: str
    system: str
    requests: int
    failed: int
    mean_ttft_s: float
    p50_ttft_s: float
    p90_ttft_s: float
    cached_share: float
    oracle_share: float
    requests_per_engine: dict[str, int]
    wall_s: float
    between_s: float
    took_s: float  # with warming up and emptying the caches, without starting the fleet
    phases: list[dict[str, float]]  # the same figures for each phase
    decisions: dict[str, int]  # outcome/reason -> count, from this project's receipts
    decided_by: dict[str, int]  # router -> count, likewise
    prediction_error_tokens: float | None  # mean difference of predicted and actual cached tokens


def row(outcome: Outcome, oracle: tuple[int, int], took_s: float) -> Row:
    routed = [answer for answer in outcome.answers if not answer.direct]
    good = [answer for answer in routed if not answer.error]
    if not good:
        raise ValueError(f"{outcome.system}: every request failed, the first with {routed[0].error}")
    known = [one for one in outcome.receipts if "actual" in one]
    errors = [abs(one.get("predicted_cached_tokens", 0) - one["actual"]["cached_tokens"]) for one in known]
    engines = Counter(answer.engine for answer in good)
    phases = []
    for number in range(len(outcome.scenario.phases)):
        some = [answer for answer in good if answer.phase == number]
        if some:
            phases.append(_figures(some))
    return Row(
        outcome.scenario.name.value,
        outcome.system.value,
        len(routed),
        len(routed) - len(good),
        **_figures(good),
        oracle_share=round(oracle[1] / oracle[0], 4),
        requests_per_engine=dict(sorted(engines.items())),
        wall_s=round(outcome.wall_s, 1),
        between_s=round(outcome.between_s, 1),
        took_s=round(took_s, 1),
        phases=phases,
        decisions=dict(Counter(f"{one['outcome']}/{one['reason']}" for one in outcome.receipts)),
        decided_by=dict(Counter(one["router"] for one in outcome.receipts)),
        prediction_error_tokens=round(statistics.fmean(errors), 1) if errors else None,
    )


def _figures(answers: Sequence[Any]) -> dict[str, float]:
    ttft = sorted(answer.ttft_s for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers)
    return {
        "mean_ttft_s": round(statistics.fmean(ttft), 4),
        "p50_ttft_s": round(statistics.median(ttft), 4),
        "p90_ttft_s": round(ttft[min(len(ttft) - 1, int(0.9 * len(ttft)))], 4),
        "cached_share": round(cached / sum(answer.prompt_tokens for answer in answers), 4),
    }


def details(outcome: Outcome) -> dict[str, Any]:
    return {
        "scenario": outcome.scenario.name.value,
        "system": outcome.system.value,
        "answers": [asdict(answer) for answer in outcome.answers],
        "receipts": outcome.receipts,
    }


def print_report(
    console: Console, rows: Sequence[Row], failures: Sequence[dict[str, str]], titles: dict[str, str]
) -> None:
    for scenario, title in titles.items():
        table = Table(*_COLUMNS, title=title)
        for cells in _table(scenario, rows, failures):
            table.add_row(*cells)
        if table.row_count:
            console.print(table)


def markdown(rows: Sequence[Row], failures: Sequence[dict[str, str]], titles: dict[str, str]) -> str:
    lines: list[str] = []
    for scenario, title in titles.items():
        if table := _table(scenario, rows, failures):
            lines += [f"**{title}**", "", f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
            lines += [f"| {' | '.join(cells)} |" for cells in table]
            lines.append("")
    return "\n".join(lines)


def _table(scenario: str, rows: Sequence[Row], failures: Sequence[dict[str, str]]) -> list[tuple[str, ...]]:
    """What failed is in it, too."""
    blank = ("-",) * (len(_COLUMNS) - 2)
    return [_cells(row) for row in rows if row.scenario == scenario] + [
        (failure["system"], *blank, "not run") for failure in failures if failure["scenario"] == scenario
    ]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.system,
        *(f"{seconds:.2f} s" for seconds in (row.mean_ttft_s, row.p50_ttft_s, row.p90_ttft_s)),
        f"{row.cached_share:.3f}",
        f"{row.oracle_share:.3f}",
        " / ".join(str(count) for count in row.requests_per_engine.values()),
        str(row.failed),
    )
