"""Redis: whether it answers, what it allows, and what it does with the index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from serve_app.doctor.facts import Facts, Finding, Level

CLOCK_S: Final = 1.0


def redis(facts: Facts) -> Iterator[Finding]:
    known = facts.redis
    if known is None:
        yield Finding("redis", Level.UNKNOWN, "no Redis was named", do="kvcache doctor --redis URL, or give a config")
        return
    if known.error:
        yield Finding(
            "redis",
            Level.ERROR,
            f"{known.url} does not answer: {known.error}",
            "nothing can be published, and routers see no cache",
            "start it, or correct the URL, its user and its password",
        )
        return
    if known.read_only:
        yield Finding(
            "redis rights",
            Level.ERROR,
            f"{known.url} is a replica, which nobody can write to",
            "nothing can be published",
            "name the primary, or the Sentinels (redis+sentinel://)",
        )
    if known.refused:
        yield Finding(
            "redis rights",
            Level.ERROR,
            f"this user may not send {', '.join(known.refused)}",
            "publishers and routers cannot work with these rights",
            "give it what cluster/redis/users.acl lists for kvcache-writer",
        )
    for wrong in known.wrong_types:
        yield Finding(
            "redis keys", Level.ERROR, wrong, "that model has no index", "delete that key; it is written again"
        )


def redis_memory(facts: Facts) -> Iterator[Finding]:
    known = facts.redis
    if known is None or known.error:
        return
    if not known.info:
        yield Finding("redis memory", Level.UNKNOWN, "this user may not send INFO", do="ask as an administrator")
        return
    policy, most = str(known.info.get("maxmemory_policy", "noeviction")), int(known.info.get("maxmemory", 0))
    if policy != "noeviction":
        yield Finding(
            "redis memory",
            Level.ERROR,
            f"maxmemory-policy {policy}",
            "Redis may drop a part of the index, which then is published again and again",
            "CONFIG SET maxmemory-policy noeviction, and in its configuration file",
        )
    if evicted := int(known.info.get("evicted_keys", 0)):
        yield Finding(
            "redis memory", Level.WARNING, f"{evicted} keys were evicted", "it was too small", "raise maxmemory"
        )
    if most and int(known.info.get("used_memory", 0)) > 0.9 * most:
        yield Finding(
            "redis memory",
            Level.WARNING,
            f"{known.info['used_memory'] / 2**20:.0f} of {most / 2**20:.0f} MiB are used",
            "when it is full, nothing more is published",
            "raise maxmemory: some 100 bytes for each block and replica",
        )


def redis_persistence(facts: Facts) -> Iterator[Finding]:
    known = facts.redis
    if known is None or known.error or not known.info:
        return
    if known.info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield Finding(
            "redis persistence",
            Level.ERROR,
            "its last save to disk failed",
            "Redis refuses writes then",
            "make room on its disk, or turn saving off: CONFIG SET save ''",
        )
    elif known.saves or int(known.info.get("aof_enabled", 0)):
        how = f"save {known.saves!r}" if known.saves else "an append-only file"
        yield Finding(
            "redis persistence",
            Level.WARNING,
            f"it writes to disk ({how})",
            "the index is a cache: that costs time, and an old snapshot is published anew anyway",
            "CONFIG SET save '' and appendonly no, if nothing else is stored there",
        )


def clock(facts: Facts) -> Iterator[Finding]:
    ahead_s = facts.redis.ahead_s if facts.redis is not None else None
    if ahead_s is not None and abs(ahead_s) > CLOCK_S:
        yield Finding(
            "clock",
            Level.WARNING,
            f"Redis' clock is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's",
            "routing does not compare clocks; times in receipts and logs do not fit together",
            "run NTP (chrony, systemd-timesyncd) on both",
        )
