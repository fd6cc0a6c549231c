"""Choices that have not ended."""

from __future__ import annotations

import pytest

from serve_app.service import reservations as module
from serve_app.service.reservations import Reservation, Reservations
from serve_app.types import PodId


def one(pod: str, until_s: float = 100.0) -> Reservation:
    return Reservation("m", PodId(pod), 0.0, until_s)


def test_leases_end_by_themselves_whatever_their_order() -> None:
    known = Reservations()
    for name, until_s in (("long", 100.0), ("short", 5.0), ("longer", 200.0)):
        known.open(name, one("a", until_s))
    assert [name for name, _ in known.expire(50.0)] == ["short"]
    assert [name for name, _ in known.expire(150.0)] == ["long"]
    assert (len(known), known.expired) == (1, 2)
    assert known.end("short") is None


def test_choices_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_MAX", 3)
    known = Reservations()
    ended = [known.open(f"r{i}", one("a")) for i in range(5)]
    assert [name for some in ended for name, _ in some] == ["r0", "r1"]
    assert len(known) == 3


def test_the_same_id_again_ends_the_former() -> None:
    known = Reservations()
    known.open("r", one("a"))
    assert known.open("r", one("b")) == [("r", one("a"))]
    assert known.end("r") == one("b")


def test_the_first_token_comes_once() -> None:
    known = Reservations()
    known.open("r", one("a"))
    known.first_token("r", 3.0)
    known.first_token("r", 9.0)
    known.first_token("nobody", 1.0)
    found = known.get("r")
    assert found is not None
    assert found.first_token_at_s == 3.0
