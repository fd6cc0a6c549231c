"""What a node's replicas say of their shared domain -> one publisher of it, a real process -> Valkey -> mirror."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from serve_app.events.node_publishers import NodePublishers, of_domain
from serve_app.events.publisher import LMCacheStream, PublisherConfig
from serve_app.index.mirror import Mirror
from tests.engine import MODEL, SIZE, Engine
from tests.helpers import eventually

DOMAIN = "node:10.0.0.1:5555"
FORGET_AFTER_S = 3.0


@pytest.fixture
def config(tmp_path: Path, redis_url: str) -> Iterator[PublisherConfig]:
    """Of the domain; a vLLM event socket takes the LMCache server's place."""
    engine = Engine(tmp_path)
    yield PublisherConfig(redis_url, MODEL, DOMAIN, engine.endpoint, engine.replay_endpoint, block_size=SIZE)
    engine.stop()


@pytest.fixture
def publishers() -> Iterator[NodePublishers]:
    publishers = NodePublishers(FORGET_AFTER_S)
    yield publishers
    publishers.end()
    assert processes() == []


@pytest.fixture
def published(redis_url: str) -> Iterator[Callable[[], list[str]]]:
    """Tokenizers of the live records: by them the test tells configurations apart."""
    mirror = Mirror(redis_url, MODEL)
    mirror.start()
    assert mirror.wait_ready(5)
    yield lambda: [domain.spec.tokenizer for domain, live, _ in mirror.domains() if live]
    mirror.close()


def processes() -> list[int]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "serve_app.events" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
    return found


def test_the_newest_configuration_replaces_the_publisher_and_without_replicas_it_ends(
    publishers: NodePublishers, config: PublisherConfig, published: Callable[[], list[str]]
) -> None:
    old, new = (msgspec.structs.replace(config, tokenizer=name) for name in ("old", "new"))
    holds = {"replica-1": old}

    def is_published(expected: list[str]) -> bool:
        for pod, its_config in holds.items():
            publishers.hold(pod, its_config)
        publishers.keep()
        assert len(processes()) <= 1
        return published() == expected

    eventually(lambda: is_published(["old"]), 15)
    (first,) = processes()

    holds["replica-2"] = old  # one more replica needs no other publisher
    for _ in range(3):
        assert is_published(["old"])
    assert processes() == [first]

    holds["replica-3"] = new  # a rolling redeployment begins, and the old replicas are still there
    eventually(lambda: is_published(["new"]), 15)
    (second,) = processes()
    assert second != first
    for _ in range(3):
        assert is_published(["new"])
    assert processes() == [second]

    del holds["replica-3"]  # and is taken back
    eventually(lambda: is_published(["old"]), 15)

    holds.clear()
    eventually(lambda: is_published([]) and processes() == [], 15)


def test_a_publisher_that_ended_is_started_again(
    publishers: NodePublishers, config: PublisherConfig, published: Callable[[], list[str]]
) -> None:
    def is_published() -> bool:
        publishers.hold("replica", config)
        publishers.keep()
        return published() == [MODEL]

    eventually(is_published, 15)
    (first,) = processes()
    psutil.Process(first).kill()
    eventually(lambda: is_published() and processes() not in ([], [first]), 15)


def test_replicas_of_one_deployment_say_the_same_of_their_domain() -> None:
    """Each engine finds other room for its cache, and attaches from its own node: no reason to replace a publisher."""
    stream = LMCacheStream("org/model", 256)
    first, second = (
        of_domain(
            PublisherConfig(
                "redis://r", MODEL, pod, f"ipc://{pod}", f"ipc://{pod}-replay", "", 16, blocks, address=host
            ),
            DOMAIN,
            "tcp://127.0.0.1:5555",
            stream,
        )
        for pod, blocks, host in (("a", 1000, "10.0.0.1"), ("b", 1001, "10.0.0.2"))
    )
    assert first == second
    assert (first.pod, first.lmcache, first.replay_endpoint) == (DOMAIN, stream, None)
