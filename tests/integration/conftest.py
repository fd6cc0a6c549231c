"""Whole servers for the integration tests, one per config and module."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serve_app import local_stack
from serve_app.commands.configs import load_config
from serve_app.config import REPLICA_HEADER
from serve_app.haproxy import TIMEOUT_VARIABLE
from serve_app.model import cache_home
from serve_app.ports import free_port

READY_TIMEOUT_S = 90.0
PROMPTS_IN_A_ROW = 6  # one in 32 that all of them have the same router
CONFIGS = Path(__file__).parents[2] / "configs"

Start = Callable[..., local_stack.Running]


@pytest.fixture(scope="module")
def start_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a config as `kvcache up` does, on a free port and with state of its own; stopped after the module."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        def start(config: dict[str, Any], *, direct: bool) -> local_stack.Running:
            home = tmp_path_factory.mktemp("home")
            models = Path(cache_home() / "models")
            models.mkdir(parents=True, exist_ok=True)
            (home / "models").symlink_to(models)  # built models are shared, run state is not
            patch.setenv("KVCACHE_HOME", str(home))
            # Engines, routers and the test share two cores: what is balanced plainly for a second's delay fails a test.
            patch.setenv(TIMEOUT_VARIABLE, "3")
            running = local_stack.start(config, direct=direct, on_progress=print)
            stack.callback(local_stack.stop, running, on_progress=print)
            shared = any("lmcache" in app.get("args", {}) for app in config["applications"])
            wait_until_routed_by_cache(running.url, shared=shared)
            return running

        yield start


def wait_until_routed_by_cache(url: str, *, shared: bool) -> None:
    """A router loads its tokenizer when the first replica has joined; until then requests go to the least loaded.

    Those alternate. So a new prompt that is answered three times by one replica, from its cache, was routed by it. (A
    prompt of an attempt that failed is no good any more: both replicas have it, and equal ones take turns.) With a
    `shared` tier any replica may answer the others, from its cache. Of two routers a prompt has one, so several prompts
    in a row must do.
    """
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        model = client.models.list().data[0].id

        def ask(text: str) -> tuple[str | None, bool]:
            raw = client.completions.with_raw_response.create(model=model, prompt=text, max_tokens=1)
            usage = raw.parse().usage
            details = usage.prompt_tokens_details if usage else None
            time.sleep(0.3)  # let the blocks reach the index
            return raw.headers.get(REPLICA_HEADER), bool(details and details.cached_tokens)

        deadline = time.monotonic() + READY_TIMEOUT_S
        right = 0
        for attempt in itertools.count():
            text = " ".join(
                f"The keeper of lighthouse {attempt} counted {i} ships before breakfast." for i in range(20)
            )
            (first, _), *others = [ask(text) for _ in range(2 if right else 3)]
            if others == [(first, True)] * len(others) or (shared and all(cached for _, cached in others)):
                right += 1
                if right == PROMPTS_IN_A_ROW:
                    return
                continue
            right = 0
            assert time.monotonic() < deadline, f"requests are not routed by cache: {first}, then {others}"


def config(name: str, **engine_kwargs: Any) -> dict[str, Any]:
    """A config of the repository, on a free port, with engine arguments put in."""
    loaded = copy.deepcopy(load_config(CONFIGS / name, port=free_port()))
    for app in loaded["applications"]:
        if "llm" in app.get("args", {}):
            app["args"]["llm"]["engine_kwargs"].update(engine_kwargs)
    return loaded
