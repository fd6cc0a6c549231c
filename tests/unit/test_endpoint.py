"""What people are told of an engine's address: at once if it is none, later if nobody is there."""

from __future__ import annotations

import pytest
from vllm.distributed.kv_events import ZmqEventPublisher

from serve_app.errors import ConfigError
from serve_app.events.endpoint import SILENT_AFTER_S, SilenceWatch, check_endpoint, endpoint_of_rank

START_S = 1000.0


@pytest.mark.parametrize("endpoint", ["localhost:5557", "tcp://*:5557", "tcp://localhost", "http://localhost:5557", ""])
def test_what_is_no_address_is_refused_by_the_name_of_its_option(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"--engine '.*' is no address .* write tcp://HOST:PORT"):
        check_endpoint(endpoint, "--engine")


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5557", "tcp://not.there.example:5557", "ipc:///tmp/not-there"])
def test_an_address_need_not_be_anybodys_yet(endpoint: str) -> None:
    check_endpoint(endpoint, "--engine")


def test_a_silence_is_told_once_and_the_next_one_again() -> None:
    watch = SilenceWatch("absent", "mute", START_S)

    def told(after_s: float, connected: bool, understood: bool) -> str:
        return watch.missing(START_S + after_s, connected=connected, understood=understood)

    assert told(SILENT_AFTER_S - 0.1, False, False) == ""
    assert told(SILENT_AFTER_S, False, False) == "absent"
    assert told(60, False, False) == ""
    assert told(61, True, False) == ""
    assert told(61 + SILENT_AFTER_S, True, False) == "mute"
    assert told(90, True, False) == ""
    assert told(91, True, True) == told(1000, True, True) == ""
    assert told(1001, False, True) == ""  # the engine is restarted, quickly ...
    assert told(1002, True, True) == told(1010, True, True) == ""
    assert told(2000, False, True) == ""  # ... and then it does not come back
    assert told(2000 + SILENT_AFTER_S, False, True) == "absent"


ENDPOINTS = ["tcp://*:5557", "tcp://127.0.0.1:5557", "tcp://[::ffff:127.0.0.1]:5557"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_ranks_are_where_vllm_puts_them(endpoint: str) -> None:
    for rank in (0, 1, 2, 17):
        assert endpoint_of_rank(endpoint, rank) == ZmqEventPublisher.offset_endpoint_port(endpoint, rank)


@pytest.mark.parametrize("endpoint", ["ipc:///tmp/events", "tcp://host", "inproc://events"])
def test_where_vllm_gives_ranks_no_port_is_said_so(endpoint: str) -> None:
    assert endpoint_of_rank(endpoint, 0) == endpoint
    with pytest.raises(ConfigError, match="port \\+ n"):
        endpoint_of_rank(endpoint, 1)
