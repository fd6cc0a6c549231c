"""Small models with random weights, one for each attention layout that vLLM's CPU build runs: for `audit --layout`.

What is compared are cached tokens, so what a model answers does not matter, and a folder of some 100 KB does. The
tokenizer and chat template are the built-in model's. vLLM makes the weights up itself (`load_format: dummy`).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError
from serve_app.model import models_dir, resolve_model

TOKENIZER = "builtin:smollm2-135m-instruct"
MAX_MODEL_LEN = 4096  # tokens; what a pool of some 400 blocks has room for
MAX_BATCHED_TOKENS = 512  # in a step: a sliding window takes blocks for all of them

_COMMON: Mapping[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "float32",
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2},
    "gemma3": {  # five layers with a sliding window to one of full attention, the sliding ones first
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 6,
        "layer_types": [_SLIDING] * 5 + [_FULL],
        "sliding_window": 128,
        "query_pre_attn_scalar": 32,
    },
    "lfm2": {  # three layers of short convolutions, whose state is kept as Mamba's is, to one of full attention
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],
        "num_hidden_layers": 4,
        "layer_types": ["conv"] * 3 + [_FULL],
        "block_ff_dim": 128,
        # vLLM 0.29 reads these four, which transformers no longer writes.
        "block_dim": 64,
        "conv_dim": 64,
        "conv_dim_out": 64,
        "conv_use_xavier_init": False,
    },
    "qwen3-next": {  # three layers of gated delta nets, whose state is kept as Mamba's is, to one of full attention
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + [_FULL],
        # vLLM's CPU kernels take no smaller heads, and bfloat16 only.
        "head_dim": 256,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "dtype": "bfloat16",
    },
}


def build_layout(name: str) -> Path:
    """Folder of the model, made unless it is there.

    Raises:
        ConfigError: there is no such layout.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"no layout {name!r}: write one of {', '.join(LAYOUTS)}")
    folder = models_dir() / f"layout-{name}"
    config = json.dumps({**_COMMON, **LAYOUTS[name]}, indent=2)
    if (folder / "config.json").exists() and (folder / "config.json").read_text() == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(resolve_model(TOKENIZER)).iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(config)  # last: a folder with one is whole
    return folder


def _dtype(name: str) -> str:
    return str({**_COMMON, **LAYOUTS[name]}["dtype"])


def with_layout(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A Serve config whose engines run the model of a layout.

    Raises:
        ConfigError: there is no such layout, or no engine in the config.
    """
    changed = copy.deepcopy(dict(config))
    engines = [app["args"]["llm"] for app in changed["applications"] if "llm" in (app.get("args") or {})]
    if not engines:
        raise ConfigError("the config has no application of serve_app.app:build_llm to give another model to")
    for llm in engines:
        llm["model_loading_config"]["model_source"] = str(build_layout(name))
        llm.setdefault("engine_kwargs", {}).update(
            load_format="dummy",
            dtype=_dtype(name),
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
        )
    return changed
