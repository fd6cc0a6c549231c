"""A model folder without a model: tokenizer, chat template, config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.prompts import families

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chatml_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte-level BPE with a ChatML template."""
    return write_model(tmp_path_factory.mktemp("chatml"))


def write_model(path: Path, template: str = CHATML, **config: object) -> str:
    families.build("byte-level", awkward=False).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "bos_token": "<|im_start|>", "chat_template": template})
    )
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return str(path)
