"""A real vLLM behind a real Envoy: what the picker says of its answers is what the answers say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from serve_app.ports import free_port
from serve_app.service.picking import Picked
from tests.gateway import HOST, Envoy, Listener, Script, picker, until
from tests.helpers import eventually
from tests.vllm_server import MODEL, Vllm

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PORT = free_port()
TEXT = "The quick brown fox jumps over the lazy dog. " * 30
CHAT = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 3}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": TEXT, "max_tokens": 3},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 3},
    "/v1/messages": CHAT,
}


@pytest.fixture(scope="module")
def vllm(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    server = Vllm(model_path, tmp_path_factory.mktemp("vllm") / "log")
    eventually(server.is_up, 300)
    yield server
    if server.process.poll() is None:
        server.kill()


@pytest.fixture(scope="module")
def envoy(vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envoy]:
    addresses = [f"{HOST}:{free_port()}", f"{HOST}:{vllm.port}"]
    envoy = Envoy(tmp_path_factory.mktemp("envoy"), "envoy.yaml", addresses, PORT)
    eventually(envoy.is_ready, 20)
    yield envoy
    envoy.stop()


@pytest.fixture
async def script(vllm: Vllm) -> AsyncIterator[Script]:
    script = Script(Picked([f"{HOST}:{vllm.port}"]))
    async with picker(PORT, script):
        yield script


@pytest.mark.parametrize("listener", [Listener.AS_SHIPPED, Listener.FULL_DUPLEX])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_tokens_are_as_the_engine_counts_them(
    envoy: Envoy, script: Script, path: str, stream: bool, listener: Listener
) -> None:
    body = {"model": MODEL, "temperature": 0, "stream": stream, **BODIES[path]}
    if stream and "completions" in path:
        body["stream_options"] = {"include_usage": True}
    async with envoy.client(listener) as client:
        for _ in range(2):  # the second finds the first one's blocks
            answer = await client.post(path, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert json.loads(script.asked[-1].body or b"") == body
    await until(lambda: len(script.told) == 4)
    first, last = ([*told] for told in script.told[1::2])
    assert [told[0] for told in script.told] == ["first_token", "ended"] * 2
    assert [told[1] for told in script.told[::2]] == [asked.request_id for asked in script.asked]
    assert first[2] == last[2] == await prompt_tokens(envoy, path, body)
    assert 0 < last[3] < last[2]


async def prompt_tokens(envoy: Envoy, path: str, body: dict[str, Any]) -> int:
    """By the engine's answer in one piece; Anthropic's shape counts what was not cached."""
    whole = {name: value for name, value in body.items() if name != "stream_options"} | {"stream": False}
    async with envoy.client() as client:
        usage = (await client.post(path, json=whole, timeout=60)).json()["usage"]
    return int(usage.get("prompt_tokens") or usage["input_tokens"] + usage.get("cache_read_input_tokens", 0))
