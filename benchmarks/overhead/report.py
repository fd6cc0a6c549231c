"""Cells of several rounds -> medians, added latency, verdicts on the targets; as JSON and as tables.

Added latency is the difference of two medians that were measured in turns, in one visit to one system: of the system,
and of direct calls to the same engines with the same bodies. Of the rounds' differences the median is quoted, with the
smallest and the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from benchmarks.overhead.measure import SYSTEM, Cell
from benchmarks.overhead.systems import REPLICA, UVICORN, System

KIB: Final = 1024
_SMALL: Final = 2 * KIB
_LONG: Final = 32 * KIB
_SMALL_TARGET: Final = 1.5  # times vllm-router's added p50
_LONG_TARGET: Final = 0.5  # times vllm-router kv_aware's added p50


@dataclass(frozen=True, slots=True)
class Record:
    round: int
    system: System
    cell: Cell


@dataclass(frozen=True, slots=True)
class Row:
    """One system at one size and concurrency, over all rounds."""

    system: System
    body_bytes: int
    concurrency: int
    baseline: str
    added_p50_ms: float
    added_p50_min_ms: float
    added_p50_max_ms: float
    p50_ms: float
    p99_ms: float
    direct_p50_ms: float
    requests_per_s: float
    direct_requests_per_s: float
    same_engine_share: float
    added_over_uvicorn_p50_ms: float  # the replica's own HTTP layer counted as added

    def to_json(self) -> dict[str, Any]:
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name in self.__slots__
            for value in [getattr(self, name)]
        }


def rows(records: Sequence[Record]) -> list[Row]:
    groups: dict[tuple[System, int, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.system, record.cell.body_bytes, record.cell.concurrency), []).append(record)
    return [_row(*key, group) for key, group in groups.items()]


def _row(system: System, body_bytes: int, concurrency: int, records: Sequence[Record]) -> Row:
    rounds: dict[int, dict[str, Cell]] = {}
    for record in records:
        rounds.setdefault(record.round, {})[record.cell.target] = record.cell
    visits = list(rounds.values())
    baseline = REPLICA if REPLICA in visits[0] else UVICORN
    added = [visit[SYSTEM].p50_ms - visit[baseline].p50_ms for visit in visits]
    return Row(
        system=system,
        body_bytes=body_bytes,
        concurrency=concurrency,
        baseline=baseline,
        added_p50_ms=statistics.median(added),
        added_p50_min_ms=min(added),
        added_p50_max_ms=max(added),
        p50_ms=_median(visit[SYSTEM].p50_ms for visit in visits),
        p99_ms=_median(visit[SYSTEM].p99_ms for visit in visits),
        direct_p50_ms=_median(visit[baseline].p50_ms for visit in visits),
        requests_per_s=_median(visit[SYSTEM].requests_per_s for visit in visits),
        direct_requests_per_s=_median(visit[baseline].requests_per_s for visit in visits),
        same_engine_share=_median(visit[SYSTEM].same_engine_share for visit in visits),
        added_over_uvicorn_p50_ms=_median(visit[SYSTEM].p50_ms - visit[UVICORN].p50_ms for visit in visits),
    )


def verdicts(measured: Iterable[Row]) -> list[dict[str, Any]]:
    """Each target at each concurrency; only those whose two systems were measured."""
    by_key = {(row.system, row.body_bytes, row.concurrency): row for row in measured}
    found: list[dict[str, Any]] = []
    for (system, size, concurrency), ours in by_key.items():
        if system is not System.OURS_LOCAL:
            continue
        targets = []
        if size == _SMALL:
            targets = [(other, _SMALL_TARGET) for other in (System.CACHE_AWARE, System.KV_AWARE)]
        elif size >= _LONG:
            targets = [(System.KV_AWARE, _LONG_TARGET)]
        for other, limit in targets:
            theirs = by_key.get((other, size, concurrency))
            if theirs is None:
                continue
            ratio = ours.added_p50_ms / theirs.added_p50_ms if theirs.added_p50_ms > 0 else None
            found.append(
                {
                    "target": f"added p50 at {size // KIB} KiB <= {limit} x {other.value}",
                    "concurrency": concurrency,
                    "ours_added_p50_ms": round(ours.added_p50_ms, 3),
                    "theirs_added_p50_ms": round(theirs.added_p50_ms, 3),
                    "ratio": None if ratio is None else round(ratio, 3),
                    "limit": limit,
                    "met": ours.added_p50_ms <= limit * theirs.added_p50_ms,
                }
            )
    return found


def print_report(console: Console, measured: Sequence[Row], judged: Sequence[dict[str, Any]]) -> None:
    for size in sorted({row.body_bytes for row in measured}):
        names = ("at once", "added p50", "p50", "direct", "per s", "same engine")
        table = Table(
            Column("system", no_wrap=True, min_width=23),
            *names,
            title=f"bodies of {size // KIB} KiB (milliseconds)",
            box=SIMPLE_HEAD,
        )
        for row in measured:
            if row.body_bytes == size:
                table.add_row(
                    row.system.value,
                    str(row.concurrency),
                    f"{row.added_p50_ms:.2f}",
                    f"{row.p50_ms:.2f}",
                    f"{row.direct_p50_ms:.2f}",
                    f"{row.requests_per_s:.0f}",
                    f"{row.same_engine_share:.0%}",
                )
        console.print(table)
    if judged:
        table = Table("target", "at once", "ours", "theirs", "ratio", "met", title="targets", box=SIMPLE_HEAD)
        for verdict in judged:
            table.add_row(
                verdict["target"],
                str(verdict["concurrency"]),
                f"{verdict['ours_added_p50_ms']:.2f} ms",
                f"{verdict['theirs_added_p50_ms']:.2f} ms",
                "-" if verdict["ratio"] is None else f"{verdict['ratio']:.2f}",
                "[green]yes[/green]" if verdict["met"] else "[red]no[/red]",
            )
        console.print(table)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
