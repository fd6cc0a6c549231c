"""What the operator gives and what the engine says, put together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from serve_app.errors import ConfigError
from serve_app.events.discovery import Cache, EngineFacts, Models, Settings
from serve_app.events.plan import Given, address_of, with_server, without_server
from serve_app.events.publisher import PublisherConfig
from serve_app.events.server import EngineServer

MODELS = Models(("m", "alias"), "org/model", ("adapter",), 4096)
IDENTITY = (("probe:text", "1"),)
EVENTS = Settings(events=True, endpoint="tcp://*:6000", replay_endpoint="tcp://*:6001", topic="kv")
FACTS = EngineFacts(MODELS, "0.29.0", (0,), Cache(32, 160, True, "xxhash"), EVENTS, IDENTITY)


@pytest.fixture(autouse=True)
def no_pod_ip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POD_IP", raising=False)


def plan(url: str = "http://127.0.0.1:8000", facts: EngineFacts = FACTS, **given: Any) -> list[PublisherConfig]:
    server = EngineServer(url)
    try:
        return with_server(Given("redis://r", **given), server, facts)
    finally:
        server.close()


def facts(**more: Any) -> EngineFacts:
    told = {name: getattr(FACTS, name) for name in ("models", "version", "ranks", "cache", "settings", "identity")}
    return EngineFacts(**{**told, **more})


def test_what_the_engine_says_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_IP", "10.0.3.7")
    (config,) = plan()
    assert config == PublisherConfig(
        redis_url="redis://r",
        model="m",
        pod="10.0.3.7:8000",
        endpoint="tcp://127.0.0.1:6000",
        replay_endpoint="tcp://127.0.0.1:6001",
        topic="kv",
        block_size=32,
        block_size_is_learned=True,
        capacity=160,
        tokenizer="org/model",
        served_names=("alias",),
        hash_algorithm="xxhash",
        identity=IDENTITY,
        address="10.0.3.7:8000",
    )


def test_what_is_given_wins(caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {
        "engine": "tcp://10.0.0.9:7000",
        "replay": "tcp://10.0.0.9:7001",
        "pod": "gpu-7",
        "model": "alias",
        "address": "gpu-7.example:80",
        "topic": "t",
        "tokenizer": "/tokenizer",
        "tokenizer_mode": "slow",
        "revision": "abc",
        "capacity": 100,
        "hash_algorithm": "sha256",
        "served_names": ("third",),
        "offload_chunk_blocks": 2,
    }
    (config,) = plan(**given)
    renamed = {"engine": "endpoint", "replay": "replay_endpoint"}
    for name, value in given.items():
        if name != "served_names":
            assert getattr(config, renamed.get(name, name)) == value
    assert config.served_names == ("m", "third")
    said = "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "--capacity 100: the engine says 160" in said
    assert "--hash-algorithm sha256: the engine says xxhash" in said


@pytest.mark.parametrize(
    ("told", "given", "error"),
    [
        (facts(cache=Cache(32, 160, prefix_caching=False)), {}, "prefix caching is off at http://127.0.0.1:8000"),
        (facts(settings=Settings(events=False)), {}, "publishes no KV events: start vLLM with --kv-events-config"),
        (FACTS, {"block_size": 16}, "--block-size 16: the engine's blocks have 32 tokens"),
        (facts(ranks=(0, 1)), {"ranks": (2,)}, r"ranks \[2\] are wanted: .* has \[0, 1\]"),
        (FACTS, {"data_parallel_size": 2}, r"ranks \[0, 1\] are wanted: .* has \[0\]"),
    ],
)
def test_contradictions(told: EngineFacts, given: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        plan(facts=told, **given)


def test_a_block_size_that_is_right_is_no_guess() -> None:
    (config,) = plan(block_size=32)
    assert (config.block_size, config.block_size_is_learned) == (32, False)
    (config,) = plan(facts=facts(cache=Cache(1056, 160, match_unit=16)))
    assert (config.block_size, config.block_size_is_learned) == (16, False)


def test_an_engine_that_gives_no_metrics() -> None:
    (config,) = plan(facts=facts(cache=None), capacity=10)
    assert (config.block_size, config.capacity, config.hash_algorithm) == (0, 10, "sha256")


def test_a_hash_of_a_later_vllm(caplog: pytest.LogCaptureFixture) -> None:
    (config,) = plan(facts=facts(cache=Cache(32, 160, hash_algorithm="blake9")))
    assert config.hash_algorithm == "sha256"
    assert "'blake9' is none of vLLM's" in caplog.text


def test_usual_ports_without_a_word_of_the_engines() -> None:
    (config,) = plan("http://10.0.0.1:8000", facts(settings=Settings(events=True)))
    assert (config.endpoint, config.replay_endpoint) == ("tcp://10.0.0.1:5557", None)


def test_each_rank_is_a_pod() -> None:
    configs = plan(facts=facts(ranks=(2, 3)), pod="p")
    assert [(c.pod, c.replica, c.rank, c.endpoint[-4:], (c.replay_endpoint or "")[-4:]) for c in configs] == [
        ("p#2", "p", 2, "6002", "6003"),
        ("p#3", "p", 3, "6003", "6004"),
    ]
    (only,) = plan(facts=facts(ranks=(2, 3)), pod="p", ranks=(3,))
    assert only == configs[1]


def test_a_server_of_one_rank_is_a_pod_whose_ports_are_the_ranks() -> None:
    (config,) = plan(facts=facts(ranks=(3,)), pod="p")
    assert (config.pod, config.rank, config.endpoint, config.replay_endpoint) == (
        *("p", None),
        *("tcp://127.0.0.1:6003", "tcp://127.0.0.1:6004"),
    )


@pytest.mark.parametrize(
    ("url", "given", "ip", "expected"),
    [
        ("http://localhost:8000", "", "10.0.3.7", "10.0.3.7:8000"),
        ("http://127.0.0.1:8000/v1", "", "fd00::7", "[fd00::7]:8000"),
        ("http://0.0.0.0", "", "10.0.3.7", "10.0.3.7:80"),
        ("http://[::1]:8000", "", "", "this-host:8000"),
        ("http://vllm.example:8000", "", "10.0.3.7", "vllm.example:8000"),
        ("https://vllm.example", "", "", "vllm.example:443"),
        ("http://127.0.0.1:8000", "gpu-7", "10.0.3.7", "gpu-7:8000"),
        ("http://127.0.0.1:8000", "gpu-7:80", "10.0.3.7", "gpu-7:80"),
        ("http://127.0.0.1:8000", "[fd00::7]:80", "", "[fd00::7]:80"),
        ("http://127.0.0.1:8000", "[fd00::7]", "", "[fd00::7]:8000"),
    ],
)
def test_where_clients_reach_it(monkeypatch: pytest.MonkeyPatch, url: str, given: str, ip: str, expected: str) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "this-host")
    monkeypatch.setenv("POD_IP", ip)
    server = EngineServer(url)
    assert address_of(given, server) == expected
    server.close()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://", "ftp://host", "http://host:port", "tcp://h:1", "http://[::1"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match="--server"):
        EngineServer(url)


def test_without_a_server_all_is_as_given() -> None:
    given = Given("redis://r", engine="tcp://h:5557", pod="p", model="m", address="rack 7", tokenizer="t", topic="kv")
    assert without_server(given) == [
        PublisherConfig("redis://r", "m", "p", "tcp://h:5557", topic="kv", address="rack 7", tokenizer="t")
    ]


@pytest.mark.parametrize("missing", ["engine", "pod", "model"])
def test_without_a_server_the_engine_must_be_given(missing: str) -> None:
    given: dict[str, Any] = {"engine": "tcp://h:5557", "pod": "p", "model": "m", missing: ""}
    check: Callable[..., None] = Given("redis://r", **given).check
    check(discovers=True)
    with pytest.raises(ConfigError, match=f"--{missing} must be given, or --server URL"):
        check(discovers=False)


def test_a_config_survives_the_way_to_its_process() -> None:
    (config,) = plan()
    assert msgspec.json.decode(msgspec.json.encode(config), type=PublisherConfig) == config
