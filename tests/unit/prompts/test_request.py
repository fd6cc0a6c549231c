"""The fields of a request that decide about its prompt, with vLLM's defaults."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.blocks import pack_tokens
from serve_app.errors import PromptError
from serve_app.prompts.request import (
    MAX_PROMPTS,
    ChatPrompt,
    EngineRules,
    TextPrompt,
    TokenPrompt,
    namespace_of,
    parse_request,
)
from serve_app.types import ModelId

USER = {"role": "user", "content": "hi"}
BASE = ModelId("base")


def chat(**fields: Any) -> ChatPrompt:
    (prompt,) = parse_request({"messages": [USER], **fields})
    assert isinstance(prompt, ChatPrompt)
    return prompt


def test_chat_defaults_are_vllms() -> None:
    prompt = chat()
    assert prompt == ChatPrompt([USER], add_generation_prompt=True, continue_final_message=False)
    assert not prompt.add_special_tokens


def test_completion_defaults_are_vllms() -> None:
    assert parse_request({"prompt": "hi"}) == [TextPrompt("hi", add_special_tokens=True)]
    assert parse_request({"prompt": "hi", "add_special_tokens": False}) == [TextPrompt("hi", add_special_tokens=False)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokenPrompt(pack_tokens([1, 2]))]),
        ([[1, 2], [3]], [TokenPrompt(pack_tokens([1, 2])), TokenPrompt(pack_tokens([3]))]),
    ],
)
def test_prompt_lists(prompt: Any, expected: Any) -> None:
    assert parse_request({"prompt": prompt}) == expected


@pytest.mark.parametrize("prompt", ["a", [1]])
def test_only_so_many_prompts_at_once(prompt: Any) -> None:
    assert len(parse_request({"prompt": [prompt] * MAX_PROMPTS})) == MAX_PROMPTS
    with pytest.raises(PromptError) as caught:
        parse_request({"prompt": [prompt] * (MAX_PROMPTS + 1)})
    assert caught.value.reason == "many_prompts"
    assert parse_request({"prompt": [1] * 5000}) == [TokenPrompt(pack_tokens([1] * 5000))]  # one prompt


def test_tools_as_vllm_dumps_them() -> None:
    tool = {"x": 1, "function": {"parameters": {"b": 1, "a": 2}, "y": 2, "name": "f"}}
    (dumped,) = chat(tools=[tool]).tools or []
    assert list(dumped) == ["type", "function"]
    assert list(dumped["function"].items()) == [("name", "f"), ("description", None), ("parameters", {"b": 1, "a": 2})]


def test_tools_stay_when_none_may_be_chosen() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools, tool_choice="none").tools == chat(tools=tools).tools


def test_tools_go_when_the_engine_excludes_them() -> None:
    body = {"messages": [USER], "tools": [{"function": {"name": "f"}}]}
    rules = EngineRules(excludes_tools=True)
    (none,) = parse_request({**body, "tool_choice": "none"}, rules)
    (auto,) = parse_request({**body, "tool_choice": "auto"}, rules)
    assert isinstance(none, ChatPrompt)
    assert isinstance(auto, ChatPrompt)
    assert none.tools is None
    assert auto.tools is not None


def test_token_ids_of_a_generate_request() -> None:
    assert parse_request({"token_ids": [1, 2], "sampling_params": {}}) == [TokenPrompt(pack_tokens([1, 2]))]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"input": "a"}, [TextPrompt("a")]),
        ({"input": ["a", "b"]}, [TextPrompt("a"), TextPrompt("b")]),
        ({"input": [[1], [2, 3]]}, [TokenPrompt(pack_tokens([1])), TokenPrompt(pack_tokens([2, 3]))]),
        ({"messages": [USER]}, [ChatPrompt([USER], add_generation_prompt=False)]),
        ({"input": [USER]}, [ChatPrompt([USER], add_generation_prompt=False)]),
    ],
)
def test_a_pooling_model_embeds_its_input(body: dict[str, Any], expected: Any) -> None:
    assert parse_request(body, EngineRules(pooling=True)) == expected


def test_deferred_tools() -> None:
    (dumped,) = chat(tools=[{"defer_loading": True, "function": {"name": "f", "strict": False}}]).tools or []
    assert dumped["defer_loading"] is dumped["function"]["defer_loading"] is True
    assert dumped["function"]["strict"] is False


def test_reasoning_effort_reaches_the_template() -> None:
    assert chat(reasoning_effort="low").chat_template_kwargs == {"enable_thinking": True, "reasoning_effort": "low"}
    assert chat(reasoning_effort="none").chat_template_kwargs["enable_thinking"] is False
    given = {"enable_thinking": False, "reasoning_effort": "low"}
    assert chat(reasoning_effort="high", chat_template_kwargs=given).chat_template_kwargs == {
        "enable_thinking": False,
        "reasoning_effort": "high",
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"chat_template_kwargs": {"tokenize": False}}, True),
        ({"chat_template_kwargs": {"tokenize": "auto", "truncation": True}}, True),
        ({"chat_template_kwargs": {"tokenize": True}}, False),
        ({"return_assistant_tokens_mask": True}, False),
    ],
)
def test_a_template_that_tokenizes_adds_no_special_tokens(fields: dict[str, Any], expected: bool) -> None:
    assert chat(add_special_tokens=True, **fields).add_special_tokens is expected


def test_token_ids_of_the_prefill_stage() -> None:
    body = {"messages": [USER], "kv_transfer_params": {"prompt_token_ids": [1, 2]}}
    assert parse_request(body) == [TokenPrompt(pack_tokens([1, 2]))]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "no_prompt"),
        ({"prompt": ""}, "no_prompt"),
        ({"prompt": []}, "no_prompt"),
        ({"prompt": {}}, "no_prompt"),
        ({"prompt": 5}, "bad_prompt"),
        ({"prompt": [1, "a"]}, "bad_prompt"),
        ({"prompt": [-1]}, "bad_prompt"),
        ({"prompt": [2**32]}, "bad_prompt"),
        ({"prompt": [True]}, "bad_prompt"),
        ({"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "a", "suffix": "b"}, "bad_field"),
        ({"prompt": "a", "truncate_prompt_tokens": 5}, "truncated"),
        ({"messages": None}, "bad_messages"),
        ({"messages": []}, "bad_messages"),
        ({"messages": ["hi"]}, "bad_messages"),
        ({"messages": [{"content": "hi"}]}, "bad_messages"),
        ({"messages": [USER], "tools": []}, "bad_tools"),
        ({"messages": [USER], "tools": [{"function": {}}]}, "bad_tools"),
        ({"messages": [USER], "tools": ["f"]}, "bad_tools"),
        ({"messages": [USER], "tools": [{"function": {"name": "f", "strict": "true"}}]}, "bad_tools"),
        ({"messages": [USER], "tools": [{"function": {"name": "f"}, "defer_loading": 1}]}, "bad_tools"),
        ({"messages": [USER], "tools": [{"function": {"name": "f", "parameters": []}}]}, "bad_tools"),
        ({"messages": [USER], "prompt": "hi"}, "ambiguous"),
        ({"messages": [USER], "input": "hi"}, "ambiguous"),
        ({"messages": [USER], "token_ids": [1]}, "ambiguous"),
        ({"input": "and now?", "previous_response_id": "resp_1"}, "stored_response"),
        ({"input": "hi", "truncation": "auto"}, "truncated"),
        ({"input": "hi", "truncation": None}, "truncated"),
        ({"token_ids": [1], "features": {"mm_hashes": {}}}, "media"),
        ({"token_ids": [1, "a"]}, "bad_prompt"),
        ({"text_1": "a", "text_2": ["b"]}, "pairs"),
        ({"query": "a", "documents": ["b"]}, "pairs"),
        ({"tokens": [1]}, "no_prompt"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True, "truncation": True}}, "truncated"),
        ({"messages": [USER], "documents": ["d"]}, "bad_field"),
        ({"messages": [USER], "chat_template": 1}, "bad_field"),
        ({"messages": [USER], "chat_template_kwargs": []}, "bad_field"),
        ({"messages": [USER], "add_generation_prompt": None}, "bad_field"),
    ],
)
def test_what_cannot_be_scored(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_request(body)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (None, None)),
        ({"model": "base"}, (None, None)),
        ({"model": "alias"}, (None, None)),
        ({"model": "adapter", "cache_salt": "s"}, ("adapter", "s")),
    ],
)
def test_namespace(body: dict[str, Any], expected: Any) -> None:
    assert namespace_of(body, BASE, aliases=["alias"]) == expected


@pytest.mark.parametrize(
    "body",
    [
        {"model": 5},
        {"model": "\ud800"},
        {"cache_salt": "\ud800"},
        {"cache_salt": ""},
        {"cache_salt": 5},
        {"cache_salt": "x" * 1025},
    ],
)
def test_bad_namespace(body: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        namespace_of(body, BASE)
