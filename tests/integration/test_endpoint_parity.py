"""Our token ids for `/v1/messages` and `/v1/responses` against vLLM's own converters and renderer, without a server.

Each template is used as the model's own and as `--chat-template`: what happens to system messages depends on it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from serve_app.errors import PromptError
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import EngineSpec, ModelId
from tests.integration import tiny_models
from tests.integration.oracle import Oracle, Refused
from tests.integration.test_prompt_parity import FRAGMENTS, FULL, SCHEMA
from tests.integration.tiny_models import TEMPLATES

pytestmark = pytest.mark.integration

MODEL = ModelId("parity")
SETUPS = [("llama 3", None), ("qwen", None), ("llama 3", "show all"), ("llama 2", "show strings")]
if FULL:
    SETUPS += [("qwen", name) for name in TEMPLATES] + [("word piece", "parts"), ("unigram", "chatml")]
GENERATED = 150 if FULL else 40

USER = {"role": "user", "content": "fix the bug"}
LONG = "You are a coding agent. " * 60
BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=9f3a2;"
BASH = {"name": "Bash", "description": "Run a command", "input_schema": {"properties": {"cmd": {"type": "string"}}}}
USE = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"cmd": "ls", "n": 1.0}}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def says(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", "content": content, **more}


CACHED = {"cache_control": {"type": "ephemeral"}}
TURN = [USER, says("assistant", text("ok"), USE)]
MESSAGES: dict[str, dict[str, Any]] = {
    "system text": {"system": LONG, "messages": [USER]},
    "system blocks": {"system": [text(LONG, **CACHED), text("Be brief.")], "messages": [says("user", text("hi"))]},
    "system with nothing else to tell it by": {"system": "", "messages": [USER], "stop_sequences": ["x"]},
    "billing header": {"system": [text(BILLING), text(LONG, **CACHED)], "messages": [USER]},
    "billing header as text": {"system": BILLING, "messages": [USER]},
    "tools": {"messages": [USER], "tools": [BASH, {"name": "x", "input_schema": SCHEMA, "strict": True}]},
    "tools, cached and of a type": {"messages": [USER], "tools": [{"type": "custom", **BASH, **CACHED}]},
    "tools empty": {"system": "s", "messages": [USER], "tools": []},
    "tool choice": {"messages": [USER], "tools": [BASH], "tool_choice": {"type": "tool", "name": "Bash"}},
    "tool choice any": {"messages": [USER], "tools": [BASH], "tool_choice": {"type": "any"}},
    "tool choice none": {"messages": [USER], "tools": [BASH], "tool_choice": {"type": "none"}},
    "tool result, text": {"messages": [*TURN, says("user", result("a.py", is_error=False))]},
    "tool result, blocks": {"messages": [*TURN, says("user", result([text("a"), text("b")]), text("go on"))]},
    "tool result, nothing": {"messages": [*TURN, says("user", {"type": "tool_result", "tool_use_id": "t1"})]},
    "tool result, reference": {
        "messages": [*TURN, says("user", result([{"type": "tool_reference", "tool_name": "Bash"}]))]
    },
    "two tool calls": {
        "messages": [USER, says("assistant", USE, {**USE, "id": "t2"}), says("user", result("1"), result("2"))]
    },
    "tool result of the assistant": {"messages": [USER, says("assistant", result([{"a": 1}]))]},
    "tool use of the user": {"messages": [says("user", USE, text("hm"))]},
    "thinking": {
        "messages": [USER, says("assistant", {"type": "thinking", "thinking": "h", "signature": "x"}, text("d")), USER],
        "thinking": {"type": "enabled", "budget_tokens": 99},
    },
    "thinking redacted": {"messages": [USER, says("assistant", {"type": "redacted_thinking", "data": "x"}), USER]},
    "system later": {
        "system": "first",
        "messages": [USER, {"role": "assistant", "content": "ok"}, {"role": "system", "content": "500 left"}, USER],
    },
    "system later, blocks": {
        "system": [text("first")],
        "messages": [USER, says("system", text(BILLING), text("a"), text("b")), USER],
    },
    "effort": {"messages": [USER], "output_config": {"effort": "high"}},
    "template kwargs": {"system": "s", "messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
    "empty texts": {"system": [text("")], "messages": [says("user", text(""), text("b"))]},
    "two texts": {"system": "s", "messages": [says("user", text("fix"), text("the bug"))]},
    "nothing said": {"system": "s", "messages": [USER, says("assistant"), says("user")]},
    "token ids of the prefill stage": {
        "system": "s",
        "messages": [USER],
        "kv_transfer_params": {"prompt_token_ids": [5, 6, 7]},
    },
}
REFUSED_MESSAGES: dict[str, dict[str, Any]] = {
    "block without a type": {"system": "s", "messages": [says("user", {"text": "a"})]},
    "other role": {"system": "s", "messages": [{"role": "tool", "content": "a"}]},
    "tool without schema": {"system": "s", "messages": [USER], "tools": [{"name": "x"}]},
    "system a number": {"system": 5, "messages": [USER]},
    "half a surrogate pair": {"system": "a\ud800", "messages": [USER]},
    "messages a text": {"system": "s", "messages": "hi"},
}

FUNCTION = {"type": "function", "name": "Bash", "description": "Run", "parameters": SCHEMA, "strict": False}
CALL = {"type": "function_call", "call_id": "c1", "name": "Bash", "arguments": '{"cmd": "ls", "a": 1.0}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "a.py"}
ASKED = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def answered(*texts: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": value, "annotations": []} for value in texts],
        **more,
    }


RESPONSES: dict[str, dict[str, Any]] = {
    "text": {"input": "hello " * 50},
    "instructions": {"input": "hello", "instructions": LONG},
    "items": {"input": [ASKED]},
    "items without a type": {"input": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
    "developer": {"input": [{"role": "developer", "content": "be brief"}, ASKED], "instructions": "x"},
    "several parts": {"input": [{**ASKED, "content": [{"type": "input_text", "text": t} for t in ("a", "", "b")]}]},
    "extra keys": {"input": [{**ASKED, "name": "bob", "content": [{"type": "input_text", "text": "a", "x": 1}]}]},
    "answer": {"input": [ASKED, answered("one", "two"), ASKED]},
    "answer as text": {"input": [ASKED, {"role": "assistant", "content": "one"}, ASKED]},
    "two answers": {"input": [ASKED, answered("one"), answered("two"), ASKED]},
    "function call": {"input": [ASKED, CALL, OUTPUT], "tools": [FUNCTION]},
    "function calls behind an answer": {
        "input": [ASKED, answered("ok"), CALL, {**CALL, "call_id": "c2"}, OUTPUT, {**OUTPUT, "call_id": "c2"}]
    },
    "function call, nothing given": {"input": [ASKED, {**CALL, "arguments": ""}, OUTPUT]},
    "function call of a namespace": {"input": [ASKED, {**CALL, "namespace": "shell"}, OUTPUT]},
    "output of parts": {"input": [ASKED, CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "a"}]}]},
    "output as it was returned": {"input": [ASKED, CALL, {**OUTPUT, "id": "o", "status": "completed"}]},
    "reasoning": {"input": [ASKED, THOUGHT, answered("so"), ASKED]},
    "reasoning and call": {"input": [ASKED, THOUGHT, CALL, OUTPUT]},
    "reasoning summary": {
        "input": [ASKED, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}, ASKED]
    },
    "reasoning of nothing": {"input": [ASKED, {"type": "reasoning", "summary": [], "content": []}, answered("x")]},
    "tools": {"input": "hi", "tools": [FUNCTION, {"type": "function", "name": "x", "parameters": None}]},
    "tools of others only": {"input": "hi", "tools": [{"type": "web_search"}]},
    "tools of a namespace": {
        "input": "hi",
        "tools": [
            {"type": "namespace", "name": "fs", "description": "d", "tools": [FUNCTION]},
            {"type": "custom", "name": "c"},
        ],
    },
    "tool choice none": {"input": "hi", "tools": [FUNCTION], "tool_choice": "none"},
    "tool choice": {"input": "hi", "tools": [FUNCTION], "tool_choice": {"type": "function", "name": "Bash"}},
    "effort": {"input": "hi", "reasoning": {"effort": "low", "summary": "auto"}},
    "effort none": {"input": "hi", "reasoning": {"effort": "none"}},
    "continued": {"input": [ASKED, answered("The capital", id="m", status="incomplete")]},
    "Codex": {
        "instructions": LONG,
        "input": [{"role": "developer", "content": [{"type": "input_text", "text": "x"}], "type": "message"}, ASKED],
        "tools": [FUNCTION],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": None,
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
    },
}
REFUSED_RESPONSES: dict[str, dict[str, Any]] = {
    "input a number": {"input": 5},
    "item a text": {"input": ["hi"]},
    "call without a name": {"input": [{"type": "function_call", "call_id": "c", "arguments": ""}]},
    "encrypted reasoning": {"input": [ASKED, {"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
    "half a surrogate pair": {"input": "a\udc00"},
    "refusal": {"input": [ASKED, {**answered(), "content": [{"type": "refusal", "refusal": "no"}]}, ASKED]},
}


class Pair:
    """vLLM's oracle and our encoder for the same engine."""

    def __init__(self, family: str, template: str | None, folder: Any, excludes_tools: bool = False) -> None:
        path, source = tiny_models.build(family, folder), TEMPLATES.get(template or "")
        self.vllm = Oracle(path, source, excludes_tools=excludes_tools)
        self._encoder = PromptEncoder(
            EngineSpec(MODEL, 16, path, source, excludes_tools=excludes_tools), PrefixStore(1 << 22)
        )

    def ours(self, body: dict[str, Any]) -> list[int]:
        return self._encoder.encode(json.loads(json.dumps(body)))[0].token_ids()

    def compare(self, endpoint: str, body: dict[str, Any]) -> None:
        """Equal ids, cold and from the store; or refused by both."""
        body = {"model": MODEL, **({"max_tokens": 8} if endpoint == "messages" else {}), **body}
        try:
            expected = getattr(self.vllm, endpoint)(json.loads(json.dumps(body)))
        except Refused as error:
            with pytest.raises(PromptError):
                pytest.fail(f"refused by vLLM only ({error}); ours: {self.ours(body)}")
            return
        assert self.ours(body) == expected
        assert self.ours(body) == expected, "from the store"


@pytest.fixture(scope="module", params=SETUPS, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, template = request.param
    return Pair(family, template, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(pair: Pair, name: str) -> None:
    pair.compare("messages", MESSAGES[name])


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(pair: Pair, name: str) -> None:
    pair.compare("responses", RESPONSES[name])


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        *(pytest.param("messages", body, id=name) for name, body in REFUSED_MESSAGES.items()),
        *(pytest.param("responses", body, id=name) for name, body in REFUSED_RESPONSES.items()),
    ],
)
def test_refused_by_both(pair: Pair, endpoint: str, body: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        getattr(pair.vllm, endpoint)({"model": MODEL, "max_tokens": 8, **body})
    with pytest.raises(PromptError):
        pair.ours({"model": MODEL, "max_tokens": 8, **body})


@pytest.mark.parametrize("endpoint", ["chat", "messages", "responses"])
def test_tools_are_left_out(endpoint: str, tmp_path: Any) -> None:
    """`--exclude-tools-when-tool-choice-none`."""
    excluding = Pair("qwen", None, tmp_path, excludes_tools=True)
    openai = {"type": "function", "function": {"name": "x"}}
    body = {
        "chat": {"messages": [USER], "tools": [openai], "tool_choice": "none"},
        "messages": MESSAGES["tool choice none"],
        "responses": RESPONSES["tool choice none"],
    }[endpoint]
    excluding.compare(endpoint, body)


fragments = st.lists(
    st.sampled_from(FRAGMENTS[:-1]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=3
)
texts = fragments.map("".join)
values = st.none() | st.booleans() | st.integers(-9, 9) | texts
objects = st.dictionaries(texts, values, max_size=3)
ids = st.sampled_from(["t1", "t2"])
text_blocks = st.builds(text, texts)
blocks = st.one_of(
    text_blocks,
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": texts}, optional={"signature": texts}),
    st.fixed_dictionaries({"type": st.just("tool_use"), "id": ids, "name": texts}, optional={"input": objects}),
    st.fixed_dictionaries(
        {"type": st.just("tool_result"), "tool_use_id": ids},
        optional={"content": texts | st.lists(text_blocks, max_size=2)},
    ),
)
anthropic = st.fixed_dictionaries(
    {
        "system": texts.filter(bool) | st.lists(text_blocks, min_size=1, max_size=2),
        "messages": st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["user", "assistant"]),
                    "content": texts | st.lists(blocks, max_size=3),
                }
            )
            | st.fixed_dictionaries({"role": st.just("system"), "content": texts | st.lists(text_blocks, max_size=2)}),
            min_size=1,
            max_size=5,
        ),
    },
    optional={
        "tools": st.lists(
            st.fixed_dictionaries({"name": texts, "input_schema": objects}, optional={"description": texts}), max_size=2
        ),
        "output_config": st.just({"effort": "low"}),
    },
)
items = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "developer"]), "content": texts},
        optional={"type": st.just("message")},
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("user"),
            "content": st.lists(
                st.fixed_dictionaries({"type": st.just("input_text"), "text": texts}), min_size=1, max_size=2
            ),
        }
    ),
    st.builds(lambda parts, more: answered(*parts, **more), st.lists(texts, min_size=1, max_size=2), st.just({})),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": texts}),
    st.fixed_dictionaries(
        {"type": st.just("function_call"), "call_id": ids, "name": texts, "arguments": texts | objects.map(json.dumps)}
    ),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": ids, "output": texts}),
    st.builds(lambda t: {**THOUGHT, "content": [{"type": "reasoning_text", "text": t}]}, texts),
)
responses = st.fixed_dictionaries(
    {"input": texts | st.lists(items, min_size=1, max_size=6)},
    optional={
        "instructions": texts,
        "tools": st.lists(
            st.fixed_dictionaries(
                {"type": st.just("function"), "name": texts, "parameters": objects}, optional={"description": texts}
            ),
            max_size=2,
        ),
        "reasoning": st.just({"effort": "high"}),
    },
)
generated = settings(
    max_examples=GENERATED,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def equal_where_served(pair: Pair, endpoint: str, body: dict[str, Any]) -> None:
    """What vLLM refuses may be scored: the engine answers such a request, with the error."""
    try:
        expected = getattr(pair.vllm, endpoint)({"model": MODEL, "max_tokens": 8, **json.loads(json.dumps(body))})
    except Refused:
        return
    assert pair.ours({"model": MODEL, "max_tokens": 8, **body}) == expected


@generated
@given(body=anthropic)
def test_generated_messages(pair: Pair, body: dict[str, Any]) -> None:
    equal_where_served(pair, "messages", body)


@generated
@given(body=responses)
def test_generated_responses(pair: Pair, body: dict[str, Any]) -> None:
    equal_where_served(pair, "responses", body)
