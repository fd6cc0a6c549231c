"""The Hugging Face tokenizer of an engine, loaded once per process.

In: a path or Hugging Face id. Out: transformers' tokenizer object, as vLLM 0.29 loads it (`tokenizers/registry.py`).
AutoTokenizer rather than the bare tokenizer.json: it rebuilds some tokenizers, repairs pre-tokenizers and
post-processors, and knows the special tokens and templates; SmolLM2 takes 5 s with it, most of that importing torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError, PromptError
from serve_app.types import TokenizerSource

# vLLM bypasses AutoTokenizer for these, whose checkpoints name a wrong class.
_WRONG_TOKENIZER_CLASS = frozenset({"internlm2", "step3_vl", "step3p7", "unlimited-ocr"})
# vLLM renders these with code of its own (renderers/registry.py, harmony), not with the chat template.
_OWN_RENDERER = frozenset(
    {"gpt_oss", "deepseek_v32", "deepseek_v4", "kimi_k3", "kimi_audio", "inkling", "inkling_mm_model"}
)
_OWN_RENDERER_ARCHITECTURES = frozenset(
    {
        "GptOssForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM",
        "KimiK3ForConditionalGeneration",
        "MoonshotKimiaForCausalLM",
        "InklingForCausalLM",
        "InklingForConditionalGeneration",
    }
)


def source_of(source: str | TokenizerSource) -> TokenizerSource:
    """Args: source: path or Hugging Face id, or with more about it."""
    return source if isinstance(source, TokenizerSource) else TokenizerSource(source)


@lru_cache(maxsize=8)
def load_tokenizer(source: TokenizerSource) -> Any:
    """transformers' tokenizer. Slow the first time, up to some seconds: call it in a thread.

    Raises:
        ConfigError: nothing can be loaded from `source`, or only a tokenizer written in Python.
    """
    from transformers import AutoTokenizer, TokenizersBackend  # takes 3 s to import

    cls = TokenizersBackend if model_config(source).get("model_type") in _WRONG_TOKENIZER_CLASS else AutoTokenizer
    try:
        tokenizer = cls.from_pretrained(source.name, truncation_side="left", **_revision(source))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer in {source.name!r}: {error}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{source.name!r} has no fast tokenizer (tokenizer.json)")
    if type(tokenizer).__call__ is not TokenizersBackend.__call__:  # vLLM calls it: SeamlessM4T, UDOP, MarkupLM
        raise ConfigError(f"{source.name!r} has a tokenizer with encoding code of its own, {type(tokenizer).__name__}")
    return tokenizer


@lru_cache(maxsize=8)
def processor_template(source: TokenizerSource) -> str | None:
    """The chat template that the model's multimodal processor has, when it is not the tokenizer's own.

    vLLM prefers it for requests without tools (`resolve_chat_template` in renderers/hf.py). An example is Qwen2.5-VL:
    chat_template.json, which processors alone read, holds the template for content parts, tokenizer_config.json one
    for text and tools.

    Raises:
        PromptError: there is one, and the processor that decides whether it counts cannot be loaded here.
    """
    from transformers import AutoProcessor, ProcessorMixin  # takes 3 s to import

    try:
        template = ProcessorMixin.get_processor_dict(source.name, **_revision(source))[0].get("chat_template")
    except (OSError, ValueError):
        return None
    if not isinstance(template, str) or template == load_tokenizer(source).chat_template:
        return None
    try:
        processor = AutoProcessor.from_pretrained(source.name, **_revision(source))
    except Exception as error:  # its libraries may be missing here, and be there in the engine
        raise PromptError(
            "no_processor", f"cannot tell which chat template of {source.name!r} counts: {error}"
        ) from error
    return str(processor.chat_template) if isinstance(processor, ProcessorMixin) else None


@lru_cache(maxsize=8)
def model_config(source: TokenizerSource) -> dict[str, Any]:
    """config.json next to the tokenizer; empty when there is none."""
    from transformers import PreTrainedConfig  # takes 3 s to import

    try:
        config, _ = PreTrainedConfig.get_config_dict(source.name, **_revision(source))
    except (OSError, ValueError):
        return {}
    return dict(config)


def own_renderer(source: TokenizerSource) -> str | None:
    """The model type when vLLM does not render it with its chat template, else None."""
    path = Path(source.name)
    if path.is_dir() and any(path.glob("consolidated*.safetensors")) and any(_mistral_tokenizers(path)):
        return "mistral"
    config = model_config(source)
    for name, known in (
        (config.get("model_type"), _OWN_RENDERER),
        *((a, _OWN_RENDERER_ARCHITECTURES) for a in config.get("architectures") or ()),
    ):
        if name in known:
            return str(name)
    return None


def _revision(source: TokenizerSource) -> dict[str, str]:
    return {"revision": source.revision} if source.revision else {}


def _mistral_tokenizers(path: Path) -> Iterator[Path]:
    yield from path.glob("tekken.json")
    yield from path.glob("tokenizer.model.v*")
