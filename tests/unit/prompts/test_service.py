"""Cold text: tokenized once whoever asks, late tokens do not hold up a decision and are there for the next."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import PromptError
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.service import LIGHT_IDS, MAX_PREPARING, PromptService, is_light
from serve_app.prompts.tokenizer import Segment, Tokenizer
from serve_app.types import EncodedKeys, EngineSpec, ModelId, TokenizerSource

MODEL = ModelId("m")
KNOWN, DOCUMENT = "You are a helpful assistant. " * 20, "The river rose in the night. " * 200


class Elsewhere:
    """The real tokenizer behind a gate, as a deployment that is slow; it notes what it was asked."""

    def __init__(self, source: str) -> None:
        self._tokenizer = Tokenizer(source)
        self.asked: list[str] = []
        self.open = asyncio.Event()
        self.fails = False

    async def __call__(self, source: TokenizerSource, segments: Sequence[Segment]) -> list[bytes]:
        self.asked += [segment.text for segment in segments]
        await self.open.wait()
        if self.fails:
            raise ConnectionError("the deployment is gone")
        return self._tokenizer.encode_segments(segments)


def chat(*texts: str) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text} for text in texts]}


@pytest.fixture
def spec(chatml_path: str) -> EngineSpec:
    return EngineSpec(MODEL, 16, chatml_path)


@pytest.fixture
def elsewhere(chatml_path: str) -> Elsewhere:
    return Elsewhere(chatml_path)


def expected(spec: EngineSpec, body: dict[str, Any]) -> EncodedKeys:
    (prompt,) = PromptEncoder(spec, PrefixStore(0)).encode(body)
    return EncodedKeys(prompt.block_keys, prompt.token_count, 0)


async def test_threads_give_the_same_keys(spec: EngineSpec) -> None:
    service = PromptService(PrefixStore(10**7))
    assert await service.encode(chat(DOCUMENT), spec) == [expected(spec, chat(DOCUMENT))]


async def test_late_tokens_are_there_for_the_next_request(spec: EngineSpec, elsewhere: Elsewhere) -> None:
    service = PromptService(PrefixStore(10**7), elsewhere, deadline_s=0.05)
    await service.encoder(spec)
    (first,) = await service.encode(chat(KNOWN), spec)  # short: on the spot
    assert first.complete
    assert elsewhere.asked == []

    (late,) = await service.encode(chat(KNOWN, DOCUMENT), spec)
    whole = expected(spec, chat(KNOWN, DOCUMENT))
    assert not late.complete
    assert 0 < len(late.keys) < len(whole.keys)
    assert whole.keys.startswith(late.keys)
    assert late.known_token_count < late.token_count

    elsewhere.open.set()
    await asyncio.sleep(0.05)
    (now,) = await service.encode(chat(KNOWN, DOCUMENT), spec)
    assert (now.keys, now.token_count, now.complete) == (whole.keys, whole.token_count, True)
    assert now.known_token_count == now.token_count


async def test_many_short_prompts_are_one_long_cold_text(spec: EngineSpec, elsewhere: Elsewhere) -> None:
    service = PromptService(PrefixStore(10**7), elsewhere, deadline_s=0.01)
    await service.encoder(spec)
    prompts = [f"{n} {KNOWN}" for n in range(20)]  # 600 characters each, which alone would not go elsewhere
    keys = await service.encode({"prompt": prompts}, spec)
    assert elsewhere.asked == prompts
    assert {prompt.incomplete for prompt in keys} == {"tokens_late"}


async def test_the_same_cold_text_is_tokenized_once(spec: EngineSpec, elsewhere: Elsewhere) -> None:
    service = PromptService(PrefixStore(10**7), elsewhere)
    bodies = [chat(DOCUMENT, question) for question in ("Why?", "When?", "Why?", "Where?" * 100)]
    await service.encoder(spec)
    requests = [asyncio.create_task(service.encode(body, spec)) for body in bodies]
    await asyncio.sleep(0.05)
    assert len(elsewhere.asked) > 2
    elsewhere.open.set()
    for body, request in zip(bodies, requests, strict=True):
        (got,) = await request
        assert (got.keys, got.token_count) == (expected(spec, body).keys, expected(spec, body).token_count)
    assert len(elsewhere.asked) == len(set(elsewhere.asked))
    assert sum(map(len, elsewhere.asked)) < 2 * len(DOCUMENT)


async def test_beyond_so_much_pending_text_the_known_prefix_decides(spec: EngineSpec, elsewhere: Elsewhere) -> None:
    service = PromptService(PrefixStore(10**7), elsewhere, deadline_s=0.01, max_pending_chars=15_000)
    await service.encoder(spec)
    await service.encode(chat(KNOWN), spec)
    documents = [f"Document {n}. {DOCUMENT}" for n in range(4)]  # 6,000 characters each
    prompts = [(await service.encode(chat(KNOWN, document), spec))[0] for document in documents]
    assert [prompt.incomplete for prompt in prompts] == [
        "tokens_late",
        "tokens_late",
        "tokenizer_busy",
        "tokenizer_busy",
    ]
    assert prompts[3].keys == prompts[0].keys != b""
    assert sum(map(len, elsewhere.asked)) < 15_000

    (same,) = await service.encode(chat(KNOWN, documents[0]), spec)  # on its way already: nothing to take on
    assert same.incomplete == "tokens_late"

    elsewhere.open.set()
    for _ in range(100):  # there is room again, as soon as this machine gets to it
        await asyncio.sleep(0.01)
        (prompt,) = await service.encode(chat(KNOWN, documents[3]), spec)
        if prompt.complete:
            break
    assert (prompt.incomplete, prompt.keys) == ("", expected(spec, chat(KNOWN, documents[3])).keys)


async def test_one_text_of_any_length_is_taken_on_also_after_failures(spec: EngineSpec, elsewhere: Elsewhere) -> None:
    service = PromptService(PrefixStore(10**7), elsewhere, max_pending_chars=1)
    elsewhere.open.set()
    elsewhere.fails = True
    assert [prompt.incomplete for prompt in await service.encode(chat(DOCUMENT), spec)] == ["tokens_late"]
    elsewhere.fails = False
    assert await service.encode(chat(DOCUMENT), spec) == [expected(spec, chat(DOCUMENT))]


async def test_a_failure_leaves_what_is_known_and_is_tried_again(spec: EngineSpec, elsewhere: Elsewhere) -> None:
    service = PromptService(PrefixStore(10**7), elsewhere)
    elsewhere.open.set()
    elsewhere.fails = True
    assert [prompt.complete for prompt in await service.encode(chat(DOCUMENT), spec)] == [False]
    elsewhere.fails = False
    (prompt,) = await service.encode(chat(DOCUMENT), spec)
    assert prompt == expected(spec, chat(DOCUMENT))


async def test_with_a_deadline_nobody_waits_for_the_tokenizer(spec: EngineSpec) -> None:
    service = PromptService(PrefixStore(10**7), deadline_s=5)
    for _ in range(2):
        with pytest.raises(PromptError) as caught:
            await service.encode(chat(KNOWN), spec)
        assert caught.value.reason == "tokenizer_loading"
    await service.encoder(spec)  # the requests began to load it
    assert await service.encode(chat(KNOWN), spec) == [expected(spec, chat(KNOWN))]


@pytest.mark.parametrize("deadline_s", [None, 5.0])
async def test_a_tokenizer_that_cannot_be_loaded_is_tried_and_logged_once(
    deadline_s: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = PromptService(PrefixStore(10**7), deadline_s=deadline_s)
    spec = EngineSpec(MODEL, 16, str(tmp_path))  # an empty folder
    reasons = []
    with caplog.at_level(logging.ERROR, "serve_app"):
        for _ in range(3):
            with pytest.raises(PromptError) as caught:
                await service.encode(chat(KNOWN), spec)
            reasons.append(caught.value.reason)
            await asyncio.wait([service.encoder.start(spec)])
    assert reasons == ["tokenizer_loading" if deadline_s else "no_tokenizer", "no_tokenizer", "no_tokenizer"]
    assert [record.message for record in caplog.records if "cannot be loaded" in record.message] == [
        (
            f"kvcache: tokenizer {spec.tokenizer!r} cannot be loaded, so no request is scored; "
            "the first after 30 s tries again"
        )
    ]


HEAVY: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": f"line {n}"} for n in range(20_000)]},
    "tools": {
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [
            {"type": "function", "function": {"name": f"f{n}", "parameters": {"description": "x" * 40}}}
            for n in range(8_000)
        ],
    },
    "token ids": {"prompt": list(range(1_500_000))},
    "text": {"prompt": "The river rose in the night. " * 100_000},
    "prompts of many ids": {"prompt": [list(range(30_000)) for _ in range(50)]},
}


@pytest.mark.parametrize("body", HEAVY.values(), ids=HEAVY)
async def test_a_large_request_does_not_hold_the_loop(spec: EngineSpec, body: dict[str, Any]) -> None:
    service = PromptService(PrefixStore(10**8), deadline_s=5.0)
    await service.encoder(spec)
    assert not is_light(body)
    ticks, done = 0, asyncio.Event()

    async def others() -> None:
        nonlocal ticks
        while not done.is_set():
            await asyncio.sleep(0.005)
            ticks += 1

    watcher = asyncio.create_task(others())
    started_s = time.perf_counter()
    keys = await service.encode(body, spec)
    took_s = time.perf_counter() - started_s
    done.set()
    await watcher
    assert keys
    assert all(one.complete for one in keys)
    assert ticks >= took_s / 0.1 - 1  # the others had their turns meanwhile


async def test_no_more_large_requests_are_prepared_than_there_may_be(spec: EngineSpec) -> None:
    service = PromptService(PrefixStore(10**8), deadline_s=5.0)
    await service.encoder(spec)
    body = HEAVY["messages"]
    given_up = [asyncio.create_task(service.encode(body, spec)) for _ in range(MAX_PREPARING)]
    await asyncio.sleep(0)
    for task in given_up[1:]:  # who gives up does not make room: the work goes on
        task.cancel()
    with pytest.raises(PromptError) as refused:
        await service.encode(body, spec)
    assert refused.value.reason == "prepare_busy"
    assert (await service.encode(chat("short"), spec))[0].complete  # others are not kept
    await given_up[0]
    while service._preparing:  # noqa: ASYNC110  # a count, not an event
        await asyncio.sleep(0.01)
    assert (await service.encode(body, spec))[0].complete


def test_ordinary_requests_are_light() -> None:
    turns = [{"role": "user", "content": "x" * 600} for _ in range(400)]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
    assert is_light({"model": "m", "messages": turns, "tools": [tool] * 60})
    assert is_light({"model": "m", "prompt": "x" * 2**19})
    assert is_light({"model": "m", "prompt": list(range(LIGHT_IDS))})
    assert not is_light({"model": "m", "prompt": list(range(LIGHT_IDS + 1))})
    deep: Any = "end"
    for _ in range(10_000):
        deep = [deep]
    assert not is_light({"messages": deep})
