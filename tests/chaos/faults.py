"""What breaks, and how it is mended: functions that return once it is, with the time when it began."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from tests.chaos.target import Target

SNAPSHOT = "snapshot.rdb"


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    happen: Callable[[Target], float]
    cuts: bool = False  # requests that are in flight when it begins may fail: they were on the part that dies
    waits_s: float = 30.0  # how long a request may take at most, for it waits for a part that stands still
    heals_s: float = 30.0  # after it is mended, everything is right again within this time
    needs: str = "redis"  # what must be there: redis, or lmcache


def _lasting(seconds: float) -> None:
    time.sleep(seconds)


def _redis_killed(target: Target) -> float:
    began_s = time.monotonic()
    target.server.kill()
    _lasting(5)
    target.server.start()
    return began_s


def _redis_stopped(target: Target) -> float:
    began_s = time.monotonic()
    target.server.send(signal.SIGSTOP)
    _lasting(10)
    target.server.send(signal.SIGCONT)
    return began_s


def _redis_cut(target: Target) -> float:
    began_s = time.monotonic()
    target.proxy.cut()
    _lasting(10)
    target.proxy.heal()
    return began_s


def _redis_silent(target: Target) -> float:
    began_s = time.monotonic()
    target.proxy.silence()
    _lasting(10)
    target.proxy.heal()
    return began_s


def _redis_slow(target: Target) -> float:
    began_s = time.monotonic()
    target.proxy.delay_s = 1.5
    _lasting(10)
    target.proxy.delay_s = 0.0
    return began_s


def _redis_flushed(target: Target) -> float:
    began_s = time.monotonic()
    with target.server.client() as client:
        client.flushall()
    return began_s


def _redis_full(target: Target) -> float:
    began_s = time.monotonic()
    with target.server.client() as client:
        client.config_set("maxmemory", "1mb")
        _lasting(10)
        client.config_set("maxmemory", "0")
    return began_s


def _redis_disk_full(target: Target) -> float:
    """A snapshot that cannot be written: Valkey then refuses to write at all (MISCONF)."""
    began_s = time.monotonic()
    blocker = target.server.folder / SNAPSHOT
    blocker.mkdir()  # a folder in the file's place: root may write everywhere else
    with target.server.client() as client:
        client.config_set("save", "3600 1")
        client.bgsave()
        _lasting(10)
        assert client.info("persistence")["rdb_last_bgsave_status"] == "err"
        client.config_set("save", "")
    blocker.rmdir()
    return began_s


def _redis_password(target: Target) -> float:
    began_s = time.monotonic()
    with target.server.client() as client:
        client.config_set("requirepass", "changed")
        client.client_kill_filter(_type="normal", skipme=True)
        _lasting(10)
        client.config_set("requirepass", "")
    return began_s


def _killed(part: str) -> Callable[[Target], float]:
    def happen(target: Target) -> float:
        process = target.first(part)
        began_s = time.monotonic()
        process.send_signal(signal.SIGKILL)
        return began_s

    return happen


def _all_killed(part: str) -> Callable[[Target], float]:
    def happen(target: Target) -> float:
        began_s = time.monotonic()
        for process in target.all(part):
            process.send_signal(signal.SIGKILL)
        return began_s

    return happen


def _stopped(part: str) -> Callable[[Target], float]:
    def happen(target: Target) -> float:
        process = target.first(part)
        began_s = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        _lasting(10)
        with contextlib.suppress(psutil.NoSuchProcess):  # Serve has ended it meanwhile
            process.send_signal(signal.SIGCONT)
        return began_s

    return happen


FAULTS = [
    Fault("Redis is killed, and comes back empty 5 s later", _redis_killed),
    Fault("Redis stands still for 10 s", _redis_stopped),
    Fault("network to Redis is cut for 10 s", _redis_cut),
    Fault("network to Redis drops everything for 10 s", _redis_silent),
    Fault("network to Redis is slow (answers take 1.5 s) for 10 s", _redis_slow),
    Fault("FLUSHALL", _redis_flushed),
    Fault("Redis at its maxmemory for 10 s", _redis_full),
    Fault("Redis' disk is full for 10 s", _redis_disk_full),
    Fault("Redis' password is another for 10 s", _redis_password),
    Fault("one of two routers is killed", _killed("IngressRouter"), heals_s=60),
    Fault("one of two routers stands still for 10 s", _stopped("IngressRouter"), heals_s=60),
    Fault("both routers are killed", _all_killed("IngressRouter"), heals_s=60),
    Fault("publisher is killed", _killed("publisher")),
    Fault("publisher stands still for 10 s", _stopped("publisher")),
    Fault("BlockIndex (a mirror) is killed", _killed("BlockIndex"), heals_s=60),
    Fault("BlockIndex stands still for 10 s", _stopped("BlockIndex"), heals_s=60),
    Fault("Scorer (the score service) is killed", _killed("Scorer"), heals_s=60),
    Fault("PrefixStore is killed", _killed("PrefixStore"), heals_s=60),
    Fault("LMCache's server is killed", _killed("lmcache"), heals_s=60, needs="lmcache"),
    Fault("LMCache's server stands still for 10 s", _stopped("lmcache"), heals_s=60, needs="lmcache"),
    Fault("replica stands still for 10 s", _stopped("VLLMReplica"), heals_s=240),
    Fault("replica is killed", _killed("VLLMReplica"), cuts=True, heals_s=300),
]
