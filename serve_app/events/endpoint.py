"""Addresses of engines' sockets: those of ranks, whether one can be connected to, what to say when nobody is there."""

from __future__ import annotations

import zmq

from serve_app.errors import ConfigError

SILENT_AFTER_S = 5.0
_WANTED = "tcp://HOST:PORT or ipc://PATH, with the engine's host and not the `*` that it listens on"


def check_endpoint(endpoint: str, option: str, wanted: str = _WANTED) -> None:
    """That ZeroMQ takes it as an address to connect to.

    Args:
        endpoint: the address.
        option: where it was given, for the message.
        wanted: what to write there instead.

    Raises:
        ConfigError: it does not.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = context.socket(zmq.SUB)
    try:
        socket.connect(endpoint)  # only begins to, in the background
    except zmq.ZMQError as error:
        raise ConfigError(
            f"{option} {endpoint!r} is no address to connect to ({error.strerror}): write {wanted}"
        ) from error
    finally:
        socket.close(linger=0)


def endpoint_of_rank(endpoint: str, rank: int) -> str:
    """Where a data parallel rank publishes, by vLLM's rule (distributed/kv_events.py, `offset_endpoint_port`).

        tcp://host:5557, rank 2  ->  tcp://host:5559

    Args:
        endpoint: as `--kv-events-config` has it, so rank 0's.
        rank: from 0.

    Raises:
        ConfigError: vLLM gives a rank above 0 no socket there.
    """
    if rank == 0:
        return endpoint
    host, _, port = endpoint.rpartition(":")
    if not (endpoint.startswith("tcp://") and port.isdecimal()):
        raise ConfigError(
            f"data parallel ranks publish on tcp://HOST:PORT only, rank n on port + n; not on {endpoint!r}"
        )
    return f"{host}:{int(port) + rank}"


class SilenceWatch:
    """Says once what is missing, when for a while there is nothing to publish.

    Args:
        absent: what to say while nobody is at the endpoint.
        mute: what to say while somebody is, and nothing that was sent tells the block size.
        now_s: monotonic time.
    """

    def __init__(self, absent: str, mute: str, now_s: float) -> None:
        self._absent, self._mute = absent, mute
        self._state = (False, False)
        self._since_s = now_s
        self._said = False

    def missing(self, now_s: float, *, connected: bool, understood: bool) -> str:
        """What to tell people now; mostly nothing.

        Args:
            now_s: monotonic time.
            connected: whether somebody is at the endpoint.
            understood: whether the block size is known.
        """
        if (connected, understood) != self._state:
            self._state, self._since_s, self._said = (connected, understood), now_s, False
        if self._said or (connected and understood) or now_s < self._since_s + SILENT_AFTER_S:
            return ""
        self._said = True
        return self._mute if connected else self._absent
