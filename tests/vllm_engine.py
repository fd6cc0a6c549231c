"""vLLM's own KVCacheManager as an engine without a model: its cache, its KV events, its answer to what it would reuse.

In: KV cache groups, prompts. Out: events as they come over the wire, and the tokens that vLLM takes from its cache.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vllm is imported

import msgspec
import torch
from vllm.distributed.kv_events import KVCacheEvent, KVEventBatch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    get_kv_cache_spec_kind,
)
from vllm.v1.request import Request

from serve_app.events.engine_groups import EngineGroup
from serve_app.events.wire import Event, decode_batch

BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192

kv_cache_utils.init_none_hash(sha256)


def full(size: int = BLOCK_SIZE) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=16, dtype=torch.float32)


def mla(size: int = BLOCK_SIZE) -> MLAAttentionSpec:
    return MLAAttentionSpec(block_size=size, num_kv_heads=1, head_size=32, dtype=torch.float32)


def sliding(window: int, size: int = BLOCK_SIZE) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=size, num_kv_heads=1, head_size=16, dtype=torch.float32, sliding_window=window)


def chunked(chunk: int, size: int = BLOCK_SIZE) -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(
        block_size=size, num_kv_heads=1, head_size=16, dtype=torch.float32, attention_chunk_size=chunk
    )


def mamba(size: int = BLOCK_SIZE) -> MambaSpec:
    return MambaSpec(
        block_size=size, shapes=((512,),), dtypes=(torch.float32,), page_size_padded=None, mamba_cache_mode="align"
    )


class VLLMEngine:
    """Args:
    groups: one spec for each KV cache group, in vLLM's order.
    blocks: size of the pool.
    retention: vLLM's prefix_cache_retention_interval; 0 is its default, None keeps everything.
    eagle: whether it speculates with EAGLE, so that all groups are draft groups.
    chunk: tokens that are computed in a step.
    """

    def __init__(
        self,
        groups: Sequence[KVCacheSpec],
        blocks: int = 2000,
        *,
        retention: int | None = 0,
        eagle: bool = False,
        chunk: int = 256,
    ) -> None:
        sizes = [spec.block_size for spec in groups]
        self.block_size = math.gcd(*sizes)
        self.capacity = blocks
        self.groups = [
            EngineGroup(
                get_kv_cache_spec_kind(spec).value,
                spec.block_size,
                getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None) or 0,
                eagle,
            )
            for spec in groups
        ]
        self._chunk = chunk
        self._numbers = itertools.count()
        named = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(groups)]
        self.manager = KVCacheManager(
            KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=named,
                prefix_cache_retention_interval=retention,
            ),
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=math.lcm(*sizes),
            hash_block_size=self.block_size,
            max_in_flight_tokens=MAX_MODEL_LEN,
            use_eagle=eagle,
            enable_caching=True,
            enable_kv_cache_events=True,
        )

    def request(self, tokens: Sequence[int], *, salt: str | None = None, report: str = "incremental") -> Request:
        sampling = SamplingParams(max_tokens=4, extra_args={"kv_cache_report_mode": report})
        sampling.update_from_generation_config({}, 1)
        hasher = kv_cache_utils.get_request_block_hasher(self.block_size, sha256)
        return Request(f"r{next(self._numbers)}", list(tokens), sampling, None, block_hasher=hasher, cache_salt=salt)

    def reusable(self, tokens: Sequence[int], *, salt: str | None = None) -> int:
        """Tokens that it would take from its cache."""
        _, hit, *_ = self.manager.get_computed_blocks(self.request(tokens, salt=salt))
        return int(hit)

    def serve(
        self,
        request: Request,
        hear: Callable[[list[Event]], None],
        raw: Callable[[list[KVCacheEvent]], None] | None = None,
        *,
        free: bool = True,
    ) -> int:
        """Compute the prompt, step by step, and free it. Returns the tokens that came from the cache.

        Args:
            hear: gets the events of each step, decoded.
            raw: gets them instead, as vLLM has them.
            free: whether the request ends; otherwise it keeps its blocks.
        """

        def tell() -> None:
            if raw is None:
                hear(self.events())
            elif events := self.manager.take_events():
                raw(events)

        blocks, hit, boundary, *_ = self.manager.get_computed_blocks(request)
        request.shared_prefix_boundary = boundary
        done, first = hit, True
        while done < request.num_tokens:
            self.manager.new_step_starts()
            step = min(self._chunk, request.num_tokens - done)
            assert (
                self.manager.allocate_slots(request, step, hit if first else 0, blocks if first else None) is not None
            )
            first = False
            done += step
            request.num_computed_tokens = done
            tell()
        if free:
            self.manager.free(request)
            tell()
        return int(hit)

    def events(self) -> list[Event]:
        """What has happened since the last call, as a reader of its socket gets it."""
        events = self.manager.take_events()
        if not events:
            return []
        return decode_batch(msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=events))).events

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold, of vLLM's own figure `kv_cache_usage`."""
        usage: float = self.manager.usage
        return round(usage * (self.capacity - 1))

    @property
    def empty_blocks(self) -> int:
        """Blocks of the pool that hold nothing that a prompt may find."""
        return sum(block.block_hash is None and not block.is_null for block in self.manager.block_pool.blocks)
