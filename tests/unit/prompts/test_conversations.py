"""Conversations that go on, are edited or cut: ids are those of the whole prompt, whatever a template looks at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from serve_app.errors import PromptError
from serve_app.prompts import conversations
from serve_app.prompts.chat import ChatRenderer
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.request import ChatPrompt, parse_request
from serve_app.prompts.tokenizer import Tokenizer
from serve_app.types import EngineSpec, ModelId
from tests.integration.tiny_models import TEMPLATES

EXAMPLES = 200 if os.environ.get("KVCACHE_PARITY") == "full" else 15  # histories for each template


def loop(inner: str = "", over: str = "messages") -> str:
    start = f"{{% for m in {over} %}}<|im_start|>{{{{ m.role }}}} {{{{ m.content }}}}"
    return f"{start}{inner}<|im_end|>\n{{% endfor %}}"


def counted(attribute: str, inner: str) -> str:
    return f"{{% set ns = namespace({attribute}) %}}{loop(inner)}"


# How templates of today's models tell old turns from the last one, each reduced to that.
STRIPS = {
    "number of the last question, asked with >": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        + loop("{% if loop.index0 > ns.last %}{{ m.reasoning_content }}{% endif %}")
    ),
    "asked with >=": (
        "{% set ns = namespace(last=0, first=true) %}{% for m in messages[::-1] %}"
        "{% if ns.first and m.role == 'user' %}{% set ns.last = messages|length - loop.index0 - 1 %}"
        "{% set ns.first = false %}{% endif %}{% endfor %}"
        + loop("{% if ns.last <= loop.index0 %}{{ m.reasoning_content }}{% else %}old{% endif %}")
    ),
    "a state that goes from turn to turn": (
        "{% set ns = namespace(tool=false, calls=0, text='') %}"
        + loop(
            "{{ ns.calls }}{% if m.role == 'tool' %}{% set ns.tool = true %}{% set ns.calls = ns.calls + 1 %}"
            "{% elif ns.tool %}!{% set ns.tool = false %}{% endif %}{% set ns.text = ns.text ~ m.role[0] %}"
            "{% if loop.last %}{{ ns.text }}{% endif %}"
        )
    ),
    "the end, in the last turn": loop("{% if loop.last %}END{% endif %}{{ loop.index }}{{ loop.cycle('x', 'y') }}"),
    "neighbours": loop(
        "{{ (loop.previtem or m).role }}{{ (loop.nextitem or m).role }}"
        "{{ messages[loop.index0 - 1].role if not loop.first }}"
    ),
    "nothing between turns": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "the next by its number": loop(
        "{% if messages[loop.index0 + 1] is defined %}{{ messages[loop.index].role }}{% endif %}"
    ),
    "without the system message": (
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% if rest is iterable %}"
        + loop("{{ loop.first }}", "rest")
        + "{% endif %}{% set rest = none %}{{ messages[-1].role }}{{ messages|length }}"
    ),
    "a macro that reads what is set": (
        "{% set sep = tools|length if tools else 0 %}{% macro show(m) %}{{ sep }}{{ m.content }}{% endmacro %}"
        "{% set system = messages[0].content %}" + loop("{{ show(m) }}{{ system }}")
    ),
    "dates before the loop": "{{ strftime_now('%Y') }}" + loop(),
    "checks, then text": (
        "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no') }}{% endif %}{% endfor %}" + loop()
    ),
}
# What has to be rendered whole, or is: each would be wrong if any of it were taken for granted.
AWKWARD = {
    "asked from both sides": (
        "{% set ns = namespace(last=messages|length // 2) %}"
        + loop("{% if 1 < ns.last < loop.index %}a{% elif not ns.last > loop.index0 %}b{% endif %}")
    ),
    "length in every turn": loop("{{ messages|length }}"),
    "loop's length": loop("{{ loop.length }}{{ loop.revindex }}"),
    "the last message in every turn": loop("{{ messages[-1].content }}"),
    "the first tells of the last": loop("{{ messages[loop.index0 - 1].role }}"),
    "a number set before": "{% set n = messages|length %}" + loop("{{ n - loop.index }}"),
    "a number told": counted("n=messages|length", "{{ ns.n }}"),
    "a number in arithmetic": counted("n=messages|length", "{{ 'z' * (ns.n - loop.index0) }}"),
    "a number as a place": counted("n=messages|length - 1", "{{ messages[ns.n].role }}"),
    "a number for equal": counted("n=messages|length - 1", "{% if ns.n == loop.index0 %}L{% endif %}"),
    "a number's kind": counted("n=messages|length", "{{ ns.n is integer }}{{ ns.n is number }}{{ ns.n|string }}"),
    "a number or none": counted("n=none if messages|length % 2 else 3", "{{ ns.n is none }}"),
    "a list kept": counted("all=[]", "{% set ns.all = ns.all + [m.role] %}{{ ns.all|length }}"),
    "messages that are left": (
        "{% set left = messages|selectattr('role', 'equalto', 'user') %}" + loop("{{ (left|first).content }}")
    ),
    "the last turns only": loop("", "messages[-3:]"),
    "backwards": loop("", "messages|reverse"),
    "chosen": loop("{{ loop.index }}", "messages if m.role != 'tool'"),
    "twice": loop() + loop(),
    "changed": loop("{% if loop.changed(m.role) %}~{% endif %}"),
    "joined": "{% set comma = joiner(',') %}" + loop("{{ comma() }}"),
    "until": loop("{% if m.content == 'stop' %}{% break %}{% endif %}") + "{{ messages|length }}",
    "the whole list": loop() + "{{ messages|tojson }}{{ messages|list|length }}",
    "in a macro": "{% macro all() %}" + loop() + "{% endmacro %}{{ all() }}",
    "in a variable": "{% set text %}" + loop() + "{% endset %}{{ text|length }}{{ text }}",
    "a list's method": "{{ messages.index(messages[0]) }}" + loop(),
    "compared": "{{ messages == [] }}" + loop(),
    "set behind the loop": loop("{{ color }}") + "{% set color = 'late' %}{{ color }}",
}
ALL = TEMPLATES | STRIPS | AWKWARD

texts = st.lists(
    st.sampled_from(
        ["hello", " ", "the quick brown fox", "\n", "<|im_end|>", "<|im_", "start|>", "stop", "é", "a b", ""]
    ),
    max_size=4,
).map("".join)
EOS = {"eos_token": "<|im_end|>"}  # which the tokenizer does not name
CALL = [{"type": "function", "id": "c", "function": {"name": "f", "arguments": '{"x": 1.0}'}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": [1, 1.0, True, None]}}}
messages = st.one_of(
    texts.map(lambda text: {"role": "user", "content": text}),
    st.builds(lambda text, why: {"role": "assistant", "content": text, "reasoning_content": why}, texts, texts),
    texts.map(lambda text: {"role": "assistant", "content": f"<think>\n{text}\n</think>\n\nso"}),
    st.just({"role": "assistant", "content": None, "tool_calls": CALL}),
    texts.map(lambda text: {"role": "tool", "content": text, "tool_call_id": "c"}),
    texts.map(lambda text: {"role": "system", "content": text}),
    st.just({"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}),
    st.just({"role": "critic", "content": "x"}),
    st.just({"role": "developer", "content": "x"}),
)
turns = st.lists(texts, min_size=2, max_size=4).map(
    lambda t: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(t[: len(t) // 2 * 2])]
)
edits = st.one_of(
    st.tuples(st.just("go on"), turns),
    st.tuples(st.just("go on"), st.lists(messages, min_size=1, max_size=4)),
    st.tuples(st.just("edit"), st.tuples(st.integers(0, 30), messages)),
    st.tuples(st.just("edit"), st.tuples(st.integers(0, 30), texts.map(lambda t: {"role": "user", "content": t}))),
    st.tuples(st.just("drop"), st.integers(1, 3)),
    st.tuples(st.just("system"), texts),
    st.tuples(st.just("field"), st.tuples(st.just("tools"), st.sampled_from([None, [TOOL], [TOOL, TOOL]]))),
    st.tuples(
        st.just("field"),
        st.tuples(
            st.just("chat_template_kwargs"),
            st.fixed_dictionaries(
                {}, optional={"color": st.sampled_from([1, 1.0, True, "red"]), "enable_thinking": st.booleans()}
            ),
        ),
    ),
    st.tuples(st.just("field"), st.tuples(st.just("add_generation_prompt"), st.booleans())),
)


def edited(body: dict[str, Any], edit: tuple[str, Any]) -> dict[str, Any]:
    told = list(body["messages"])
    match edit:
        case ("go on", new):
            told += new
        case ("edit", (at, message)):
            told[at % len(told)] = message
        case ("drop", count):
            told = told[:-count] or told
        case ("system", text):
            told = [{"role": "system", "content": text}, *told[1:]]
        case ("field", (name, value)):
            return {**body, name: {**EOS, **value} if name == "chat_template_kwargs" else value}
    return {**body, "messages": told}


class Model:
    """An encoder with a store, and what it is compared with: every prompt rendered whole, by transformers."""

    def __init__(self, path: str, template: str) -> None:
        self.encoder = PromptEncoder(EngineSpec(ModelId("m"), 4, path, template), PrefixStore(10**7))
        self.encoder._tokenizer = Tokenizer(path, min_segment_chars=1, min_text_chars=3)
        self._renderer = ChatRenderer(path, template)
        self._backend = Backend.from_file(f"{path}/tokenizer.json")

    def forget(self) -> None:
        self.encoder._store = PrefixStore(10**7)

    def text(self, body: dict[str, Any]) -> str:
        (prompt,) = parse_request(body)
        assert isinstance(prompt, ChatPrompt)
        return self._renderer.render(prompt)

    def check(self, body: dict[str, Any]) -> None:
        assert self._ids(body) == self._ids_of_the_whole(body)

    def _ids(self, body: dict[str, Any]) -> list[int] | str:
        try:
            (prompt,) = self.encoder.encode(body)
        except PromptError as error:
            return error.reason
        return prompt.token_ids()

    def _ids_of_the_whole(self, body: dict[str, Any]) -> list[int] | str:
        try:
            text = self.text(body)
        except PromptError as error:
            return error.reason
        return list(self._backend.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module", autouse=True)
def short_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "STEP", 2)
        yield


@pytest.fixture(scope="module")
def models(chatml_path: str) -> dict[str, Model]:
    return {name: Model(chatml_path, template) for name, template in ALL.items()}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=EXAMPLES, deadline=None)
@given(start=turns, history=st.lists(edits, min_size=1, max_size=8))
def test_ids_are_those_of_the_whole_prompt(
    models: dict[str, Model], name: str, start: list[dict[str, Any]], history: list[tuple[str, Any]]
) -> None:
    model = models[name]
    model.forget()
    body: dict[str, Any] = {"messages": start, "chat_template_kwargs": EOS}
    model.check(body)
    for edit in history:
        body = edited(body, edit)
        model.check(body)
        model.check({**body, "messages": [*body["messages"], {"role": "user", "content": "and?"}]})


def conversation(count: int) -> dict[str, Any]:
    roles = ("user", "assistant")
    told = [{"role": roles[i % 2], "content": f"Turn {i}, reasonably long."} for i in range(count)]
    return {"messages": told, "chat_template_kwargs": EOS}


@pytest.mark.parametrize("name", [*TEMPLATES, *STRIPS])
def test_the_next_turn_is_not_rendered_whole(models: dict[str, Model], name: str) -> None:
    """Of 41 messages, no more than the last few."""
    model = models[name]
    model.forget()
    model.check(conversation(39))
    (prepared,) = model.encoder.prepare(conversation(41))
    text = "".join(segment.text for segment in prepared.segments)
    assert "Turn 40" in text
    assert "Turn 30" not in text
    assert model.text(conversation(41)).endswith(text)
    model.check(conversation(41))


def test_thinking_that_a_new_question_strips(models: dict[str, Model]) -> None:
    """Qwen 3: the steps of a task keep their thoughts until the next question, and are then rendered again."""
    model = models["qwen"]
    model.forget()
    task = conversation(9)["messages"]
    for step in range(6):
        call = {"role": "assistant", "content": "", "reasoning_content": f"thought {step}", "tool_calls": CALL}
        task = [*task, call, {"role": "tool", "tool_call_id": "c", "content": f"result {step}"}]
        model.check({"messages": task})
    assert "thought 0" in model.text({"messages": task})
    asked = {"messages": [*task, {"role": "user", "content": "Next."}]}
    assert "thought 0" not in model.text(asked)
    model.check(asked)


def test_evicted_segments_are_rendered_and_cut_again(models: dict[str, Model]) -> None:
    model = models["chatml"]
    model.forget()
    model.check(conversation(39))
    store = model.encoder._store
    store._entries.popitem(last=False)
    model.check(conversation(41))


def test_conversations_are_bounded(chatml_path: str) -> None:
    encoder = PromptEncoder(EngineSpec(ModelId("m"), 4, chatml_path), PrefixStore(2**18))
    for user in range(100):
        body = conversation(40)
        body["messages"][0]["content"] = f"I am user {user}."
        encoder.encode(body)
        assert encoder._store.conversations.size_bytes() <= 2**14
    assert encoder._store.conversations.size_bytes() > 2**13


def test_what_transformers_renders_counts(chatml_path: str) -> None:
    """Another version of it may give templates something else: the first conversation shows it."""
    model = Model(chatml_path, "{{ bos_token }}" + loop())
    model.encoder._renderer._special_tokens = {"bos_token": "other"}
    model.check(conversation(9))
    model.check(conversation(11))
