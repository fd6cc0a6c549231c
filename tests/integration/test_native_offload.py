"""A real vLLM with native CPU offload, two tenants with salts, and eviction from both tiers: predicted against reused.

vLLM 0.29 runs its CPU offload only beside a GPU; tests/cpu_offload.py lets it run here.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from serve_app.audit.layouts import build_layout
from serve_app.index.mirror import Mirror
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import CPU, GPU, EngineSpec
from tests.helpers import eventually, following
from tests.vllm_server import BLOCK, MODEL, POD, SETTLE_S, Vllm

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CHUNK_BYTES = {"dense": 16384, "gemma3": 8192}  # keys and values of a block, in all layers of a group
CPU_CHUNKS = {"dense": 240, "gemma3": 1400}  # more than the GPU has, and less than is asked for


@pytest.fixture(scope="module", params=["dense, names only", "gemma3, self-describing"])
def vllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    layout, told = request.param.split(", ")
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "OnCPU",
            "spec_module_path": "tests.cpu_offload",
            "cpu_bytes_to_use": CPU_CHUNKS[layout] * CHUNK_BYTES[layout],
            "self_describing_kv_events": told == "self-describing",
        },
    }
    server = Vllm(
        str(build_layout(layout)),
        tmp_path_factory.mktemp("vllm") / "log",
        *("--load-format", "dummy", "--dtype", "float32", "--max-num-batched-tokens", "512"),
        *("--no-disable-hybrid-kv-cache-manager", "--kv-transfer-config", json.dumps(transfer)),
        *(() if layout == "dense" else ("--num-gpu-blocks-override", "400")),
        path=ROOT,
    )
    eventually(server.is_up, 300)
    yield server
    server.kill()


@pytest.fixture
def publish(vllm: Vllm, redis_url: str) -> Iterator[subprocess.Popen[bytes]]:
    process = vllm.publish(redis_url, str(build_layout("dense")))
    yield process
    process.terminate()
    assert process.wait(10) == 0


@pytest.fixture
def mirror(redis_url: str) -> Iterator[Mirror]:
    with following(redis_url, MODEL) as mirror:
        yield mirror


def test_both_tiers_are_known_for_each_tenant(vllm: Vllm, publish: subprocess.Popen[bytes], mirror: Mirror) -> None:
    encoder = PromptEncoder(EngineSpec(MODEL, BLOCK, str(build_layout("dense"))), PrefixStore(1 << 24))
    eventually(lambda: bool(mirror.domains()) or vllm.ask(body_of("warm up " * 100, "nobody")) is None, 20)
    dice = random.Random(11)
    texts = [text[:1800] for text in sorted(topics.values(), key=len)[-14:]]
    predicted, actual, from_cpu = [], [], 0
    for _ in range(70):
        body = body_of(dice.choice(texts), dice.choice(["red", "blue"]))
        (prompt,) = encoder.encode(body)
        match = mirror.match(prompt.block_keys, [POD], prompt_tokens=prompt.token_count)[POD]
        predicted.append(min(match.total_tokens, (prompt.token_count - 1) // BLOCK * BLOCK))
        from_cpu += match.tokens.get(CPU, 0)
        prompt_tokens, cached_tokens = vllm.ask(body)
        assert prompt_tokens == prompt.token_count
        actual.append(cached_tokens)
        time.sleep(SETTLE_S)
    wrong = [(p, a) for p, a in zip(predicted, actual, strict=True) if abs(p - a) > BLOCK]
    assert wrong == []
    assert from_cpu > 5000  # the GPU has evicted, and the other tier has it
    assert sum(a == 0 for a in actual[40:]) > 2  # the other tier evicts too
    ((domain, _, heartbeat),) = mirror.domains()
    assert not domain.unindexed
    assert heartbeat is not None
    assert heartbeat.events_lost == 0
    other = encoder.encode(body_of(texts[0], "green"))[0]
    assert mirror.match(other.block_keys, [POD])[POD].tokens in ({}, {GPU: 0})  # nobody else's


def body_of(text: str, salt: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": 2, "temperature": 0, "cache_salt": salt}
