"""Ports in a row, while others take some."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from serve_app import ports
from serve_app.ports import free_ports


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Every third of 30 ports, which are all that there are, has a listener: on loopback or on all addresses."""
    first = 31_000 + random.randrange(500)
    monkeypatch.setattr(ports, "_PORTS", (first, first + 29))
    with ExitStack() as stack:
        held = set()
        for i, port in enumerate(range(first, first + 24, 3)):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1" if i % 2 else "0.0.0.0", port))
            listener.listen()
            held.add(port)
        yield held


def test_a_row_without_a_taken_one_is_found(taken: set[int]) -> None:
    for _ in range(20):
        assert not taken & set(free_ports(2))
    assert set(free_ports(8)) <= set(range(max(taken) + 1, max(taken) + 9))  # the only place for so many
