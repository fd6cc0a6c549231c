"""A port for a server that we start: one that neither the kernel nor Ray gives to somebody else meanwhile."""

from __future__ import annotations

import random
import socket

_PORTS = (20_000, 29_999)  # above those of Ray's workers, below the kernel's and the replicas'


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now.

    Outside the range from which the kernel takes ports for outgoing connections: Ray's own processes make many of those
    before Serve binds this one.
    """
    while True:
        port = random.randint(*_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
