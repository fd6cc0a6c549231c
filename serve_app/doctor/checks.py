"""Facts -> findings: all checks, in the order in which they are shown. Each is a plain function over the facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from serve_app.doctor import fleet, machine, redis
from serve_app.doctor.facts import Facts, Finding, Level

Check = Callable[[Facts], Iterator[Finding]]
CHECKS: Final[tuple[Check, ...]] = (
    machine.versions,
    machine.ports,
    machine.open_files,
    machine.direct_streaming,
    machine.haproxy,
    machine.orphans,
    machine.serve_config,
    redis.redis,
    redis.redis_memory,
    redis.redis_persistence,
    redis.clock,
    fleet.pods,
    fleet.layout,
    fleet.lmcache,
    fleet.adapters,
    fleet.prompts,
    fleet.vllm,
)


def examine(facts: Facts) -> list[Finding]:
    """All findings; a check that finds nothing is one that is ok."""
    found = []
    for check in CHECKS:
        of_check = list(check(facts))
        found.extend(of_check or [Finding(check.__name__.replace("_", " "), Level.OK, "nothing wrong")])
    return found
