"""Ports for servers that we start: such as neither the kernel nor Ray gives to somebody else meanwhile."""

from __future__ import annotations

import ipaddress
import random
import socket

_PORTS = (20_000, 29_999)  # above those of Ray's workers, below the kernel's and the replicas'


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    return free_ports(1)[0]


def free_ports(count: int) -> range:
    """So many ports in a row, on none of which somebody listens now, on 127.0.0.1 or on all addresses.

    Outside the range from which the kernel takes ports for outgoing connections: Ray's own processes make many of those
    before Serve binds these.
    """
    first, last = _PORTS
    while True:
        start = random.randint(first, last - count + 1)
        ports = range(start, start + count)
        if all(map(_is_free, ports)):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def is_loopback(host: str) -> bool:
    """A name other than localhost counts as reachable: what it means can change."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in ("", "localhost")
