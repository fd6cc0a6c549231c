"""Body of `/v1/messages` (Anthropic) -> body of `/v1/chat/completions` that vLLM makes of it.

In: parsed JSON. Out: a new dict; its `tools` may be an empty list, which a chat request could not have. Follows vLLM
0.29, `entrypoints/anthropic/serving.py` (`to_chat_completion_request`), block by block:

    system, system messages      one system message in front, or each where it stands: see `merges_system`
    thinking, tool_use           reasoning and tool_calls of the assistant's message
    tool_result                  a message of role tool, in front of what else the user says; its images behind it
    cache_control, signature     no part of the prompt
    x-anthropic-billing-header   a block that starts so is left out: Claude Code puts a hash per request there
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox

from serve_app.errors import PromptError

Message = dict[str, Any]

_BILLING = "x-anthropic-billing-header"
_SAME_IN_CHAT = ("model", "cache_salt", "kv_transfer_params", "chat_template_kwargs")
_BLOCKS = frozenset({"text", "image", "tool_use", "tool_result", "tool_reference", "thinking", "redacted_thinking"})
_TOOL_CHOICE = {"auto": "auto", "any": "required", "none": "none", "tool": "named"}
_SYSTEM_LATER = [{"role": role, "content": "t"} for role in ("system", "user") * 2]


def merges_system(chat_template: str | None) -> bool:
    """Whether vLLM moves system messages to the front: always, but for a `--chat-template` that takes them anywhere.

    vLLM finds out by rendering with plain Jinja, where a template that calls `raise_exception` or `strftime_now` fails.
    """
    if not chat_template:
        return True
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    try:
        env.from_string(chat_template).render(messages=_SYSTEM_LATER, add_generation_prompt=False)
    except jinja2.TemplateError:
        return True
    return False


def to_chat(body: Mapping[str, Any], merge_system: bool) -> dict[str, Any]:
    """The chat request.

    Raises:
        PromptError: vLLM would refuse it.
    """
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise PromptError("bad_messages", "messages must be a list")
    chat = {key: body[key] for key in _SAME_IN_CHAT if key in body}
    chat["messages"] = [*_system(body.get("system"), messages, merge_system), *_conversation(messages, merge_system)]
    output = body.get("output_config")
    if output is not None and (effort := _field(output, "effort", str)) is not None:
        chat["reasoning_effort"] = effort
    choice = body.get("tool_choice")
    if choice is not None:
        chat["tool_choice"] = _TOOL_CHOICE.get(_field(choice, "type", str) or "")
    if body.get("tools") is not None:
        chat["tools"] = [_tool(tool) for tool in _list(body["tools"], "bad_tools")]
    return chat


def _system(system: Any, messages: Sequence[Any], merge: bool) -> Iterator[Message]:
    parts = []
    if isinstance(system, str):  # a billing header in it stays, as in vLLM
        parts.append(system)
    elif system is not None:
        parts.append(_system_text(_list(system, "bad_messages")))
    if merge:
        parts += [_system_text(m.get("content")) for m in messages if _field(m, "role", str) == "system"]
    if text := "".join(parts):
        yield {"role": "system", "content": text}


def _system_text(content: Any) -> str:
    if isinstance(content, str):
        return "" if content.startswith(_BILLING) else content
    texts = [_field(block, "text", str) for block in _list(content, "bad_messages") if block.get("type") == "text"]
    return "".join(text for text in texts if text and not text.startswith(_BILLING))


def _conversation(messages: Sequence[Any], merge: bool) -> Iterator[Message]:
    for message in messages:
        role, content = _field(message, "role", str), message.get("content")
        if role == "system":
            if not merge and (text := _system_text(content)):
                yield {"role": "system", "content": text}
        elif role not in ("user", "assistant"):
            raise PromptError("bad_messages", "the role of a message must be user, assistant or system")
        elif isinstance(content, str):
            yield {"role": role, "content": content}
        else:
            yield from _message(role, _list(content, "bad_messages"))


def _message(role: str, blocks: Sequence[Any]) -> Iterator[Message]:
    """The results of tools, then what is said beside them."""
    by_kind: dict[str, list[Any]] = {}
    for block in blocks:
        by_kind.setdefault(_field(block, "type", str) or "", []).append(block)
    if unknown := by_kind.keys() - _BLOCKS:
        raise PromptError("bad_messages", f"content blocks of type {', '.join(unknown)} are not known")
    if role == "user":
        for result in by_kind.get("tool_result", ()):
            yield from _tool_result(result)
    said = [part for block in blocks if (part := _part(role, block)) is not None]
    made: Message = {"role": role}
    thinking = [_field(block, "thinking", str) for block in by_kind.get("thinking", ())]
    if any(text is not None for text in thinking):
        made["reasoning"] = "".join(text for text in thinking if text is not None)
    if calls := [_tool_call(block) for block in by_kind.get("tool_use", ())]:
        made["tool_calls"] = calls
    if said:
        made["content"] = said[0]["text"] if len(said) == 1 and said[0]["type"] == "text" else said
    if role == "assistant" or said:
        yield made


def _part(role: str, block: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a block adds to the content of its message."""
    kind = block["type"]
    if kind == "text" and (text := _field(block, "text", str)):
        return {"type": "text", "text": text}
    if kind == "image" and (source := _field(block, "source", dict)):
        return _image(source)
    if kind == "tool_result" and role == "assistant":
        return {"type": "text", "text": f"Tool result: {block.get('content') or ''}"}
    return None


def _tool_call(block: Mapping[str, Any]) -> dict[str, Any]:
    if not (call_id := _field(block, "id", str)):  # vLLM takes the time of day
        raise PromptError("bad_messages", "a tool_use block must have an id")
    function = {"name": _field(block, "name", str) or "", "arguments": _field(block, "input", dict) or {}}
    return {"id": call_id, "type": "function", "function": function}


def _tool_result(block: Mapping[str, Any]) -> Iterator[Message]:
    content, call_id = block.get("content"), _field(block, "tool_use_id", str) or ""
    texts: list[str] = []
    images: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    if isinstance(content, str):
        texts.append(content)
    elif content is not None:
        for item in _list(content, "bad_messages"):
            kind = item.get("type")
            if kind == "text":
                texts.append(_field(item, "text", str) or "")
            elif kind == "image":
                images.append(_image(_field(item, "source", dict) or {}))
            elif kind == "tool_reference" and (name := item.get("tool_name") or item.get("name")):
                references.append({"type": "tool_reference", "name": name})
    yield {"role": "tool", "tool_call_id": call_id, "content": "\n".join(texts)}
    if images:
        yield {"role": "user", "content": images}
    if references:
        yield {"role": "tool", "tool_call_id": call_id, "content": references}


def _image(source: Mapping[str, Any]) -> dict[str, Any]:
    """Which image it is makes no difference to what is scored: see media.py."""
    url = source.get("url", "") if source.get("type") == "url" else source.get("data", "")
    return {"type": "image_url", "image_url": {"url": url}}


def _tool(tool: Any) -> dict[str, Any]:
    schema = dict(_field(tool, "input_schema", dict, "bad_tools") or {})
    if "input_schema" not in tool:
        raise PromptError("bad_tools", "a tool must have an input_schema")
    schema.setdefault("type", "object")
    function = {key: tool.get(key) for key in ("name", "description", "strict", "defer_loading")}
    return {"type": "function", "function": function | {"parameters": schema}}


def _list(value: Any, reason: str) -> list[Any]:
    """A list of objects."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise PromptError(reason, "a list of objects is expected")
    return value


def _field(value: Any, name: str, kind: type, reason: str = "bad_messages") -> Any:
    """Field of an object: a `kind`, or None.

    Raises:
        PromptError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise PromptError(reason, f"an object with {name} is expected")
    field = value.get(name)
    if not isinstance(field, kind | None):
        raise PromptError(reason, f"{name} must be of type {kind.__name__}")
    return field
