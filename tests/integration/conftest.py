"""Whole servers for the integration tests, one per config and module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app import local_stack
from serve_app.cli import load_config
from serve_app.local_stack import free_port

CONFIGS = Path(__file__).parents[2] / "configs"

Start = Callable[..., local_stack.Running]


@pytest.fixture(scope="module")
def start_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a config as `kvcache up` does, on a free port and with state of its own; stopped after the module."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        def start(config: dict[str, Any], *, direct: bool) -> local_stack.Running:
            home = tmp_path_factory.mktemp("home")
            models = Path(local_stack.cache_home() / "models")
            models.mkdir(parents=True, exist_ok=True)
            (home / "models").symlink_to(models)  # built models are shared, run state is not
            patch.setenv("KVCACHE_HOME", str(home))
            running = local_stack.start(config, direct=direct, on_progress=print)
            stack.callback(local_stack.stop, running, on_progress=print)
            return running

        yield start


def config(name: str, **engine_kwargs: Any) -> dict[str, Any]:
    """A config of the repository, on a free port, with engine arguments put in."""
    loaded = copy.deepcopy(load_config(CONFIGS / name, port=free_port()))
    for app in loaded["applications"]:
        if "llm" in app.get("args", {}):
            app["args"]["llm"]["engine_kwargs"].update(engine_kwargs)
    return loaded
