"""OpenAI messages -> the conversation that vLLM hands to the chat template.

In: messages as the client sent them. Out: new dicts; the input is never changed. Follows vLLM 0.29,
`entrypoints/chat_utils.py` (`parse_chat_messages`) after pydantic has validated the request: validation puts known
keys in the order of their type and keeps unknown keys behind them, which shows wherever a template dumps JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from serve_app.errors import PromptError

ContentFormat = Literal["string", "openai"]
Message = dict[str, Any]

_TEXT_FIELD = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
    "tool_reference": "name",
}
# Type or key of a part that is not text -> the type that a template in "openai" format is given. vLLM takes the type; a
# part without one, or with a uuid, is what its keys say, looked for in this order.
_MEDIA = {
    "image_url": "image",
    "image_pil": "image",
    "image_embeds": "image",
    "audio_embeds": "audio",
    "video_embeds": "video",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
    "input_image": "image",
}
_NOT_TEXT = _MEDIA.keys() | {"prompt_embeds", "file"}
# Keys of vLLM's content part types: they are not carried over to a part in "openai" format, others are.
_KNOWN_PART_FIELDS = (
    _NOT_TEXT - {"input_image", "prompt_embeds"}
    | set(_TEXT_FIELD.values())
    | {"thinking", "type", "uuid", "closed", "data", "prompt_cache_breakpoint"}
)


def to_conversation(
    messages: Sequence[Mapping[str, Any]],
    content_format: ContentFormat,
    media_as: str | None = None,
    ordered: bool = True,
) -> list[Message]:
    """Messages in the shape the template gets.

    Args:
        messages: as the client sent them.
        content_format: of the template.
        media_as: text that stands for every image, audio and video, instead of what the template makes of them.
        ordered: whether the request's types have put the keys of tool calls in their order.

    Raises:
        PromptError: "media" for parts of which only the engine knows where they go, "bad_messages" for what vLLM would
            refuse.
    """
    return [_message(m, content_format, media_as, ordered) for m in messages]


def count_media(messages: Sequence[Mapping[str, Any]]) -> int:
    """Content parts that are not text."""
    count = 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            count += sum(1 for part in content if isinstance(part, Mapping) and _is_media(part))
    return count


def developer_to_system(conversation: list[Message]) -> list[Message]:
    """For templates that know no `developer` role: such messages become system, all system messages one, in front.

    Source: `_convert_developer_to_system` and `_consolidate_system_messages` in vLLM's `renderers/hf.py`.
    """
    conversation = [
        {k: ("system" if k == "role" else v) for k, v in m.items() if k != "tools"} if m["role"] == "developer" else m
        for m in conversation
    ]
    system = [i for i, m in enumerate(conversation) if m["role"] == "system"]
    if system in ([], [0]):
        return conversation
    contents = [_flat(conversation[i].get("content", "")) for i in system]
    merged = {"role": "system", "content": "\n\n".join(c for c in contents if c)}
    return [merged, *(m for m in conversation if m["role"] != "system")]


def _flat(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = (p["text"] if isinstance(p, dict) else p for p in content if isinstance(p, str) or "text" in p)
    return "\n".join(texts)


def _message(message: Mapping[str, Any], content_format: ContentFormat, media_as: str | None, ordered: bool) -> Message:
    role = message["role"]
    if message.get("content", "") is None and role not in ("assistant", "function"):
        raise PromptError("bad_messages", f"content of role {role!r} must not be null")
    result: Message = {"role": role, "content": _content(message.get("content"), content_format, media_as)}
    if role == "assistant":
        tool_calls = message.get("tool_calls")
        if tool_calls:
            result["tool_calls"] = [_tool_call(c, ordered) for c in _listed(tool_calls, "tool_calls")]
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")
        if reasoning is not None:
            result["reasoning"] = result["reasoning_content"] = reasoning
    elif role == "tool":
        if "tool_call_id" in message:
            result["tool_call_id"] = message["tool_call_id"]
        result["content"] = _tool_result(result["content"])
    for key in ("name", "task"):
        if isinstance(message.get(key), str):
            result[key] = message[key]
    if role == "developer":
        result["tools"] = _developer_tools(message.get("tools"))
    return result


def _content(content: Any, content_format: ContentFormat, media_as: str | None) -> str | list[Any]:
    if content is None:
        content = []
    elif isinstance(content, str):
        content = [content]
    wrap = content_format == "openai"
    parts = [p for part in _listed(content, "content") if (p := _part(part, wrap, media_as))]
    return parts if wrap else "\n".join(parts)


def _part(part: Any, wrap: bool, media_as: str | None) -> Any:
    """One part of a message's content; None for a part that vLLM skips."""
    if isinstance(part, str):
        return {"type": "text", "text": part} if wrap else part
    if not isinstance(part, Mapping):
        raise PromptError("bad_messages", "a content part must be a string or an object")
    kind = part.get("type")
    if not isinstance(kind, str | None):
        raise PromptError("bad_messages", "the type of a content part must be a string")
    if _is_media(part):
        return _media_part(part, wrap, media_as)
    if kind is None and "tool_reference" in part:
        kind = "tool_reference"
    if kind not in _TEXT_FIELD or part.get("uuid") is not None:
        raise PromptError("bad_messages", f"unknown content part type {kind!r}")
    text = part.get(_TEXT_FIELD[kind])
    if text is None:
        return None
    if not isinstance(text, str):
        raise PromptError("bad_messages", "the text of a content part must be a string")
    if not wrap:
        return text
    if kind == "tool_reference":
        return {"type": kind, "name": text}
    return {"type": "text", "text": text, **{k: v for k, v in part.items() if k not in _KNOWN_PART_FIELDS}}


def _is_media(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return (isinstance(kind, str) and kind in _NOT_TEXT) or not _NOT_TEXT.isdisjoint(part)


def _media_part(part: Mapping[str, Any], wrap: bool, media_as: str | None) -> dict[str, Any]:
    """What a template in "openai" format is given in place of an image.

    In "string" format vLLM puts a text of the model's own into the message, which only the engine knows.
    """
    kind = part.get("type")
    if kind is None or part.get("uuid") is not None:
        kind = next((key for key in _MEDIA if key in part and key != "input_image"), kind)
    if not wrap or kind not in _MEDIA:
        raise PromptError("media", f"where the engine puts a content part of type {kind!r} is not known")
    if media_as is not None:
        return {"type": "text", "text": media_as}
    return {"type": _MEDIA[kind], **{k: v for k, v in part.items() if k not in _KNOWN_PART_FIELDS}}


def _tool_result(content: Any) -> Any:
    """A tool message's text parts are one string, whatever the template's format; tool references stay parts."""
    if not isinstance(content, list) or any(p.get("type") != "text" for p in content):
        return content
    return "\n".join(p.get("text", "") for p in content)


def _tool_call(call: Any, ordered: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise PromptError("bad_messages", "tool_calls entries must be objects of type 'function'")
    function = _reordered(function, ("arguments", "name") if ordered else ())
    function["arguments"] = _arguments(function.get("arguments"))
    call = _reordered(call, ("id", "function", "type") if ordered else ())
    return {**call, "function": function}


def _arguments(arguments: Any) -> dict[str, Any]:
    """Arguments as a mapping, as templates expect; what is no JSON object becomes {}, as in vLLM.

    Raises:
        PromptError: JSON that Python does not read, a number of 5,000 digits or 100,000 `[`; vLLM fails there too.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return {}
        except (ValueError, RecursionError) as error:
            raise PromptError("bad_messages", f"the arguments of a tool call cannot be read: {error}") from error
    return dict(arguments) if isinstance(arguments, Mapping) else {}


def _developer_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    result = []
    for tool in _listed(tools, "tools"):
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
            raise PromptError("bad_messages", "every tool must be an object with a function")
        if not isinstance(tool["function"].get("strict"), bool | None):  # pydantic makes a flag of a word
            raise PromptError("bad_messages", "strict must be true or false")
        function = _reordered(tool["function"], ("name", "description", "parameters", "strict"))
        result.append({**_reordered(tool, ("function", "type")), "function": function})
    return result


def _listed(value: Any, name: str) -> Iterable[Any]:
    if not isinstance(value, list):
        raise PromptError("bad_messages", f"{name} must be a list")
    return value


def _reordered(value: Mapping[str, Any], first: tuple[str, ...]) -> dict[str, Any]:
    """`value` with the keys in `first` in front, in that order, the rest as it came."""
    return {k: value[k] for k in first if k in value} | {k: v for k, v in value.items() if k not in first}
