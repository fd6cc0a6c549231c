"""Which endpoint of vLLM a body is for. Of the path Ray's HAProxy tells the router nothing: it hands over the body.

In: parsed JSON, the engine's kind. Out: a form. Endpoints ignore fields that they do not know, so what decides is what
each requires, then what only one of them has. A conversation that two of them take is `EITHER`: it is scored where both
make the same prompt of it.

    messages                      /v1/chat/completions; /v1/messages if only that takes it
    prompt                        /v1/completions
    token_ids, sampling_params    /inference/v1/generate
    input                         /v1/responses; of a pooling model /v1/embeddings, /pooling, /classify

`/tokenize` and the `/render` endpoints take the bodies of the endpoints that they are about.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from serve_app.errors import PromptError


class Form(StrEnum):
    """The form of a request: which endpoint's body it is."""

    CHAT = "chat"
    MESSAGES = "messages"
    EITHER = "either"  # CHAT or MESSAGES
    COMPLETION = "completion"
    RESPONSES = "responses"
    GENERATE = "generate"
    POOLING = "pooling"


# How the paths of vLLM 0.29's endpoints end whose requests use a replica's engine. What has another path is plain.
GENERATION_PATHS = (
    "/chat/completions",
    "/chat/completions/batch",
    "/completions",
    "/messages",
    "/responses",
    "/v1/generate",
    "/embeddings",
    "/embed",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/invocations",
    "/audio/transcriptions",
    "/audio/translations",
)

_PAIRS = ("text_1", "text_2", "data_1", "data_2", "queries", "query", "documents", "items")
_MESSAGES_ONLY = ("system", "stop_sequences", "output_config", "thinking")
# Of a chat request with `max_tokens`, which Anthropic requires. Who sends one of these is no client of theirs.
_CHAT_ONLY = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "chat_template",
        "continue_final_message",
        "documents",
        "echo",
        "frequency_penalty",
        "function_call",
        "functions",
        "ignore_eos",
        "include_reasoning",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "min_p",
        "min_tokens",
        "modalities",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "prompt_logprobs",
        "reasoning_effort",
        "repetition_penalty",
        "response_format",
        "return_token_ids",
        "seed",
        "stop",
        "stop_token_ids",
        "store",
        "stream_options",
        "structured_outputs",
        "top_logprobs",
        "use_beam_search",
        "user",
    }
)
_BLOCKS_ONLY = frozenset({"tool_use", "tool_result", "redacted_thinking", "image"})
_BLOCKS = _BLOCKS_ONLY | {"text", "thinking", "tool_reference"}


def recognise(body: Mapping[str, Any], pooling: bool) -> Form:
    """The form of a request.

    Args:
        body: parsed JSON.
        pooling: the engine serves embeddings and the like.

    Raises:
        PromptError: it is none that is scored; "ambiguous" if several endpoints take it.
    """
    given = [name for name in ("messages", "prompt", "token_ids") if body.get(name) is not None]
    if "input" in body and given != ["prompt"]:  # /v1/responses refuses a prompt
        given.append("input")
    if len(given) > 1:
        raise PromptError("ambiguous", f"the request has {' and '.join(given)}")
    match given:
        case ["messages"]:
            return Form.POOLING if pooling else _dialect(body)
        case ["token_ids"]:
            return Form.GENERATE
        case ["input"]:
            return Form.POOLING if pooling else Form.RESPONSES
        case ["prompt"]:
            return Form.COMPLETION
    if not body.keys().isdisjoint(_PAIRS):
        raise PromptError("pairs", "the engine puts a query and a document together in a way of its own")
    if "messages" in body:
        raise PromptError("bad_messages", "messages must be a list")
    return Form.COMPLETION


def _dialect(body: Mapping[str, Any]) -> Form:
    """OpenAI's or Anthropic's."""
    asks_a_limit = body.get("max_tokens") is not None  # Anthropic requires it
    if asks_a_limit and any(body.get(name) is not None for name in _MESSAGES_ONLY):
        return Form.MESSAGES  # a chat request with such a field is served too: the field is not read
    if tools := body.get("tools"):
        first = tools[0] if isinstance(tools, list) else None
        anthropic = isinstance(first, Mapping) and "input_schema" in first and "function" not in first
        return Form.MESSAGES if anthropic else Form.CHAT
    if not asks_a_limit or not _CHAT_ONLY.isdisjoint(body):
        return Form.CHAT if not _has_blocks(body["messages"]) else Form.MESSAGES
    return _by_content(body["messages"])


def _has_blocks(messages: Any) -> bool:
    """Whether there is a content block that no chat request has. Most messages are text, and passed over quickly."""
    if not isinstance(messages, list):
        return False
    with_parts = [m for m in messages if isinstance(m, dict) and isinstance(m.get("content"), list)]
    return any(kind in _BLOCKS_ONLY for message in with_parts for kind in _kinds(message))


def _by_content(messages: Any) -> Form:
    """Of a conversation with `max_tokens`. Most need no second look: text, and one system message in front."""
    plain = True
    form = None
    for at, message in enumerate(_objects(messages)):
        role, content = message.get("role"), message.get("content")
        if (
            role not in ("user", "assistant", "system")
            or not isinstance(content, str | list)
            or message.get("tool_calls")
        ):
            return Form.CHAT
        for kind in _kinds(message):
            if kind not in _BLOCKS:
                return Form.CHAT
            if kind in _BLOCKS_ONLY:
                form = Form.MESSAGES
            plain = False
        plain = plain and (role != "system" or (at == 0 and not str(content).startswith("x-anthropic-")))
    return form or (Form.CHAT if plain else Form.EITHER)


def _objects(values: Any) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


def _kinds(message: Mapping[str, Any]) -> list[Any]:
    """Types of its content parts."""
    return [kind for part in _objects(message.get("content")) if isinstance(kind := part.get("type"), str | None)]
