"""What routers tell each other, and people, through a real Valkey."""

from __future__ import annotations

import threading
import time

import msgspec
import redis

from serve_app.blocks import KEY_BYTES
from serve_app.index.connection import connect
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.index.router_log import RouterLog, read_receipts
from serve_app.routing.chooser import Chooser
from serve_app.routing.desk import Desk
from serve_app.types import EncodedKeys, Found, Routed, Served
from tests.helpers import MODEL, eventually, keys, pod

A, B = pod("a"), pod("b")


def test_two_routers_know_of_each_others_requests(redis_url: str) -> None:
    """One sends a new prompt to a pod; the other then expects it there, and knows of the queue."""
    writer = RedisWriter(redis_url, MODEL)
    for domain in (A, B):
        writer.join(domain)
    writer.flush()
    for domain in (A, B):
        writer.heartbeat(domain.id, HeartbeatRecord(domain.epoch))
    logs = [RouterLog(redis_url, MODEL, name) for name in ("one", "two")]
    mirrors = [Mirror(redis_url, MODEL) for _ in range(2)]
    choosers = [Chooser(mirror.held) for mirror in mirrors]
    desks = [Desk(m, c, name) for m, c, name in zip(mirrors, choosers, ("one", "two"), strict=True)]
    try:
        for thread in (*logs, *mirrors):
            thread.start()
        eventually(lambda: all(log.shared for log in logs))
        eventually(lambda: all(len(mirror.pods()) == 2 for mirror in mirrors))
        assert A.pod is not None
        assert B.pod is not None
        prompt = keys(*range(400))
        found = Found([EncodedKeys(prompt, 1600, 0)], [mirrors[0].match(prompt, [A.pod, B.pod])], A.spec.block_size)
        choice = choosers[0].choose([A.pod, B.pod], found, time.monotonic())
        chosen = choice.ranked[0]
        for route in choosers[0].route(choosers[0].sent(chosen, found, choice, time.monotonic()), found):
            assert len(route.keys) == 400 * KEY_BYTES
            logs[0].routed(route)

        def known() -> bool:
            desks[1].catch_up(())
            return choosers[1].ledger.queued_tokens(chosen) == 1600

        eventually(known)
        desks[0].catch_up(())
        assert choosers[0].ledger.queued_tokens(chosen) == 1600  # its own route came back and was not counted again
        assert choosers[1].choose([A.pod, B.pod], found, time.monotonic()).ranked[0] == chosen
    finally:
        for thread in (*logs, *mirrors):
            thread.close()
        writer.close()


def test_a_router_that_is_alone_writes_no_routes(redis_url: str) -> None:
    log = RouterLog(redis_url, MODEL, "one")
    log.start()
    log.routed(Routed(pod("a").pod or "", keys(1), 4))  # type: ignore[arg-type]
    log.receipt(b"{}")
    eventually(lambda: log.counters["receipts"] == 1)
    assert log.counters["routes"] == 0
    log.close()


def test_receipts_come_back_newest_first(redis_url: str) -> None:
    log = RouterLog(redis_url, MODEL, "one")
    log.start()
    for i in range(3):
        log.receipt(msgspec.json.encode({"request_id": str(i)}))
    eventually(lambda: log.counters["receipts"] == 3)
    log.close()
    assert [
        msgspec.json.decode(one)["request_id"] for one in read_receipts(connect(redis_url, name="t"), MODEL, 2)
    ] == [
        "2",
        "1",
    ]


def test_without_the_right_to_write_a_router_goes_on_alone(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as admin:
        admin.acl_setuser(
            "looker", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@read", "+ping", "+client"]
        )
    log = RouterLog(redis_url.replace("redis://", "redis://looker:pw@"), MODEL, "one")
    log.start()
    log.receipt(b"{}")
    eventually(lambda: log.counters["errors"] > 0)
    assert not log.shared
    log.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kvcache-router-log"]


def test_figures_of_served_requests_arrive_once(redis_url: str) -> None:
    writer = RedisWriter(redis_url, MODEL)
    writer.join(A)
    writer.flush()
    mirror = Mirror(redis_url, MODEL)
    mirror.start()
    assert mirror.wait_ready(5)
    served = Served("cmpl-x-0", 1000, 320, 0.01, 0.25)
    writer.report_load(A.id, A.epoch, 3, [served])
    writer.flush()
    got: list[tuple[object, object]] = []
    eventually(lambda: bool(got.extend(mirror.served()) or got))
    assert got == [(A.pod, (served,))]
    assert mirror.served() == []
    assert mirror.load(A.pod).in_flight == 3  # type: ignore[union-attr, arg-type]
    mirror.close()
    writer.close()
