"""This machine, the environment of Ray Serve, and the Serve config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from serve_app.doctor.facts import Facts, Finding, Level
from serve_app.doctor.findings import lora_behind_lmcache, unaligned_chunks
from serve_app.serve_config import engines, graphs

PYTHONS: Final = ((3, 11), (3, 12))
OPEN_FILES: Final = 65_536  # HAProxy, Ray and the engines hold one for each connection
DIRECT: Final = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
}
HAPROXY_PATH: Final = "RAY_SERVE_HAPROXY_BINARY_PATH"
_ENV = "set -a; . <(kvcache config show direct.env); set +a, before Ray starts"


def versions(facts: Facts) -> Iterator[Finding]:
    python = facts.host.python
    if python not in PYTHONS:
        saw = f"Python {python[0]}.{python[1]}"
        yield Finding("versions", Level.ERROR, saw, "it was tested on 3.11 and 3.12 only", "use Python 3.11 or 3.12")
    for package in facts.host.packages:
        if package.installed and not package.fits:
            yield Finding(
                "versions",
                Level.ERROR,
                f"{package.name} {package.installed}, wanted {package.wanted}",
                "its interfaces are not stable: routers or events may be misread",
                f'pip install "{package.name}{package.wanted}"',
            )


def ports(facts: Facts) -> Iterator[Finding]:
    for port in facts.ports:
        if port.owner and not port.ours:
            yield Finding(
                "ports",
                Level.ERROR,
                f"{port.where}: port {port.number} on {port.host} is taken by {port.owner}",
                "what is to listen there cannot start",
                f"stop {port.owner}, or choose another port (`kvcache up --port`)",
            )


def open_files(facts: Facts) -> Iterator[Finding]:
    if 0 < facts.host.open_files < OPEN_FILES:
        yield Finding(
            "open files",
            Level.WARNING,
            f"at most {facts.host.open_files} open files",
            "under load connections are refused",
            f"ulimit -n {OPEN_FILES}, before Ray starts (limits.conf, or LimitNOFILE of systemd)",
        )


def direct_streaming(facts: Facts) -> Iterator[Finding]:
    environment = facts.host.environment
    there = {name for name, value in DIRECT.items() if environment.get(name) == value}
    if there and (missing := sorted(DIRECT.keys() - there)):
        yield Finding(
            "direct streaming",
            Level.ERROR,
            f"{', '.join(sorted(there))} set, {', '.join(missing)} not",
            "half of it does not route by prompt: the body does not reach the router",
            _ENV,
        )
    elif there and HAPROXY_PATH not in environment:
        yield Finding(
            "direct streaming",
            Level.WARNING,
            f"{HAPROXY_PATH} is not set",
            "Ray's own HAProxy answers 503 when a router does not answer",
            _ENV,
        )


def haproxy(facts: Facts) -> Iterator[Finding]:
    if facts.host.direct and facts.host.haproxy_error:
        yield Finding(
            "haproxy",
            Level.ERROR,
            facts.host.haproxy_error,
            "direct streaming has no proxy to run",
            'pip install "kvcache-manager[serve]"',
        )


def orphans(facts: Facts) -> Iterator[Finding]:
    if gone := facts.host.orphans:
        shown = ", ".join(f"{one.pid} ({one.command})" for one in gone[:5])
        yield Finding(
            "orphans",
            Level.WARNING,
            f"{len(gone)} processes of a `kvcache up` that has ended: {shown}",
            "they hold memory, ports and GPUs",
            "kvcache down",
        )


def serve_config(facts: Facts) -> Iterator[Finding]:
    if facts.config is None:
        return
    served = list(engines(facts.config))
    for graph in graphs(facts.config):
        same = [one for one in served if one.model == graph.model]
        if served and not same:
            yield Finding(
                "config",
                Level.ERROR,
                f"the graph follows model {graph.model!r}, the engines serve {', '.join(one.model for one in served)}",
                "its index stays empty",
                "give build_kvcache the engines' model_id as `model`",
            )
        for one in same:
            if one.redis_url != graph.redis_url:
                yield Finding(
                    "config",
                    Level.ERROR,
                    f"model {one.model!r} publishes to another redis_url than the graph reads",
                    "the graph's index stays empty",
                    "give both the same redis_url",
                )
    for one in served:
        yield from _engine_settings(one.model, one.engine_kwargs, one.chunk_size)


def _engine_settings(model: str, kwargs: dict[str, object], chunk_size: int) -> Iterator[Finding]:
    if kwargs.get("enable_prefix_caching") is False:
        yield Finding(
            "config",
            Level.ERROR,
            f"model {model!r} has enable_prefix_caching: false",
            "nothing is ever taken from a cache",
            "delete that line",
        )
    block_size = kwargs.get("block_size")
    if isinstance(block_size, int) and block_size > 0 and chunk_size % block_size:
        yield unaligned_chunks(f"lmcache.chunk_size {chunk_size} of model {model!r}", block_size)
    if chunk_size and kwargs.get("enable_lora"):
        yield lora_behind_lmcache(f"model {model!r}")
