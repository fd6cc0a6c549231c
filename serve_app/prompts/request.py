"""Body of a request -> the prompts in it.

In: parsed JSON of any endpoint that generates or embeds (forms.py). Out: one `Prompt` per prompt, nothing rendered yet.
Defaults are those of vLLM 0.29 (`ChatCompletionRequest`, `CompletionRequest`, ...). Checks here are only those without
which there is no prompt: a request that vLLM will refuse may pass, since then the engine answers it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.blocks import pack_tokens
from serve_app.errors import PromptError
from serve_app.prompts import anthropic, responses
from serve_app.prompts.forms import Form, recognise
from serve_app.types import ModelId

MAX_CACHE_SALT_CHARS = 1024
MAX_PROMPTS = 64  # each costs the router's event loop some 0.1 ms, during which every other request stands still
# Of transformers' apply_chat_template: without effect unless it tokenizes.
_TOKENIZER_ARGUMENTS = frozenset({"padding", "truncation", "max_length", "return_tensors", "tokenizer_kwargs"})


@dataclass(frozen=True, slots=True)
class EngineRules:
    """What the prompts of a request depend on, beside the request."""

    pooling: bool = False  # it embeds, classifies or ranks
    excludes_tools: bool = False  # vLLM's --exclude-tools-when-tool-choice-none
    merges_system: bool = True  # of /v1/messages: see anthropic.merges_system


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation that has to go through the chat template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None  # as vLLM hands them to the template
    documents: Sequence[Mapping[str, str]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None  # from the request; refused unless the engine trusts it
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # `reasoning_effort` merged in
    ordered: bool = True  # the types of a chat request put the keys of tool calls in their order
    other: ChatPrompt | None = None  # what another endpoint makes of the same body: scored if both render alike


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text that is tokenized as it is."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids that the client has made itself, packed (blocks.pack_tokens)."""

    packed: bytes


Prompt = ChatPrompt | TextPrompt | TokenPrompt


_AS_VLLM = EngineRules()


def parse_request(body: Mapping[str, Any], rules: EngineRules = _AS_VLLM) -> list[Prompt]:
    """The prompts of a request.

    Args:
        body: parsed JSON.
        rules: of the engine.

    Raises:
        PromptError: there is no prompt that can be scored; `reason` says why, in one word.
    """
    if body.get("truncate_prompt_tokens") is not None:
        # What is left depends on the context length and the output tokens asked for: the engine's business.
        raise PromptError("truncated", "truncate_prompt_tokens is not scored")
    match recognise(body, rules.pooling):
        case Form.COMPLETION:
            return _completion(body)
        case Form.GENERATE:
            return _generate(body)
        case Form.POOLING:
            return _pooling(body, rules)
        case Form.RESPONSES:
            return [_chat(responses.to_chat(body), rules, ordered=False)]
        case Form.MESSAGES:
            return [_chat(anthropic.to_chat(body, rules.merges_system), rules)]
        case Form.EITHER:
            one, other = _chat(body, rules), _chat(anthropic.to_chat(body, rules.merges_system), rules)
            if isinstance(one, ChatPrompt) and isinstance(other, ChatPrompt):
                return [replace(one, other=other)]
            return [one]
    if body.get("tools") == []:
        raise PromptError("bad_tools", "tools must be a list with at least one tool")
    return [_chat(body, rules)]


def namespace_of(
    body: Mapping[str, Any], base_model: ModelId, aliases: Collection[str] = ()
) -> tuple[str | None, str | None]:
    """LoRA name and cache salt of a request: what, beside the tokens, decides whether blocks can be shared.

    Args:
        body: the request.
        base_model: the name that the engine serves its base model under.
        aliases: more names of the base model (vLLM's `--served-model-name a b`).
    """
    model = body.get("model")
    if model is not None and not _is_text(model):
        raise PromptError("bad_model", "model must be a string")
    salt = body.get("cache_salt")
    if salt is not None and not (_is_text(salt) and 0 < len(salt) <= MAX_CACHE_SALT_CHARS):
        raise PromptError("bad_cache_salt", f"cache_salt must be a string of 1 to {MAX_CACHE_SALT_CHARS} characters")
    is_base = not model or model == base_model or model in aliases
    return (None if is_base else model), salt


def _chat(body: Mapping[str, Any], rules: EngineRules, *, generates: bool = True, ordered: bool = True) -> Prompt:
    reused = body.get("kv_transfer_params")
    if isinstance(reused, Mapping) and reused.get("prompt_token_ids"):
        # The prefill stage of a disaggregated fleet hands its token ids on; vLLM then does not render either.
        return _token_prompt(reused["prompt_token_ids"])
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise PromptError("bad_messages", "messages must be a list with at least one message")
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise PromptError("bad_messages", "every message must be an object with a role")
    template = body.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise PromptError("bad_field", "chat_template must be a string")
    kwargs = _chat_template_kwargs(body)
    no_tools = rules.excludes_tools and body.get("tool_choice") == "none"
    return ChatPrompt(
        messages=messages,
        tools=None if no_tools else _tools(body.get("tools")),
        documents=_list_of_objects(body, "documents"),
        add_generation_prompt=_flag(body, "add_generation_prompt", generates),
        continue_final_message=_flag(body, "continue_final_message", False),
        add_special_tokens=_add_special_tokens(body, kwargs),
        chat_template=template,
        chat_template_kwargs=kwargs,
        ordered=ordered,
    )


def _add_special_tokens(body: Mapping[str, Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the rendered text gets BOS and the like: never when `apply_chat_template` is told to tokenize."""
    given = _flag(body, "add_special_tokens", False)
    tokenizes = kwargs.get("tokenize")
    if tokenizes == "auto":  # vLLM takes it for "not given"
        tokenizes = None
    if tokenizes and not _TOKENIZER_ARGUMENTS.isdisjoint(kwargs):
        raise PromptError("truncated", "chat_template_kwargs ask the chat template to tokenize in a way of its own")
    return given and not tokenizes and not _flag(body, "return_assistant_tokens_mask", False)


def _chat_template_kwargs(body: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for the template, as `ChatCompletionRequest.build_chat_params` collects them."""
    given = body.get("chat_template_kwargs")
    if given is not None and not isinstance(given, Mapping):
        raise PromptError("bad_field", "chat_template_kwargs must be an object")
    kwargs = dict(given or {})
    effort = body.get("reasoning_effort")
    if effort is not None:
        kwargs.setdefault("enable_thinking", effort != "none")
        kwargs["reasoning_effort"] = effort
    return kwargs


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools in the shape of vLLM's `ChatCompletionToolsParam.model_dump()`: key order and nulls reach the prompt."""
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise PromptError("bad_tools", "tools must be a list")
    return [_tool(t) for t in tools]


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError("bad_tools", "every tool must be an object with a named function")
    for value, kind in (
        (function.get("description"), str),
        (function.get("parameters"), Mapping),
        (function.get("strict"), bool),
        (function.get("defer_loading"), bool),
        (tool.get("defer_loading"), bool),
    ):
        if value is not None and not isinstance(value, kind):  # pydantic refuses it, or makes a flag of a word
            raise PromptError("bad_tools", f"a field of a tool must be of type {kind.__name__}")
    dumped: dict[str, Any] = {key: function.get(key) for key in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        dumped["strict"] = function["strict"]
    deferred = tool.get("defer_loading")
    function_deferred = function.get("defer_loading", None)
    if function_deferred is None:
        function_deferred = deferred
    if function_deferred is not None:
        dumped["defer_loading"] = function_deferred
    result: dict[str, Any] = {"type": tool.get("type", "function"), "function": dumped}
    if deferred is not None:
        result["defer_loading"] = deferred
    return result


def _completion(body: Mapping[str, Any]) -> list[Prompt]:
    if body.get("prompt_embeds"):
        raise PromptError("prompt_embeds", "a prompt given as embeddings has no tokens")
    if body.get("suffix") is not None:
        raise PromptError("bad_field", "suffix is not supported by the engine")
    if not body.get("prompt"):
        raise PromptError("no_prompt", "the request has neither messages nor a prompt")
    return _texts_or_ids(body["prompt"], _flag(body, "add_special_tokens", True))


def _generate(body: Mapping[str, Any]) -> list[Prompt]:
    if body.get("features") or body.get("content_parts"):
        raise PromptError("media", "where the images are among the token ids is not known")
    return [_token_prompt(body["token_ids"])]


def _pooling(body: Mapping[str, Any], rules: EngineRules) -> list[Prompt]:
    given = body.get("input")
    if isinstance(given, list) and given and isinstance(given[0], Mapping):
        body = {**body, "messages": given}
    if body.get("messages") is not None:
        return [_chat(body, rules, generates=False)]
    if not given:
        raise PromptError("no_prompt", "the request has no input")
    return _texts_or_ids(given, _flag(body, "add_special_tokens", True))


def _texts_or_ids(prompt: Any, special: bool) -> list[Prompt]:
    """One text or several, the token ids of one or of several."""
    if isinstance(prompt, str):
        return [TextPrompt(prompt, special)]
    if not isinstance(prompt, list):
        raise PromptError("bad_prompt", "prompt must be a string, token ids, or a list of either")
    if len(prompt) > MAX_PROMPTS and isinstance(prompt[0], str | list):
        raise PromptError("many_prompts", f"the request has {len(prompt)} prompts, more than {MAX_PROMPTS}")
    if all(isinstance(p, str) for p in prompt):
        return [TextPrompt(p, special) for p in prompt]
    if all(isinstance(p, list) for p in prompt):
        return [_token_prompt(p) for p in prompt]
    return [_token_prompt(prompt)]


def _token_prompt(ids: Any) -> TokenPrompt:
    try:
        if isinstance(ids, list) and set(map(type, ids)) <= {int}:  # a bool is an int, but no token
            return TokenPrompt(pack_tokens(ids))
    except OverflowError:
        pass
    raise PromptError("bad_prompt", "token ids must be integers from 0 to 2**32 - 1")


def _is_text(value: Any) -> bool:
    """Whether it is a string without half surrogate pairs, which JSON may hold and UTF-8 cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise PromptError("bad_field", f"{name} must be true or false")
    return value


def _list_of_objects(body: Mapping[str, Any], name: str) -> list[Mapping[str, str]] | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
        raise PromptError("bad_field", f"{name} must be a list of objects")
    return value
