"""What a vLLM engine makes prompts with, asked of the engine itself (prompts/identity.py).

In: Ray Serve LLM's VLLMEngine. Out: the parts for its record. Templates and tokenizer are the objects that vLLM uses;
probes go through its own /tokenize, in this process.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.renderers.hf import resolve_chat_template

from serve_app.prompts.identity import PROBES, digest_of_ids, parts_of, probe_name

logger = logging.getLogger("ray.serve")


async def engine_identity(engine: Any, chat_template: str | None) -> tuple[tuple[str, str], ...]:
    """Parts and digests. What cannot be told is left out, and so is not compared.

    Args:
        engine: Ray Serve LLM's VLLMEngine, started.
        chat_template: Jinja source that the engine was given in place of the model's own.
    """
    try:
        parts = _parts(engine._engine_client, chat_template)
    except Exception:
        logger.exception("kvcache: the engine's tokenizer and templates cannot be compared with a router's")
        parts = {}
    for name, body in PROBES.items():
        try:
            if (ids := await _ids(engine, dict(body))) is not None:
                parts[probe_name(name)] = digest_of_ids(ids)
        except Exception:
            logger.exception("kvcache: the engine does not tokenize the probe %r", name)
    return tuple(sorted(parts.items()))


def tokenizer_mode(client: Any) -> str:
    """vLLM's --tokenizer-mode as it has come out: a tokenizer that is not Hugging Face's goes by its class."""
    tokenizer = client.renderer.tokenizer
    if tokenizer is not None and not hasattr(tokenizer, "backend_tokenizer"):
        return type(tokenizer).__name__
    mode: str = client.vllm_config.model_config.tokenizer_mode
    return mode


def _parts(client: Any, chat_template: str | None) -> dict[str, str]:
    tokenizer, model_config = client.renderer.tokenizer, client.vllm_config.model_config

    def template(with_tools: bool) -> str | None:
        resolved: str | None = resolve_chat_template(
            tokenizer, chat_template, [{}] if with_tools else None, model_config=model_config
        )
        return resolved

    backend = getattr(tokenizer, "backend_tokenizer", None)
    return parts_of(backend, template if backend is not None else lambda _: None)


async def _ids(engine: Any, body: dict[str, Any]) -> list[int] | None:
    """Of one probe; None if the engine refuses it (it has no chat template, say)."""
    request = TokenizeChatRequest(**body) if "messages" in body else TokenizeCompletionRequest(**body)
    # Not `engine.tokenize`: Ray 2.60 looks for vLLM's service under a name that vLLM 0.29 no longer has, and refuses.
    answer = await engine._app_state.serving_tokenization.create_tokenize(request, None)
    ids: list[int] | None = getattr(answer, "tokens", None)
    return ids
