"""Chats are rendered with the template and the settings that the engine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ConfigError, PromptError
from serve_app.prompts.chat import ChatRenderer
from serve_app.prompts.request import ChatPrompt, parse_request
from tests.unit.prompts.conftest import write_model

USER = {"role": "user", "content": "hi"}
KWARGS = (
    "{{ messages[0].role }} {{ color }} {{ (tools or []) | length }} {{ (documents or []) | length }} "
    "{{ bos_token }} {{ hidden }}"
)


def prompt(**fields: Any) -> ChatPrompt:
    (parsed,) = parse_request({"messages": [USER], **fields})
    assert isinstance(parsed, ChatPrompt)
    return parsed


def reason(renderer: ChatRenderer, **fields: Any) -> str:
    with pytest.raises(PromptError) as caught:
        renderer.render(prompt(**fields))
    return caught.value.reason


def test_the_models_template(chatml_path: str) -> None:
    renderer = ChatRenderer(chatml_path)
    assert renderer.render(prompt()) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.render(prompt(add_generation_prompt=False)) == "<|im_start|>user\nhi<|im_end|>\n"


def test_continued_message(chatml_path: str) -> None:
    fields = {"messages": [USER, {"role": "assistant", "content": "I am"}], "continue_final_message": True}
    renderer = ChatRenderer(chatml_path)
    assert renderer.render(prompt(**fields, add_generation_prompt=False)).endswith("<|im_start|>assistant\nI am")
    assert reason(renderer, **fields) == "template_error"


def test_template_given_by_the_engine(chatml_path: str) -> None:
    assert ChatRenderer(chatml_path, "{{ messages[0].content }}!").render(prompt()) == "hi!"


def test_content_format_given_by_the_engine(chatml_path: str) -> None:
    template = "{{ messages[0].content | tojson }}"
    assert ChatRenderer(chatml_path, template).render(prompt()) == '"hi"'
    openai = ChatRenderer(chatml_path, template, "openai")
    assert openai.render(prompt()) == '[{"type": "text", "text": "hi"}]'


def test_what_the_template_sees(chatml_path: str) -> None:
    renderer = ChatRenderer(chatml_path, KWARGS, default_kwargs={"color": "red"})
    assert renderer.render(prompt()) == "user red 0 0 <|im_start|> "
    fields = {
        "documents": [{"a": "b"}],
        "tools": [{"function": {"name": "f"}}],
        "chat_template_kwargs": {"color": "blue"},
    }
    assert renderer.render(prompt(**fields)) == "user blue 1 1 <|im_start|> "
    assert (
        renderer.render(prompt(chat_template_kwargs={"color": None, "tokenize": True})) == "user red 0 0 <|im_start|> "
    )


def test_developer_role(chatml_path: str) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, USER]
    assert ChatRenderer(chatml_path).render(prompt(messages=messages)).startswith("<|im_start|>system\nBe brief.")
    knows = "{% if messages[0].role == 'developer' %}yes{% endif %}"
    assert ChatRenderer(chatml_path, knows).render(prompt(messages=messages)) == "yes"


def test_refused(chatml_path: str) -> None:
    renderer = ChatRenderer(chatml_path)
    assert reason(renderer, chat_template="x") == "untrusted_template"
    assert reason(renderer, chat_template_kwargs={"chat_template": "x"}) == "untrusted_template"
    assert reason(renderer, chat_template_kwargs={"conversation": []}) == "template_error"
    assert reason(ChatRenderer(chatml_path, "{{ raise_exception('no') }}")) == "template_error"
    assert reason(ChatRenderer(chatml_path, "{{ 1 / 0 }}")) == "template_error"
    assert reason(ChatRenderer(chatml_path, "{% for")) == "template_error"


def test_models_that_vllm_renders_itself(tmp_path: Path) -> None:
    assert reason(ChatRenderer(write_model(tmp_path, architectures=["GptOssForCausalLM"]))) == "unsupported_model"


def test_template_of_the_processor(tmp_path: Path) -> None:
    """vLLM takes it for requests without tools, unless the engine was given a template."""
    path = write_model(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    extractor = '{"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "%s"}'
    (tmp_path / "preprocessor_config.json").write_text(extractor % "Qwen2AudioProcessor")
    assert ChatRenderer(path).render(prompt()) == "processor"
    assert ChatRenderer(path).render(prompt(tools=[{"function": {"name": "f"}}])).startswith("<|im_start|>")
    assert ChatRenderer(path, "{{ messages[0].content }}").render(prompt()) == "hi"


def test_template_of_a_processor_that_is_none(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert ChatRenderer(path).render(prompt()).startswith("<|im_start|>")


def test_bad_settings(chatml_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        ChatRenderer(chatml_path, content_format="xml")
    with pytest.raises(ConfigError):
        ChatRenderer(str(tmp_path))
