"""Body of `/v1/responses` -> body of `/v1/chat/completions` with the same prompt.

In: parsed JSON. Out: a new dict; its `tools` may be an empty list, which a chat request could not have. Follows vLLM
0.29, `entrypoints/openai/responses` (`construct_input_messages` and `construct_tool_dicts` in utils.py, the validators
of protocol.py). One message of the assistant may come in several items, in any order:

    reasoning, message, function_call, function_call    -> one message with reasoning, content and two tool_calls
    function_call_output                                -> a message of role tool
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.errors import PromptError

Message = dict[str, Any]

_SAME_IN_CHAT = ("model", "cache_salt", "kv_transfer_params", "chat_template_kwargs", "tool_choice")
_OPEN = ("in_progress", "incomplete")


def to_chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request.

    Raises:
        PromptError: vLLM would refuse it, or has a part of the prompt that the request does not.
    """
    if body.get("previous_response_id") is not None:
        raise PromptError("stored_response", "the conversation before is stored in the engine that answered")
    if body.get("truncation", "disabled") != "disabled":
        raise PromptError("truncated", "truncation: auto is not scored")
    given = body.get("input")
    if not isinstance(given, str | list):
        raise PromptError("bad_input", "input must be a string or a list of items")
    continued = isinstance(given, list) and bool(given) and _is_open(given[-1])
    chat = {key: body[key] for key in _SAME_IN_CHAT if key in body}
    chat |= {
        "messages": [*_instructions(body.get("instructions")), *_messages(given)],
        "add_generation_prompt": not continued,
        "continue_final_message": continued,
        "add_special_tokens": True,  # unlike a chat request: a template that writes BOS itself has it twice
    }
    reasoning = body.get("reasoning")
    if isinstance(reasoning, Mapping) and reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    if tools := body.get("tools"):
        chat["tools"] = _tools(tools)
    return chat


def _instructions(text: Any) -> list[Message]:
    if not isinstance(text, str | None):
        raise PromptError("bad_input", "instructions must be a string")
    return [{"role": "system", "content": text}] if text else []


def _messages(given: str | list[Any]) -> list[Message]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Message] = []
    for item in given:
        if not isinstance(item, Mapping):
            raise PromptError("bad_input", "every item of input must be an object")
        _add(messages, item)
    return messages


def _add(messages: list[Message], item: Mapping[str, Any]) -> None:
    match item.get("type"):
        case "function_call":
            _assistant(messages, "tool_calls", [_tool_call(item)])
        case "reasoning":
            _assistant(messages, "reasoning", _reasoning(item))
        case "function_call_output":
            messages.append({"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")})
        case None | "message":
            if item.get("role") == "assistant":
                _assistant(messages, "content", _answer(item.get("content")))
            else:
                messages.append(_message(item))
        case kind:
            raise PromptError("bad_input", f"vLLM has no message for an item of type {kind!r}")


def _assistant(messages: list[Message], key: str, value: Any) -> None:
    """Complete the assistant's message in front, where it has none of that yet; otherwise start another one."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or (last.get(key) is not None and key != "tool_calls"):
        messages.append({"role": "assistant", key: value})
    elif key == "tool_calls":
        last[key] = last.get(key, []) + value
    else:
        last[key] = value


def _tool_call(item: Mapping[str, Any]) -> dict[str, Any]:
    name, arguments, call_id = (_text(item.get(key), key) for key in ("name", "arguments", "call_id"))
    if namespace := item.get("namespace"):
        name = f"{_text(namespace, 'namespace')}__{name}"
    return {"id": call_id, "function": {"name": name, "arguments": arguments}, "type": "function"}


def _reasoning(item: Mapping[str, Any]) -> str:
    """The first text of the content, or of the summary."""
    if item.get("encrypted_content"):
        raise PromptError("bad_input", "vLLM refuses encrypted reasoning")
    texts = item.get("content") or item.get("summary")
    if not isinstance(texts, list) or not isinstance(item.get("summary"), list):
        raise PromptError("bad_input", "a reasoning item must have a summary")
    return _text(texts[0].get("text") if isinstance(texts[0], Mapping) else None, "text") if texts else ""


def _answer(content: Any) -> str:
    """What the assistant said: the first part alone, as in vLLM."""
    if isinstance(content, list):
        content = content[0].get("text") if content and isinstance(content[0], Mapping) else None
    return _text(content, "the assistant's content")


def _message(item: Mapping[str, Any]) -> Message:
    if item.get("role") not in ("user", "system", "developer"):
        raise PromptError("bad_input", "the role of a message must be user, assistant, system or developer")
    return dict(item)


def _tools(tools: Any) -> list[dict[str, Any]]:
    """Functions, those of namespaces too; what vLLM or somebody else runs is not shown to the template."""
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise PromptError("bad_tools", "tools must be a list of objects")
    functions = []
    for tool in tools:
        if tool.get("type") == "function":
            functions.append(_function(tool, tool.get("name")))
        elif tool.get("type") == "namespace":
            inner = tool.get("tools")
            if not isinstance(inner, list) or not all(isinstance(t, Mapping) for t in inner):
                raise PromptError("bad_tools", "the tools of a namespace must be a list of objects")
            names = (f"{tool.get('name')}__{t.get('name')}" for t in inner)
            functions += [_function(t, n) for t, n in zip(inner, names, strict=True) if t.get("type") == "function"]
    return functions


def _function(tool: Mapping[str, Any], name: Any) -> dict[str, Any]:
    keys = ("description", "parameters", "strict", "defer_loading")
    return {"type": "function", "function": {"name": name} | {key: tool.get(key) for key in keys}}


def _is_open(item: Any) -> bool:
    """Whether the answer goes on with it."""
    return (
        isinstance(item, Mapping)
        and item.get("type", "message") in ("message", "reasoning")
        and item.get("status") in _OPEN
    )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise PromptError("bad_input", f"{name} must be a string")
    return value
