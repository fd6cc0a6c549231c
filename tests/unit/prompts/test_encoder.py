"""From a request to the keys of its blocks."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from tokenizers import Tokenizer

from serve_app.blocks import block_keys, namespace_key, pack_tokens, split_keys
from serve_app.errors import PromptError
from serve_app.prompts import encoder as encoder_module
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import EngineSpec, ModelId

MODEL = ModelId("m")
SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 20}


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [SYSTEM, *({"role": "user", "content": t} for t in texts)], **fields}


@pytest.fixture
def encoder(chatml_path: str) -> PromptEncoder:
    return PromptEncoder(EngineSpec(MODEL, 16, chatml_path), PrefixStore(10**7))


def test_chat(encoder: PromptEncoder, chatml_path: str) -> None:
    text = f"<|im_start|>system\n{SYSTEM['content']}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = Tokenizer.from_file(f"{chatml_path}/tokenizer.json").encode(text).ids
    (prompt,) = encoder.encode(chat("hi"))
    assert prompt.token_ids() == ids
    assert prompt.block_keys == block_keys(pack_tokens(ids), 16, namespace_key(MODEL, 16))


def test_next_turn_builds_on_the_last(encoder: PromptEncoder) -> None:
    (first,) = encoder.encode(chat("a " * 300))
    (second,) = encoder.encode(chat("a " * 300, "b"))
    assert second.cached_token_count > 0.9 * first.token_count
    (again,) = encoder.encode(chat("a " * 300, "b"))
    assert again.cached_token_count == again.token_count
    assert encoder.prepare(chat("a " * 300, "b"))[0].missing == []


def test_steps_may_run_elsewhere(encoder: PromptEncoder) -> None:
    (prepared,) = encoder.prepare(chat("hi"))
    segments = pickle.loads(pickle.dumps(prepared.missing))
    encoded = encoder.finish(prepared, encoder.tokenize(segments))
    assert encoded.token_ids() == encoder.encode(chat("hi"))[0].token_ids()


def test_namespaces(encoder: PromptEncoder) -> None:
    bodies = [chat("hi"), chat("hi", cache_salt="s"), chat("hi") | {"model": "lora"}]
    keys = [split_keys(encoder.encode(b)[0].block_keys) for b in bodies]
    assert not set(keys[0]) & set(keys[1])
    assert not set(keys[0]) & set(keys[2])


def test_names_of_the_base_model_share_its_keys(chatml_path: str) -> None:
    encoder = PromptEncoder(EngineSpec(MODEL, 16, chatml_path, served_names=("m", "alias")), PrefixStore(10**7))
    base, alias, unnamed, lora = (
        encoder.encode(body)[0].block_keys
        for body in (
            chat("hi"),
            chat("hi") | {"model": "alias"},
            chat("hi") | {"model": ""},
            chat("hi") | {"model": "lora"},
        )
    )
    assert base == alias == unnamed
    assert not set(split_keys(base)) & set(split_keys(lora))


def test_tokens_and_lists(encoder: PromptEncoder) -> None:
    ids = list(range(40))
    one, two = encoder.encode({"prompt": [ids, ids[:16]]})
    assert one.token_ids() == ids
    assert one.block_keys[:8] == two.block_keys == block_keys(pack_tokens(ids[:16]), 16, namespace_key(MODEL, 16))
    assert [p.token_count > 0 for p in encoder.encode({"prompt": ["a", "b"]})] == [True, True]


def test_what_is_nested_too_deeply_for_a_digest_is_rendered(encoder: PromptEncoder) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    (prompt,) = encoder.encode(chat("hi", chat_template_kwargs={"x": deep}))  # the template does not look at it
    assert prompt.block_keys == encoder.encode(chat("hi"))[0].block_keys


def test_too_long(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "MAX_PROMPT_CHARS", 100)
    with pytest.raises(PromptError) as caught:
        encoder.encode({"prompt": "x" * 101})
    assert caught.value.reason == "too_long"
