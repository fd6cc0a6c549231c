"""What a workload is, and the parts that all of them are made of.

In: a seed. Out: requests: those known at the start in order of time, and those that follow from an answer (the next
turn of a conversation, the next step of a rate ladder). The workloads themselves are in ladders.py and sessions.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.fleet.engine import ReplicaConfig
from benchmarks.fleet.requests import BLOCK_SIZE_TOKENS, Record, Request
from benchmarks.fleet.traces import TraceSource
from serve_app.blocks import split_keys
from serve_app.types import BlockKey

NEVER_S = math.inf


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a rate ladder."""

    rate_per_s: float
    duration_s: float
    warm_up: bool = False


class Workload(Protocol):
    @property
    def stages(self) -> Sequence[Stage]: ...

    @property
    def min_think_s(self) -> float:
        """No request follows an answer sooner than this; NEVER_S if none ever does."""
        ...

    def initial(self) -> Iterator[Request]:
        """Requests that depend on no answer, in order of arrival."""
        ...

    def after(self, record: Record) -> Iterable[Request]:
        """Requests that the end of this one causes."""
        ...


@dataclass(frozen=True, slots=True)
class Scenario:
    """A workload and the fleet that it is meant for."""

    name: str
    what: str
    replicas: int
    replica: ReplicaConfig
    make: Callable[[int, Sequence[float] | None, TraceSource], Workload]  # seed, rates (None: all), where traces are


class Keys:
    """Hands out block keys that were never seen before, spread like hashes: numbers, scrambled by splitmix64."""

    def __init__(self) -> None:
        self._next = 1

    def fresh(self, blocks: int) -> tuple[BlockKey, ...]:
        start = self._next
        self._next += blocks
        return numbered_keys(np.arange(start, start + blocks, dtype=np.uint64))


def numbered_keys(numbers: npt.NDArray[np.uint64]) -> tuple[BlockKey, ...]:
    """The keys of these numbers; other numbers have other keys (splitmix64 is a permutation)."""
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return tuple(split_keys((mixed ^ (mixed >> np.uint64(31))).tobytes()))


class Builder:
    """Makes requests out of texts, numbering them."""

    def __init__(self, keys: Keys, block_size_tokens: int = BLOCK_SIZE_TOKENS) -> None:
        self._keys = keys
        self._block = block_size_tokens
        self._count = 0

    def request(
        self,
        arrival_s: float,
        known: Sequence[BlockKey],
        prompt_tokens: int,
        output_tokens: int,
        session: int,
        stage: int = 0,
    ) -> Request:
        """A request whose prompt begins with the blocks `known` (no more than fit) and is new beyond them."""
        prompt_blocks = prompt_tokens // self._block
        all_blocks = (prompt_tokens + output_tokens - 1) // self._block
        missing = prompt_blocks - len(known)
        prompt = tuple(known) if missing == 0 else (*known, *self._keys.fresh(missing))
        answer = self._keys.fresh(all_blocks - prompt_blocks)
        self._count += 1
        return Request(
            self._count - 1, arrival_s, prompt, b"".join(prompt), answer, prompt_tokens, output_tokens, session, stage
        )


def arrivals(rng: random.Random, stage: Stage, start_s: float, poisson: bool) -> Iterator[float]:
    """`rate` x `duration` arrival times."""
    count = round(stage.rate_per_s * stage.duration_s)
    if not poisson:
        yield from (start_s + i / stage.rate_per_s for i in range(count))
        return
    at_s = start_s
    for _ in range(count):
        at_s += rng.expovariate(stage.rate_per_s)
        yield at_s


def wanted_stages(stages: Sequence[Stage], rates: Sequence[float] | None) -> list[Stage]:
    """Warm-up, and the stages with these rates.

    Raises:
        ValueError: there is no such step.
    """
    known = [stage.rate_per_s for stage in stages if not stage.warm_up]
    for rate in rates or ():
        if rate not in known:
            raise ValueError(
                f"no step of {rate:g}/s; the steps are {', '.join(f'{known_rate:g}' for known_rate in known)}"
            )
    return [stage for stage in stages if stage.warm_up or rates is None or stage.rate_per_s in rates]


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Cumulative weights for random.choices: item i has weight 1 / (i + 1) ** exponent."""
    total, cumulative = 0.0, []
    for rank in range(1, count + 1):
        total += rank**-exponent
        cumulative.append(total)
    return cumulative
