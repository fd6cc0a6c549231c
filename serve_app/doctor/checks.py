"""Facts -> findings: all checks, in the order in which they are shown. Each is a plain function over the facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from serve_app.doctor import fleet, machine, redis
from serve_app.doctor.facts import Facts, Finding, Level

Look = Callable[[Facts], Iterator[Finding]]


class Check(NamedTuple):
    look: Look
    without: str = ""  # what is said where there is nothing to look at
    has: Callable[[Facts], bool] = lambda _: True  # whether there is


def _has_redis(facts: Facts) -> bool:
    return facts.redis is not None and not facts.redis.error


def _has_pods(facts: Facts) -> bool:
    return facts.redis is not None and bool(facts.redis.domains)


CHECKS: Final = (
    Check(machine.versions),
    Check(machine.ports),
    Check(machine.open_files),
    Check(machine.direct_streaming),
    Check(machine.haproxy),
    Check(machine.orphans),
    Check(machine.serve_config, "no config was named", lambda facts: facts.config is not None),
    Check(redis.redis, "no Redis answers", _has_redis),
    Check(redis.redis_memory, "no Redis answers", _has_redis),
    Check(redis.redis_persistence, "no Redis answers", _has_redis),
    Check(redis.clock, "no Redis answers", _has_redis),
    Check(fleet.pods, "nobody publishes", _has_pods),
    Check(fleet.layout, "nobody publishes", _has_pods),
    Check(fleet.lmcache, "nobody publishes", _has_pods),
    Check(fleet.adapters, "nobody publishes", _has_pods),
    Check(fleet.prompts, "nobody publishes", _has_pods),
    Check(fleet.vllm, "no vLLM server was named (--engine)", lambda facts: bool(facts.engines)),
)


def examine(facts: Facts) -> list[Finding]:
    """All findings. A check that finds nothing is ok, unless there was nothing to look at."""
    found = []
    for check in CHECKS:
        of_check = list(check.look(facts))
        if not of_check:
            name = check.look.__name__.replace("_", " ")
            ok = check.has(facts)
            of_check = [Finding(name, Level.OK, "nothing wrong") if ok else Finding(name, Level.UNKNOWN, check.without)]
        found.extend(of_check)
    return found
