"""Messages reach the template in the shape that vLLM gives them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from serve_app.errors import PromptError
from serve_app.prompts.messages import developer_to_system, to_conversation

CALL = {"index": 0, "type": "function", "id": "c", "function": {"name": "f", "arguments": '{"b": 1}', "x": 2}}


def one(message: dict[str, Any], content_format: Any = "string") -> dict[str, Any]:
    before = copy.deepcopy(message)
    (result,) = to_conversation([message], content_format)
    assert message == before, "the input was changed"
    return result


@pytest.mark.parametrize(
    ("content", "string", "openai"),
    [
        ("a", "a", [{"type": "text", "text": "a"}]),
        ("", "", [{"type": "text", "text": ""}]),
        (None, "", []),
        ([], "", []),
        (["a", "b"], "a\nb", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        ([{"type": "text", "text": ""}, {"type": "text", "text": "b"}], "b", None),
        ([{"type": "text", "text": "a", "uuid": None, "k": 1}], "a", [{"type": "text", "text": "a", "k": 1}]),
        ([{"type": "text", "text": None}], "", []),
        ([{"type": "refusal", "refusal": "no"}], "no", [{"type": "text", "text": "no"}]),
        ([{"type": "tool_reference", "name": "f"}], "f", [{"type": "tool_reference", "name": "f"}]),
    ],
)
def test_content(content: Any, string: str, openai: Any) -> None:
    assert one({"role": "assistant", "content": content})["content"] == string
    if openai is not None:
        assert one({"role": "assistant", "content": content}, "openai")["content"] == openai


def test_tool_call_keys_stand_in_the_order_of_their_type() -> None:
    (call,) = one({"role": "assistant", "tool_calls": [CALL]})["tool_calls"]
    assert list(call) == ["id", "function", "type", "index"]
    assert list(call["function"].items()) == [("arguments", {"b": 1}), ("name", "f"), ("x", 2)]


@pytest.mark.parametrize("arguments", [None, "", "{", "[1]", "5", "null", 5])
def test_arguments_that_are_no_object(arguments: Any) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    assert one({"role": "assistant", "tool_calls": [call]})["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("arguments", ["1" * 5000, "[" * 100_000], ids=["digits", "brackets"])
def test_arguments_that_python_cannot_read(arguments: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(PromptError) as caught:
        one({"role": "assistant", "tool_calls": [call]})
    assert caught.value.reason == "bad_messages"


@pytest.mark.parametrize("tool_calls", [None, []])
def test_no_tool_calls(tool_calls: Any) -> None:
    assert one({"role": "assistant", "content": "a", "tool_calls": tool_calls}) == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_reasoning_has_two_names(key: str) -> None:
    result = one({"role": "assistant", "content": "a", key: "r"})
    assert result["reasoning"] == result["reasoning_content"] == "r"
    assert "reasoning" not in one({"role": "user", "content": "a", key: "r"})


def test_tool_result_is_one_string_in_both_formats() -> None:
    message = {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert one(message)["content"] == one(message, "openai")["content"] == "a\nb"


def test_only_known_keys_reach_the_template() -> None:
    result = one({"role": "user", "content": "a", "name": "bob", "task": 5, "tool_calls": [CALL], "foo": 1})
    assert result == {"role": "user", "content": "a", "name": "bob"}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "media"),
        ({"role": "user", "content": [{"image_url": "x", "uuid": "1"}]}, "media"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "media"),
        ({"role": "user", "content": [{"type": "smell"}]}, "bad_messages"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "bad_messages"),
        ({"role": "user", "content": [{"type": ["text"], "text": "a"}]}, "bad_messages"),
        ({"role": "user", "content": [5]}, "bad_messages"),
        ({"role": "user", "content": 5}, "bad_messages"),
        ({"role": "user", "content": None}, "bad_messages"),
        ({"role": "tool", "content": None}, "bad_messages"),
        ({"role": "assistant", "tool_calls": ["f"]}, "bad_messages"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, "bad_messages"),
        ({"role": "assistant", "tool_calls": {}}, None),
        ({"role": "assistant", "tool_calls": "f"}, "bad_messages"),
        ({"role": "developer", "content": "a", "tools": [5]}, "bad_messages"),
        ({"role": "developer", "content": "a", "tools": [{"function": {"strict": "true"}}]}, "bad_messages"),
    ],
)
def test_refused(message: dict[str, Any], reason: str | None) -> None:
    if reason is None:
        assert "tool_calls" not in one(message)
        return
    with pytest.raises(PromptError) as caught:
        one(message)
    assert caught.value.reason == reason


def test_developer_becomes_system_and_all_system_messages_one() -> None:
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": "One."},
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": [{"type": "text", "text": "Two."}, {"type": "text", "text": "Three."}]},
        {"role": "system", "content": ""},
    ]
    assert developer_to_system(conversation) == [
        {"role": "system", "content": "One.\n\nTwo.\nThree."},
        {"role": "user", "content": "hi"},
    ]


def test_developer_in_front_keeps_its_parts() -> None:
    conversation: list[dict[str, Any]] = [
        {"role": "developer", "content": [], "tools": None, "name": "n"},
        {"role": "user", "content": "hi"},
    ]
    assert developer_to_system(conversation)[0] == {"role": "system", "content": [], "name": "n"}
