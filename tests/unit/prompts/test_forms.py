"""Each form of request is recognised by its body, and scored or refused as such."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import PromptError
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.forms import Form, recognise
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.request import EngineRules, parse_request
from serve_app.types import EngineSpec, ModelId
from tests.unit.prompts.conftest import write_model

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
TEXT = {"type": "text", "text": "hi"}


def says(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({"messages": [USER]}, Form.CHAT),
        ({"messages": [SYSTEM, USER], "max_tokens": 5}, Form.CHAT),  # both make the same of it
        ({"messages": [USER, SYSTEM]}, Form.CHAT),  # /v1/messages would miss max_tokens
        ({"messages": [USER, SYSTEM], "max_tokens": 5}, Form.EITHER),
        ({"messages": [USER, SYSTEM], "max_tokens": 5, "seed": 1}, Form.CHAT),
        ({"messages": [USER], "system": "be brief", "max_tokens": 5}, Form.MESSAGES),
        ({"messages": [USER], "system": "be brief"}, Form.CHAT),  # served, the field not read
        ({"messages": [USER], "system": "be brief", "max_tokens": None}, Form.CHAT),
        ({"messages": [USER], "tools": [{"name": "f", "input_schema": {}}]}, Form.MESSAGES),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}], "max_tokens": 5}, Form.CHAT),
        (says({"type": "tool_result", "tool_use_id": "t"}) | {"max_tokens": 5}, Form.MESSAGES),
        (says(TEXT, {"type": "image", "source": {}}) | {"max_tokens": 5}, Form.MESSAGES),
        (says(TEXT, {"type": "image_url", "image_url": {}}) | {"max_tokens": 5}, Form.CHAT),
        (says(TEXT) | {"max_tokens": 5}, Form.EITHER),
        ({"messages": [{"role": "tool", "content": "1"}], "max_tokens": 5}, Form.CHAT),
        ({"prompt": "hi"}, Form.COMPLETION),
        ({"prompt": "hi", "input": "hi"}, Form.COMPLETION),  # /v1/responses refuses a prompt
        ({"input": "hi"}, Form.RESPONSES),
        ({"token_ids": [1], "sampling_params": {}}, Form.GENERATE),
    ],
)
def test_forms(body: dict[str, Any], form: Form) -> None:
    assert recognise(body, pooling=False) is form


@pytest.mark.parametrize("name", ["input", "messages"])
def test_a_pooling_model_does_not_generate(name: str) -> None:
    assert recognise({name: [USER]}, pooling=True) is Form.POOLING


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    path = write_model(Path(tmp_path_factory.mktemp("model")))
    return PromptEncoder(EngineSpec(ModelId("m"), 4, path), PrefixStore(1 << 20))


@pytest.mark.parametrize(
    "content",
    [[TEXT], [TEXT, TEXT], [{**TEXT, "cache_control": {"type": "ephemeral"}}]],
)
def test_what_two_endpoints_render_alike_is_scored(encoder: PromptEncoder, content: list[Any]) -> None:
    chat = {"messages": [{"role": "user", "content": content}], "model": "m"}
    (either,) = encoder.encode(chat | {"max_tokens": 5})
    assert either.token_ids() == encoder.encode(chat)[0].token_ids()


def test_what_they_do_not_is_ambiguous(encoder: PromptEncoder) -> None:
    """/v1/messages moves the system message to the front."""
    body = {"messages": [USER, SYSTEM], "max_tokens": 5, "model": "m"}
    for _ in range(2):  # not from the store either
        with pytest.raises(PromptError) as caught:
            encoder.encode(body)
        assert caught.value.reason == "ambiguous"


@pytest.mark.parametrize("body", [{"messages": [USER], "system": "s"}, {"input": "hi"}, {"token_ids": [1, 2, 3, 4]}])
def test_adapters_and_salts_have_blocks_of_their_own(encoder: PromptEncoder, body: dict[str, Any]) -> None:
    names: list[dict[str, Any]] = [{}, {"model": None}, {"model": "m"}, {"model": "lora"}, {"cache_salt": "s"}]
    keys = [encoder.encode(body | name)[0].block_keys for name in names]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 3


FIELDS = (
    *("messages", "prompt", "input", "token_ids", "system", "tools", "tool_choice", "max_tokens", "output_config"),
    *("type", "role", "content", "text", "id", "name", "arguments", "call_id", "summary", "status", "input_schema"),
    *("instructions", "reasoning", "effort", "source", "function", "chat_template_kwargs", "thinking", "tool_use_id"),
)
WORDS = (
    *("user", "assistant", "system", "message", "function_call", "function_call_output", "reasoning", "text"),
    *("tool_use", "tool_result", "image", "thinking", "function", "namespace", "none", "", "x"),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.floats() | st.sampled_from(WORDS),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), v, max_size=5),
    max_leaves=15,
)


@settings(max_examples=600, deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS), values, max_size=6), pooling=st.booleans())
def test_any_body_is_read_or_refused_by_name(body: dict[str, Any], pooling: bool) -> None:
    with suppress(PromptError):
        assert parse_request(body, EngineRules(pooling=pooling))
