"""A real vLLM server of a tiny vision model: prompts with images, and the names that requests may give the model.

What is claimed of a prompt with an image is compared with the ids that the engine computes, and with its KV events; the
engine's own figure of cached tokens says that these very blocks are reused.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer

from serve_app.blocks import KEY_BYTES
from serve_app.events.engine_blocks import EngineBlocks
from serve_app.events.wire import BlockStored, decode_batch
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import EngineSpec
from tests.integration import tiny_models
from tests.integration.test_prompt_parity import ALIAS, BLOCK_SIZE, MODEL, Server

pytestmark = pytest.mark.integration

LORA = "lora"
EVENTS_TIMEOUT_MS = 20_000
SYSTEM = "You see pictures, and say what is in them. "


class Engine:
    """The server, its KV events, and our encoder for its model."""

    def __init__(self, folder: Path) -> None:
        model = tiny_models.build_vision(folder)
        endpoint = f"ipc://{folder}/events"
        self._events: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._events.subscribe(b"")
        self._events.connect(endpoint)
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
        self.server = Server(
            model,
            folder / "vllm.log",
            *("--kv-events-config", json.dumps(events), "--enable-prompt-tokens-details"),
            *("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{LORA}={write_lora(folder / LORA)}"),
        )
        self.encoder = PromptEncoder(EngineSpec(MODEL, BLOCK_SIZE, model, served_names=(ALIAS,)), PrefixStore(2**20))
        self.token_id = Tokenizer.from_file(f"{model}/tokenizer.json").token_to_id

    def ask(self, body: dict[str, Any]) -> tuple[list[int], int]:
        """Ids of the prompt, and how many of them came from the cache."""
        answer = self.server.post("/v1/chat/completions", body | {"max_tokens": 1, "return_token_ids": True})
        return answer["prompt_token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"] or 0

    def stored(self) -> list[BlockStored]:
        """Blocks stored since the last call, at least one."""
        found: list[BlockStored] = []
        while self._events.poll(500 if found else EVENTS_TIMEOUT_MS):
            batch = decode_batch(self._events.recv_multipart()[2])
            found += [event for event in batch.events if isinstance(event, BlockStored)]
        return found

    def stop(self) -> None:
        self.server.stop()
        self._events.close(linger=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(tmp_path_factory.mktemp("vision"))
    try:
        engine.server.wait()
        yield engine
    finally:
        engine.stop()


def write_lora(folder: Path) -> Path:
    """An adapter of the text model's first layer."""
    folder.mkdir()
    rank, hidden = 8, 64
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(rank, hidden), f"{name}B.weight": torch.ones(hidden, rank)},
        folder / "adapter_model.safetensors",
    )
    return folder


def picture(color: str) -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (60, 40), color).save(data, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"},
    }


def chat(*parts: Any, system: str = SYSTEM * 20, **fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": content}], **fields}


RED = picture("red")
TEXT = "A question with some words in it, before the picture. " * 10
PROMPTS = {
    "text first": chat(TEXT, RED, "What is it?"),
    "image first": chat(RED, "What is it?"),
    "two images": chat(TEXT, RED, "and", picture("blue")),
    "with a uuid": chat(TEXT, RED | {"uuid": "red-1"}),
    "given by its key": chat(TEXT, {"image_url": RED["image_url"]["url"]}),
    "in a later turn": {
        "messages": [
            {"role": "user", "content": TEXT},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": [{"type": "text", "text": "And this? "}, RED]},
        ]
    },
    "tools": chat(TEXT, RED, tools=[{"type": "function", "function": {"name": "f"}}]),
    "no space before": chat("word", RED, "word"),
    "newlines before": chat("word\n\n", RED, "\n\nword"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_known_up_to_the_first_image(engine: Engine, name: str) -> None:
    """Every id in front of the image, and not one more."""
    (known,) = engine.encoder.encode(PROMPTS[name])
    ids, _ = engine.ask({"cache_salt": "ids", **PROMPTS[name]})
    count = known.token_count
    assert known.token_ids() == ids[:count]
    assert ids[count] == engine.token_id("<fake_token_around_image>")
    assert engine.token_id(tiny_models.IMAGE_TOKEN) not in ids[:count]


def test_words_of_the_template_before_the_image(engine: Engine) -> None:
    """Not all is known then, but nothing wrong."""
    body = chat(TEXT, RED, chat_template_kwargs={"numbered": True})
    (known,) = engine.encoder.encode(body)
    ids, _ = engine.ask({"cache_salt": "numbered", **body})
    assert known.token_ids() == ids[: known.token_count]
    assert known.token_count > 100


def test_a_typed_placeholder_is_where_the_image_goes(engine: Engine) -> None:
    body = chat(f"Is this {tiny_models.IMAGE_TOKEN} one? {TEXT}", RED)
    (known,) = engine.encoder.encode(body)
    try:
        ids, _ = engine.ask({"cache_salt": "typed", **body})
    except RuntimeError:
        ids = engine.server.post("/tokenize", body)["tokens"]  # refused: nothing is computed
    assert known.token_ids() == ids[: known.token_count]
    assert engine.token_id(tiny_models.IMAGE_TOKEN) not in ids[: known.token_count]


def test_blocks_before_the_image_are_those_of_the_engine(engine: Engine) -> None:
    """The events of a request with an image, in our keys, begin with the keys that we claim; and they are hit."""
    body = chat(TEXT, RED, "What is it?", cache_salt="events")
    (known,) = engine.encoder.encode(body)
    blocks = len(known.block_keys) // KEY_BYTES
    assert blocks == known.token_count // BLOCK_SIZE > 5
    engine.ask(chat("Before."))
    engine.stored()

    ids, cached = engine.ask(body)
    events = engine.stored()
    assert cached == 0
    assert [i for event in events for i in event.token_ids] == ids[: len(ids) // BLOCK_SIZE * BLOCK_SIZE]
    extra_keys = [extra for event in events for extra in event.extra_keys or [None] * len(event.block_hashes)]
    assert extra_keys[:blocks] == [("events",), *[None] * (blocks - 1)]  # the salt, and nothing else
    assert extra_keys[blocks] is not None  # the image
    held = EngineBlocks(MODEL, BLOCK_SIZE)
    held.apply(events)
    stored = b"".join(held.snapshot().values())
    assert stored.startswith(known.block_keys)
    assert len(stored) > len(known.block_keys)

    other_image = chat(TEXT, picture("green"), "What is it?", cache_salt="events")
    assert engine.encoder.encode(other_image)[0].block_keys == known.block_keys
    assert engine.ask(other_image)[1] == blocks * BLOCK_SIZE
    only_text = chat(TEXT, cache_salt="events")
    assert engine.encoder.encode(only_text)[0].block_keys[: len(known.block_keys)] == known.block_keys
    assert engine.ask(only_text)[1] == blocks * BLOCK_SIZE


def test_names(engine: Engine) -> None:
    """Names of the base model share their blocks, in the engine and in our keys; an adapter has its own."""
    body = chat("Who are you?", cache_salt="names")
    held = EngineBlocks(MODEL, BLOCK_SIZE)
    keys = {name: engine.encoder.encode(body | {"model": name})[0].block_keys for name in (MODEL, ALIAS, LORA)}
    assert keys[MODEL] == keys[ALIAS] != keys[LORA]
    full = len(keys[MODEL]) // KEY_BYTES * BLOCK_SIZE

    assert engine.ask(body)[1] == 0
    assert engine.ask(body | {"model": ALIAS})[1] == full
    assert engine.ask(body | {"model": LORA})[1] == 0
    assert engine.ask(body | {"model": LORA})[1] == full
    held.apply(engine.stored())
    stored = b"".join(held.snapshot().values())
    assert keys[MODEL] in stored
    assert keys[LORA] in stored
    with pytest.raises(RuntimeError, match=r"^404"):
        engine.ask(body | {"model": "nobody"})
