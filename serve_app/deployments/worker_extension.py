"""What an engine's KV cache is made of, asked of one of its workers.

vLLM mixes this class into its workers (`worker_extension_cls`), so its method can be called through `collective_rpc`:
the public way to what the engine's own process knows. Out: plain values, which vLLM's RPC can carry.
"""

from __future__ import annotations

from typing import Any


class KVCacheReport:
    """Methods for vLLM's Worker."""

    model_runner: Any
    vllm_config: Any

    def kvcache_groups(self) -> dict[str, Any]:
        """KV cache groups as `EngineGroup`s, the block size that the engine hashes, its hits' alignment, its blocks.

        Source: vLLM 0.29, v1/core/kv_cache_coordinator.py and kv_cache_utils.py `resolve_kv_cache_block_sizes`.
        """
        from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
        from vllm.v1.kv_cache_interface import (
            AttentionSpec,
            MambaSpec,
            get_kv_cache_spec_kind,
            iter_layer_specs,
        )

        config = self.model_runner.kv_cache_config
        speculative = self.vllm_config.speculative_config
        eagle = speculative is not None and speculative.use_eagle()
        flagged = any(group.is_eagle_group for group in config.kv_cache_groups)
        sharded = self.vllm_config.parallel_config.decode_context_parallel_size
        alignment, hashed = resolve_kv_cache_block_sizes(config, self.vllm_config)
        groups, fine = [], False
        for group in config.kv_cache_groups:
            specs = list(iter_layer_specs(group.kv_cache_spec))
            size = group.kv_cache_spec.block_size * (
                sharded if all(isinstance(spec, AttentionSpec) for spec in specs) else 1
            )
            fine |= any(
                isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "align" and size > hashed for spec in specs
            )
            windows = {
                getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None) or 0
                for spec in specs
            }
            groups.append(
                {
                    "kind": get_kv_cache_spec_kind(group.kv_cache_spec).value,
                    "block_size": size,
                    "window": windows.pop() if len(windows) == 1 else 0,
                    "eagle": bool(group.is_eagle_group or (eagle and not flagged)),
                    "cached": bool(group.kv_cache_spec.prefix_cacheable),
                }
            )
        windowed = {"sliding_window", "sliding_window_mla", "chunked_local_attention"}
        if fine and not any(group["kind"] in windowed and group["block_size"] != hashed for group in groups):
            alignment = hashed  # a hit may end inside a block: `enable_partial_hash_hits`
        return {"groups": groups, "block_size": hashed, "alignment": alignment, "blocks": config.num_blocks}
