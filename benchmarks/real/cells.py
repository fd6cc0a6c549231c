"""Which cells there are, what has come out of them so far, and how long the rest will take.

A cell is one system in one scenario. In: systems and scenarios. Out: cells in the order in which they share stacks, and
a result file that is whole after every cell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.real.report import Row, markdown
from benchmarks.real.systems import System
from benchmarks.real.workload import Between, Name, Scenario, Shape
from serve_app.errors import ConfigError

_BLIND_RUN: Final = {Name.BASE, Name.ZIPF}

# A first guess for the estimate, from a run on two cores; the run's own pace corrects it.
_START_S: Final = 65.0  # and stop a stack
_ENGINE_S: Final = 12.0  # for each engine more than two
_CELL_S: Final = 22.0  # warm up, empty caches, settle
_REQUEST_S: Final = 0.7
_RESTART_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Cell:
    system: System
    scenario: Scenario

    @property
    def stack(self) -> tuple[str, Shape]:
        """Cells with the same can share one. Plain vLLM servers do not care which policy is before them.

        But an LMCache server cannot be emptied: what one system had stored, the next would find.
        """
        shape = self.scenario.shape
        return "plain" if self.system.vllm_router and not shape.lmcache else self.system.value, shape

    @property
    def key(self) -> tuple[str, str]:
        return self.system.value, self.scenario.name.value

    def __str__(self) -> str:
        return ", ".join(self.key)


def plan(systems: Sequence[System], scenarios: Sequence[Scenario]) -> list[Cell]:
    cells = [
        Cell(system, scenario)
        for system in systems
        for scenario in scenarios
        if system.knows_prefixes or scenario.name in _BLIND_RUN
    ]
    stacks = list(dict.fromkeys(cell.stack for cell in cells))
    return sorted(cells, key=lambda cell: stacks.index(cell.stack))


class Results:
    """The result file. Every change is written at once.

    Args:
        path: of the JSON; the Markdown is beside it.
        about: what it was measured on and with.
        titles: of the scenarios.
    """

    def __init__(self, path: Path, about: dict[str, Any], titles: dict[str, str]) -> None:
        self._path, self.about, self._titles = path, about, titles
        self.rows: list[Row] = []
        self.failures: list[dict[str, str]] = []
        self._requests: list[dict[str, Any]] = []
        self._began_s, self._took_before_s = time.monotonic(), 0

    def take_over(self) -> None:
        """Start from the cells that the file has; those that failed will run again.

        Raises:
            ConfigError: they were of another workload.
        """
        if not self._path.exists():
            return
        old = json.loads(self._path.read_text())
        if old["workload"] != self.about["workload"]:
            raise ConfigError(f"{self._path} is of another workload or version: run without --resume")
        self.rows = [Row(**each) for each in old["rows"]]
        self._requests = old["requests"]
        self._took_before_s = old["took_s"]
        self.about["resumed_from"] = [*old.get("resumed_from", []), {key: old[key] for key in ("command", "commit")}]
        self.about["versions"] = {**old["versions"], **self.about["versions"]}

    def has(self, cell: Cell) -> bool:
        return any((row.system, row.scenario) == cell.key for row in self.rows)

    def done(self, cell: Cell, row: Row, requests: dict[str, Any]) -> None:
        self.rows.append(row)
        self._requests.append(requests)
        self._write()

    def failed(self, cell: Cell, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"[-2000:]
        self.failures.append({"system": cell.key[0], "scenario": cell.key[1], "error": reason})
        self._write()

    def _write(self) -> None:
        result = {
            **self.about,
            "took_s": self._took_before_s + round(time.monotonic() - self._began_s),
            "failures": self.failures,
            "rows": [asdict(each) for each in self.rows],
            "requests": self._requests,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".tmp")  # a run that is cut off leaves the old file or the new one
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(self._path)
        self._path.with_suffix(".md").write_text(markdown(self.rows, self.failures, self._titles))


class Pace:
    """How long the rest will take: a guess for each cell, corrected by how the cells so far compare with theirs."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        stacks: set[tuple[str, Shape]] = set()
        self._guess_s: dict[tuple[str, str], float] = {}
        for cell in cells:
            requests = sum(len(asks) for asks in cell.scenario.asks())
            guess_s = _CELL_S + _REQUEST_S * requests
            if cell.scenario.between is Between.RESTART_ROUTER:
                guess_s += _RESTART_S
            if cell.stack not in stacks:
                guess_s += _START_S + _ENGINE_S * (cell.scenario.shape.engines - 2)
            stacks.add(cell.stack)
            self._guess_s[cell.key] = guess_s
        self._count, self._total_s = len(cells), sum(self._guess_s.values())
        self._began_s = time.monotonic()

    def passed(self, cell: Cell) -> None:
        self._guess_s.pop(cell.key, None)

    def left(self) -> str:
        left_s = sum(self._guess_s.values())
        guessed_s, took_s = self._total_s - left_s, time.monotonic() - self._began_s
        if guessed_s:
            left_s *= took_s / guessed_s
        return f"({self._count - len(self._guess_s)} of {self._count} done, about {left_s / 60:.0f} min left)"
