"""A vLLM server that Ray does not manage, `kvcache publish` beside it: the index against the engine's own figures."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pydoc_data.topics import topics

import httpx
import pytest

from serve_app.index.mirror import Mirror
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.identity import PROBES
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import EngineSpec, Trust
from tests.helpers import eventually, following
from tests.vllm_server import ALIAS, BLOCK, MODEL, POD, SETTLE_S, Vllm

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def vllm(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    server = Vllm(model_path, tmp_path_factory.mktemp("vllm") / "log")
    eventually(server.is_up, 300)
    yield server
    if server.process.poll() is None:
        server.kill()


@pytest.fixture
def publish(vllm: Vllm, redis_url: str, model_path: str) -> Iterator[subprocess.Popen[bytes]]:
    process = vllm.publish(redis_url, model_path)
    yield process
    process.terminate()
    assert process.wait(10) == 0


@pytest.fixture
def mirror(redis_url: str) -> Iterator[Mirror]:
    with following(redis_url, MODEL) as mirror:
        yield mirror


@pytest.fixture(scope="module")
def encoder(model_path: str) -> PromptEncoder:
    return PromptEncoder(EngineSpec(MODEL, BLOCK, model_path), PrefixStore(1 << 24))


def test_the_index_predicts_the_engines_own_figure_under_eviction(
    vllm: Vllm, publish: subprocess.Popen[bytes], mirror: Mirror, encoder: PromptEncoder
) -> None:
    """More conversations than the cache holds, in random order: every prediction is right to the token."""
    dice = random.Random(7)
    texts = sorted(topics.values(), key=len)[-10:]
    histories: list[list[dict[str, str]]] = [[{"role": "system", "content": text[:4000]}] for text in texts]
    predicted, actual = [], []
    for turn in range(36):
        history = histories[dice.randrange(len(histories))]
        history.append({"role": "user", "content": f"Question {turn}?"})
        body = {"model": MODEL, "messages": history, "max_tokens": 4, "temperature": 0}
        (prompt,) = encoder.encode(body)
        if turn:  # the first prompt tells the block size
            eventually(lambda: mirror.trust(POD) is Trust.EXACT, 20)  # on a busy machine a heartbeat may be overdue
        match = mirror.match(prompt.block_keys, [POD])[POD]
        # vLLM never takes the whole prompt from its cache: the last token is computed, with its block.
        predicted.append(min(match.total_tokens, (prompt.token_count - 1) // BLOCK * BLOCK))
        prompt_tokens, cached_tokens = vllm.ask(body)
        assert prompt_tokens == prompt.token_count
        actual.append(cached_tokens)
        history.append({"role": "assistant", "content": "Yes."})
        time.sleep(SETTLE_S)
    assert predicted == actual
    assert sum(cached == 0 for cached in actual[10:]) > 2  # there was pressure
    assert sum(cached > 500 for cached in actual) > 5  # and there were hits
    ((domain, live, heartbeat),) = mirror.domains()
    assert live
    assert {part for part, _ in domain.spec.identity} == {f"probe:{name}" for name in PROBES}
    assert PromptEncoder(domain.spec, PrefixStore(1 << 20)).differing() == []
    assert heartbeat is not None
    assert (heartbeat.events_lost, heartbeat.events_skipped) == (0, {})


def test_salt_and_reset(vllm: Vllm, publish: subprocess.Popen[bytes], mirror: Mirror, encoder: PromptEncoder) -> None:
    """`cache_salt` separates keys as it separates vLLM's cache; /reset_prefix_cache empties the index.

    (vLLM sends the event of a reset with its next scheduler step, so with the next request.)
    """
    text = sorted(topics.values(), key=len)[-20][:2000]
    bodies = [
        {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 2, **salt}
        for salt in ({"cache_salt": "red"}, {"cache_salt": "blue"}, {})
    ]

    def matched() -> list[int]:
        return [mirror.match(encoder.encode(body)[0].block_keys, [POD])[POD].total_tokens for body in bodies]

    vllm.ask(bodies[0])
    eventually(lambda: matched()[0] > 300, 20)
    assert matched()[1:] == [0, 0]
    assert vllm.ask(bodies[1])[1] == 0
    assert httpx.post(f"{vllm.url}/reset_prefix_cache", timeout=30).status_code == 200
    assert vllm.ask(bodies[1])[1] == 0
    eventually(lambda: matched()[1] > 300 and matched()[::2] == [0, 0], 20)


def test_the_models_other_name(vllm: Vllm, publish: subprocess.Popen[bytes], mirror: Mirror) -> None:
    """Who knows the engine from Redis alone takes both names for one model."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "name " * 300}], "max_tokens": 2}
    vllm.ask(body)
    eventually(lambda: mirror.spec() is not None, 20)
    spec = mirror.spec()
    assert spec is not None
    (prompt,) = PromptEncoder(spec, PrefixStore(1 << 24)).encode(body | {"model": ALIAS})
    eventually(lambda: mirror.match(prompt.block_keys, [POD])[POD].total_tokens > 200, 20)
    assert vllm.ask(body | {"model": ALIAS})[1] == (prompt.token_count - 1) // BLOCK * BLOCK


def test_a_killed_engine_is_gone_from_the_index(
    vllm: Vllm, publish: subprocess.Popen[bytes], mirror: Mirror, encoder: PromptEncoder
) -> None:
    """Last in the module: it kills the server."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "word " * 300}], "max_tokens": 2}
    vllm.ask(body)
    eventually(lambda: mirror.match(encoder.encode(body)[0].block_keys, [POD])[POD].total_tokens > 200, 20)
    vllm.kill()
    eventually(lambda: mirror.pods() == [], 5)
