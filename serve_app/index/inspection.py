"""What a Redis is, may be used for, and holds, for `kvcache doctor`. Nothing is changed in it.

In: a URL. Out: `RedisFacts`. A right is tried with a command that does nothing: one that a publisher sends, on a key
that is not there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec
import redis

from serve_app.index.connection import connect, redact
from serve_app.index.faults import store_error
from serve_app.index.keyspace import DomainRecord, HeartbeatRecord, Keyspace, decode_domain, decode_heartbeat
from serve_app.types import DomainId, ModelId

MODELS_MAX = 64
_SCAN_COUNT = 1000
_DOMAINS_KEY = re.compile(r"kv:\{(.+)\}:domains")
# Each does nothing to a key that is not there; `hset` and `sadd` have no such form.
_TRIED: Final[Mapping[str, tuple[str, ...]]] = {
    "hgetall": (),
    "xrevrange": ("+", "-", "COUNT", "1"),
    "sscan": ("0",),
    "set": ("x", "XX"),
    "hdel": ("x",),
    "srem": ("x",),
    "expire": ("1",),
    "zadd": ("XX", "1", "x"),
    "zrem": ("x",),
    "xadd": ("NOMKSTREAM", "*", "r", "x"),
    "del": (),
}


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """One pod or shared store, as its record and heartbeat say."""

    model: str
    domain: str
    record: DomainRecord | None  # None: it cannot be read
    heartbeat: HeartbeatRecord | None = None  # None: its lease is gone
    beats: bool | None = None  # whether the heartbeat has changed while it was looked at; None: looked once

    @property
    def pod(self) -> str:
        return (self.record.pod if self.record else None) or self.domain


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """What Redis says of itself and of our keys."""

    url: str  # without passwords
    error: str = ""  # why it could not be asked; then nothing else is known
    version: str = ""
    refused: tuple[str, ...] = ()  # commands that this user may not send
    read_only: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)  # of INFO; empty: not allowed
    saves: str | None = None  # CONFIG GET save; None: not allowed
    ahead_s: float | None = None  # its clock before ours; None: not allowed
    models: tuple[str, ...] | None = ()  # that have domains; None: looking for them is not allowed
    domains: tuple[DomainFacts, ...] = ()
    wrong_types: tuple[str, ...] = ()  # keys of ours that somebody else has written


def inspect_redis(url: str, model: str = "", watch_s: float = 0.0) -> RedisFacts:
    """Args:
    model: the only one to look at; empty: all that are found.
    watch_s: how long to wait between two looks at the heartbeats; 0: one look.

    Raises:
        ConfigError: not a URL of a Redis.
    """
    keys = Keyspace(ModelId(model or "doctor"))
    client = connect(url, name="kvcache-doctor", slot_of=keys.log)
    try:
        client.ping()
        return _inspect(client, url, model, watch_s)
    except (redis.RedisError, OSError) as error:
        return RedisFacts(redact(url), error=str(store_error(error, keys)))
    finally:
        client.connection_pool.disconnect()


def _inspect(client: redis.Redis, url: str, model: str, watch_s: float) -> RedisFacts:
    refused, read_only = _rights(client, Keyspace(ModelId(model or "doctor")))
    before_s = time.time()
    told: Any = _allowed(client.time)
    ahead_s = None if told is None else told[0] + told[1] / 1e6 - (before_s + time.time()) / 2
    info: Any = _allowed(client.info) or {}
    saves: Any = _allowed(lambda: client.config_get("save"))
    models = (model,) if model else _models(client)
    wrong: list[str] = []
    first = {each: _domains(client, each, wrong) for each in models or ()}
    domains = [one for each in first.values() for one in each]
    if watch_s and domains:
        time.sleep(watch_s)
        domains = [_watched(one, _heartbeat(client, one)) for one in domains]
    return RedisFacts(
        redact(url),
        version=str(info.get("valkey_version") or info.get("redis_version", "")),
        refused=tuple(refused),
        read_only=read_only,
        info=info,
        saves=None if saves is None else str(saves.get("save", "")),
        ahead_s=ahead_s,
        models=models,
        domains=tuple(domains),
        wrong_types=tuple(wrong),
    )


def _rights(client: redis.Redis, keys: Keyspace) -> tuple[list[str], bool]:
    refused, read_only = [], False
    for command, arguments in _TRIED.items():
        try:
            client.execute_command(command, f"{keys.log}:doctor", *arguments)
        except redis.ReadOnlyError:
            read_only = True
        except redis.exceptions.NoPermissionError:
            refused.append(command)
        except redis.ResponseError:  # full, or cannot save: what INFO tells
            continue
    return refused, read_only


def _allowed(ask: Callable[[], Any]) -> Any:
    """Its answer; None if this user may not ask."""
    try:
        return ask()
    except redis.ResponseError:
        return None


def _models(client: redis.Redis) -> tuple[str, ...] | None:
    names: set[str] = set()
    try:
        for key in client.scan_iter("kv:{*}:domains", count=_SCAN_COUNT):
            if (found := _DOMAINS_KEY.fullmatch(_text(key))) is not None:
                names.add(found[1])
            if len(names) >= MODELS_MAX:
                break
    except redis.exceptions.NoPermissionError:
        return None
    return tuple(sorted(names))


def _domains(client: redis.Redis, model: str, wrong: list[str]) -> list[DomainFacts]:
    keys = Keyspace(ModelId(model))
    try:
        raw: Any = client.hgetall(keys.domains)
    except redis.ResponseError as error:
        wrong.append(str(store_error(error, keys, f"HGETALL {keys.domains}")))
        return []
    found = []
    for name, record in raw.items():
        domain = _text(name)
        try:
            facts = DomainFacts(model, domain, decode_domain(record))
        except msgspec.DecodeError:
            facts = DomainFacts(model, domain, None)
        found.append(replace(facts, heartbeat=_heartbeat(client, facts)))
    return sorted(found, key=lambda one: one.domain)


def _text(raw: bytes | str) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw


def _heartbeat(client: redis.Redis, facts: DomainFacts) -> HeartbeatRecord | None:
    found: Any = client.mget([Keyspace(ModelId(facts.model)).lease(DomainId(facts.domain))])
    try:
        return decode_heartbeat(found[0]) if found[0] else None
    except msgspec.DecodeError:
        return None


def _watched(before: DomainFacts, now: HeartbeatRecord | None) -> DomainFacts:
    beats = before.heartbeat is not None and now is not None and now != before.heartbeat
    return replace(before, heartbeat=now, beats=beats)
