"""What routers tell each other, and people, through a real Valkey."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import redis

from serve_app.blocks import KEY_BYTES
from serve_app.index import router_log
from serve_app.index.connection import connect
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.index.router_log import GONE_S, RouterLog, read_receipts
from serve_app.routing.chooser import Chooser
from serve_app.routing.desk import Desk
from serve_app.types import GPU, EncodedKeys, Epoch, Found, Routed, Served, Trust
from tests.helpers import MODEL, collected, eventually, following, keys, pod

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
        for log in logs:
            log.start()
        for mirror in mirrors:
            mirror.start()
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
        for log in logs:
            log.close()
        for mirror in mirrors:
            mirror.close()
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
    client = connect(redis_url, name="t")
    assert [msgspec.json.decode(one.receipt)["request_id"] for one in read_receipts(client, MODEL, 2)] == ["2", "1"]
    first = read_receipts(client, MODEL, 3)[-1]
    assert [msgspec.json.decode(one.receipt)["request_id"] for one in read_receipts(client, MODEL, 9, first.id)] == [
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
    eventually(lambda: collected(got, mirror.served))
    assert got == [(A.pod, (served,))]
    assert mirror.served() == []
    assert mirror.load(A.pod).in_flight == 3  # type: ignore[union-attr, arg-type]
    mirror.close()
    writer.close()


def test_whose_predictions_do_not_hold_is_known_to_all_until_they_do(redis_url: str) -> None:
    writer = RedisWriter(redis_url, MODEL)
    log, second = (RouterLog(redis_url, MODEL, name) for name in ("one", "two"))
    assert A.pod is not None

    def beat() -> bool:
        writer.heartbeat(A.id, HeartbeatRecord(A.epoch))
        return True

    writer.join(A)
    writer.flush()
    beat()
    with following(redis_url, MODEL) as other:
        try:
            log.start()
            log.distrust({A.pod: (A.epoch, "wrong tokenizer")})
            eventually(lambda: other.cause(A.id) == "wrong tokenizer")
            beat()
            assert other.trust(A.pod) is Trust.DEGRADED
            assert other.match(b"", [A.pod])[A.pod].trust is Trust.DEGRADED
            log.distrust({})
            eventually(lambda: beat() and other.cause(A.id) == "", 15)
            assert other.trust(A.pod) is Trust.EXACT
            log.distrust({A.pod: (Epoch(A.epoch - 1), "of a former life")})
            time.sleep(2.5)  # it is said every second
            assert other.cause(A.id) == ""
            second.start()
            second.distrust({A.pod: (A.epoch, "of this life")})  # what is said of another does not hide it
            eventually(lambda: other.cause(A.id) == "of this life")
            reborn = replace(A, epoch=Epoch(A.epoch + 1))
            writer.join(reborn)
            writer.flush()
            eventually(lambda: writer.heartbeat(A.id, HeartbeatRecord(reborn.epoch)) and other.cause(A.id) == "")
        finally:
            for each in (log, second):
                each.close()
            writer.close()


@pytest.mark.parametrize("off_s", [-30.0, 30.0])
def test_a_router_whose_clock_is_off_is_heard_and_does_not_drive_others_out(
    redis_url: str, off_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = [RouterLog(redis_url, MODEL, name) for name in ("one", "two")]
    announce, real = logs[1]._announce, time.time

    def with_its_clock() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("serve_app.index.router_log.time.time", lambda: real() + off_s)
            announce()

    monkeypatch.setattr(logs[1], "_announce", with_its_clock)
    try:
        for log in logs:
            log.start()
        eventually(lambda: all(log.shared for log in logs))
        until_s = time.monotonic() + 2 * GONE_S
        while time.monotonic() < until_s:
            assert all(log.shared for log in logs)
            time.sleep(0.2)
        logs[1].close()
        eventually(lambda: not logs[0].shared, 2 * GONE_S)  # and is missed when it is gone
    finally:
        for log in logs:
            log.close()


@pytest.mark.parametrize("off_s", [-30.0, 30.0])
def test_a_publisher_whose_clock_is_off_begins_a_newer_life(
    redis_url: str, off_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, real = RedisWriter(redis_url, MODEL), time.time_ns
    first = writer.next_epoch(A.id)
    writer.join(replace(A, epoch=first))
    writer.flush()
    with monkeypatch.context() as patch:
        patch.setattr("serve_app.index.redis_writer.time.time_ns", lambda: real() + int(off_s * 1e9))
        second = writer.next_epoch(A.id)
        assert second > first
        writer.join(replace(A, epoch=second))
        writer.flush()
    third = writer.next_epoch(A.id)  # and so does one on another machine
    assert third > second
    writer.join(replace(A, epoch=third))
    writer.add(A.id, third, GPU, keys(1))
    writer.flush()
    with following(redis_url, MODEL) as mirror:
        a = A.pod
        assert a is not None
        writer.heartbeat(A.id, HeartbeatRecord(third))
        eventually(lambda: mirror.match(keys(1), [a])[a].total_tokens > 0)
        assert mirror.lag_s < 5  # by whatever clock
    writer.close()


def test_one_item_that_cannot_be_taken_in_costs_no_other(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A mirror lets nothing through that it knows to be wrong; this is of the kind that nobody has thought of."""
    mirror = Mirror(redis_url, MODEL)
    chooser = Chooser(mirror.held)
    desk = Desk(mirror, chooser, "one")
    assert A.pod is not None
    good = Routed(A.pod, keys(*range(10)), 40, time.monotonic())
    bad = Routed(A.pod, None, 40, time.monotonic())  # type: ignore[arg-type]
    for route in (bad, good, bad):
        mirror._routed.append(("two", route))
    assert desk.catch_up([A.pod]) == []
    assert chooser.ledger.queued_tokens(A.pod) == 40
    assert desk.counters["skipped_items"] == 2
    assert len(caplog.records) == 1


def test_an_item_that_cannot_be_written_does_not_end_the_log(
    redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_log, "ANNOUNCE_S", 0.05)
    log = RouterLog(redis_url, MODEL, "one")
    log.start()
    reader = connect(redis_url, name="t")

    def until(receipt: object, done: Callable[[], bool]) -> None:
        """What is given to the log while it deals with an error is dropped, so it is said again."""

        def said() -> bool:
            log.receipt(receipt)  # type: ignore[arg-type]
            return done()

        eventually(said)

    for errors in (1, 2):
        until(object(), lambda errors=errors: log.counters["errors"] >= errors)  # type: ignore[misc]
    until(b"{}", lambda: b"{}" in [one.receipt for one in read_receipts(reader, MODEL, 9)])
    log.close()
    said = [record for record in caplog.records if record.name == router_log.__name__]
    assert len([record for record in said if record.levelno >= logging.WARNING]) == 1
