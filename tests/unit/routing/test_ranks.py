"""Data parallel ranks: from records to pods behind a replica, and from ranked pods back to replicas."""

from __future__ import annotations

from dataclasses import replace

from serve_app.routing.ranks import Ranks
from serve_app.types import Domain, PodId, pod_of_rank
from tests.helpers import pod

A, B = PodId("a"), PodId("b")


def rank(replica: str, number: int) -> Domain:
    return replace(pod(pod_of_rank(replica, number)), rank=number, replica=replica)


def test_a_replica_stands_for_itself_until_its_ranks_are_known() -> None:
    ranks = Ranks()
    assert not ranks
    assert list(ranks.pods(A)) == [A]
    assert ranks.replica(A) == A
    assert ranks.rank(A) is None


def test_ranks_are_in_their_order_whatever_the_order_of_the_records() -> None:
    ranks = Ranks()
    ranks.learn([rank("a", 10), rank("b", 1), rank("a", 9), rank("a", 0)])
    ranks.learn([rank("a", 9), rank("b", 0)])
    assert ranks.pods(A) == ["a#0", "a#9", "a#10"]
    assert ranks.pods(B) == ["b#0", "b#1"]
    assert [(ranks.replica(one), ranks.rank(one)) for one in ranks.pods(A)] == [(A, 0), (A, 9), (A, 10)]


def test_the_best_rank_speaks_for_its_replica() -> None:
    ranks = Ranks()
    ranks.learn([rank("a", 0), rank("a", 1), rank("b", 0), rank("b", 1)])
    plain = PodId("c")
    best = ranks.best([PodId("b#1"), PodId("a#0"), PodId("b#0"), plain, PodId("a#1")])
    assert list(best.items()) == [(B, "b#1"), (A, "a#0"), (plain, plain)]


def test_a_rank_whose_publisher_has_gone_still_takes_requests() -> None:
    ranks = Ranks()
    ranks.learn([rank("a", 0), rank("a", 1)])
    ranks.learn([rank("a", 0)])
    assert ranks.pods(A) == ["a#0", "a#1"]


def test_ranks_go_with_their_replica() -> None:
    ranks = Ranks()
    ranks.learn([rank("a", 0), rank("a", 1), rank("b", 0)])
    ranks.keep_only([B])
    assert list(ranks.pods(A)) == [A]
    assert ranks.rank(PodId("a#1")) is None
    assert ranks.pods(B) == ["b#0"]
    ranks.learn([rank("a", 0)])  # it is back
    assert ranks.pods(A) == ["a#0"]


def test_a_member_of_a_gang_is_its_replica_and_is_told_nothing() -> None:
    ranks = Ranks()
    ranks.learn([replace(pod("a"), rank=3, replica="a")])
    assert not ranks
    assert list(ranks.pods(A)) == [A]
    assert ranks.rank(A) is None


def test_records_without_a_replica_are_no_ranks() -> None:
    ranks = Ranks()
    ranks.learn([pod("a"), replace(pod("b"), rank=1), replace(rank("a", 0), pod=None)])
    assert not ranks
