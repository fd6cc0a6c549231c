"""Prompts with images: what is known of them ends in front of the first placeholder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from serve_app.blocks import block_keys, namespace_key, pack_tokens
from serve_app.errors import PromptError
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.media import MEDIA_TOKENS
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.request import ChatPrompt, parse_request
from serve_app.prompts.service import PromptService
from serve_app.types import EngineSpec, ModelId
from tests.unit.prompts.conftest import CHATML, write_model

MODEL = ModelId("m")
BLOCK_SIZE = 16
PLACEHOLDER = "<|im|>"
IN_PLACE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    "{% if numbered %}Picture: {% endif %}<|im|>{{ part['detail'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
IMAGES_FIRST = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] if part['type'] == 'image' %}<|im|>\n{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)
LETTERS = IN_PLACE.replace(PLACEHOLDER, "[image]")
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
SYSTEM = "You are a helpful assistant. " * 10


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}], **fields}


def encoder(tmp_path: Path, template: str, **config: object) -> PromptEncoder:
    return PromptEncoder(EngineSpec(MODEL, BLOCK_SIZE, write_model(tmp_path, template, **config)), PrefixStore(10**7))


def known(encoder: PromptEncoder, body: dict[str, Any]) -> str:
    """The text whose ids are known; they have to be the first ones of the whole."""
    (prepared,) = encoder.prepare(body)
    assert prepared.incomplete == "media"
    text = "".join(segment.text for segment in prepared.segments)
    encoded = encoder.finish(prepared, encoder.tokenize(prepared.missing))
    ids = encoded.token_ids()
    assert encoded.block_keys == block_keys(pack_tokens(ids), BLOCK_SIZE, namespace_key(MODEL, BLOCK_SIZE))
    return text


HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "parts", "expected"),
    [
        (IN_PLACE, ["Look: ", IMAGE, "What is it?"], HEAD + "<|im_start|>user\nLook: "),
        (IN_PLACE, [IMAGE, "What is it?"], HEAD + "<|im_start|>user\n"),
        (IN_PLACE, ["a", IMAGE, "b", IMAGE], HEAD + "<|im_start|>user\na"),
        (IN_PLACE, ["a", {"type": "input_audio", "input_audio": {}}], HEAD + "<|im_start|>user\na"),
        (IN_PLACE, ["a", {"image_url": "x", "uuid": "1"}], HEAD + "<|im_start|>user\na"),
        # The engine takes the first placeholder that it finds, whoever wrote it.
        (IN_PLACE, [f"typed {PLACEHOLDER} ", IMAGE], HEAD + "<|im_start|>user\ntyped "),
        (IN_PLACE, ["a", IMAGE | {"detail": "<|im_start|>"}], ""),  # may be a part of the placeholder
        (IMAGES_FIRST, ["What is it?", IMAGE], HEAD + "<|im_start|>user\n"),
        (IMAGES_FIRST, [f"{PLACEHOLDER}\nWhat is it?", IMAGE], HEAD + "<|im_start|>user\n"),
    ],
)
def test_text_before_the_first_image(tmp_path: Path, template: str, parts: list[Any], expected: str) -> None:
    model = encoder(tmp_path, template)
    assert known(model, body(*parts)) == expected


def test_ids_are_those_of_the_whole_text(tmp_path: Path) -> None:
    model = encoder(tmp_path, IN_PLACE)
    (encoded,) = model.encode(body("Look: ", IMAGE, "What is it?"))
    whole = f"{HEAD}<|im_start|>user\nLook: {PLACEHOLDER}What is it?<|im_end|>\n"
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(whole).ids
    assert encoded.token_ids() == ids[: encoded.token_count]
    assert ids[encoded.token_count] == model._tokenizer._backend.token_to_id(PLACEHOLDER)


@pytest.fixture(scope="module", params=[IN_PLACE, IMAGES_FIRST])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return encoder(tmp_path_factory.mktemp("model"), request.param)


pieces = st.lists(
    st.sampled_from(
        [PLACEHOLDER, "<|im_start|>", "<|im_end|>\n", "<|", "|><|", "eot", " ", "\n\n", "don't", "é", "words "]
    ),
    max_size=5,
).map("".join)
contents = st.lists(pieces | st.just(IMAGE), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(conversation=st.lists(contents, min_size=1, max_size=3), numbered=st.booleans())
def test_never_more_than_is_certain(model: PromptEncoder, conversation: list[list[Any]], numbered: bool) -> None:
    """Whatever clients type: the ids begin the whole text's, and no placeholder is among them."""
    request = {
        "messages": [message for parts in conversation for message in body(*parts)["messages"][1:]],
        "chat_template_kwargs": {"numbered": numbered},
    }
    (prepared,) = model.prepare(request)
    (prompt,) = parse_request(request)
    assert isinstance(prompt, ChatPrompt)
    whole = model._renderer.render(prompt)
    known_ids = model.finish(prepared, model.tokenize(prepared.missing)).token_ids()
    ids = model._tokenizer._backend.encode(whole, add_special_tokens=False).ids
    assert known_ids == ids[: len(known_ids)]
    if any(part is IMAGE for parts in conversation for part in parts):
        assert prepared.incomplete == "media"
        assert model._tokenizer._backend.token_to_id(PLACEHOLDER) not in known_ids
    else:
        assert known_ids == ids


def test_words_of_the_template_before_the_placeholder(tmp_path: Path) -> None:
    """They are not in the text that it is compared with: the cut before them is taken."""
    fields = {"chat_template_kwargs": {"numbered": True}}
    assert known(encoder(tmp_path, IN_PLACE), body("Look: ", IMAGE, **fields)) == HEAD


def test_a_model_that_joins_newlines_with_its_own(tmp_path: Path) -> None:
    model = encoder(tmp_path, IN_PLACE, model_type="gemma3")
    assert known(model, body(IMAGE)) == HEAD
    assert known(model, body("Look: ", IMAGE)) == HEAD + "<|im_start|>user\nLook: "


@pytest.mark.parametrize(
    ("template", "part", "config"),
    [
        (CHATML, IMAGE, {}),  # the engine puts a text of the model's into the message
        (LETTERS, IMAGE, {}),
        (IN_PLACE, IMAGE, {"model_type": "paligemma"}),
        (IN_PLACE, {"type": "prompt_embeds", "data": "AA=="}, {}),
        (IN_PLACE, {"type": "file", "file": {}}, {}),
    ],
)
def test_not_scored(tmp_path: Path, template: str, part: dict[str, Any], config: dict[str, Any]) -> None:
    with pytest.raises(PromptError) as caught:
        encoder(tmp_path, template, **config).encode(body("Look: ", part))
    assert caught.value.reason == "media"


async def test_the_rest_is_a_guess(tmp_path: Path) -> None:
    spec = encoder(tmp_path, IN_PLACE).spec
    service = PromptService(PrefixStore(10**7))
    (prompt,) = await service.encode(body("Look: ", IMAGE, "What is it?"), spec)
    (again,) = await service.encode(body("Look: ", IMAGE | {"image_url": {"url": "x"}}, "What is it?"), spec)
    assert (prompt.complete, prompt.incomplete) == (False, "media")
    assert prompt.keys == again.keys
    known_tokens = again.known_token_count
    assert len(prompt.keys) // 8 == known_tokens // BLOCK_SIZE > 0
    assert known_tokens + MEDIA_TOKENS < again.token_count < known_tokens + MEDIA_TOKENS + 20
