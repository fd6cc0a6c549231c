"""Facts -> findings: all checks, in the order in which they are shown. Each is a plain function over the facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from serve_app.doctor import fleet, machine, redis
from serve_app.doctor.facts import Facts, Finding, Level

Look = Callable[[Facts], Iterator[Finding]]


class Check(NamedTuple):
    look: Look
    without: str = ""  # what is said where there is nothing to look at, and
    do: str = ""
    has: Callable[[Facts], bool] = lambda _: True  # whether there is


def _has_redis(facts: Facts) -> bool:
    return facts.redis is not None and not facts.redis.error


def _has_pods(facts: Facts) -> bool:
    return facts.redis is not None and bool(facts.redis.domains)


_NO_REDIS: Final = ("no Redis answers", "kvcache doctor --redis URL", _has_redis)
_NO_PODS: Final = (
    "nobody publishes",
    "kvcache up, or kvcache publish --server http://ENGINE:8000 --redis URL",
    _has_pods,
)
CHECKS: Final = (
    Check(machine.versions),
    Check(machine.ports),
    Check(machine.open_files),
    Check(machine.direct_streaming),
    Check(machine.haproxy),
    Check(machine.orphans),
    Check(machine.serve_config, "no config was named", "kvcache doctor CONFIG", lambda facts: facts.config is not None),
    Check(redis.redis),
    Check(redis.redis_memory, *_NO_REDIS),
    Check(redis.redis_persistence, *_NO_REDIS),
    Check(redis.clock, *_NO_REDIS),
    Check(fleet.pods, *_NO_PODS),
    Check(fleet.layout, *_NO_PODS),
    Check(fleet.lmcache, *_NO_PODS),
    Check(fleet.adapters, *_NO_PODS),
    Check(fleet.prompts, *_NO_PODS),
    Check(fleet.vllm, "no vLLM server was named", "kvcache doctor --engine URL", lambda facts: bool(facts.engines)),
)


def examine(facts: Facts) -> list[Finding]:
    """All findings. A check that finds nothing is ok, unless there was nothing to look at."""
    found = []
    for check in CHECKS:
        of_check = list(check.look(facts))
        if not of_check:
            name = check.look.__name__.replace("_", " ")
            ok = Finding(name, Level.OK, "nothing wrong")
            of_check = [ok if check.has(facts) else Finding(name, Level.UNKNOWN, check.without, do=check.do)]
        found.extend(of_check)
    return found
