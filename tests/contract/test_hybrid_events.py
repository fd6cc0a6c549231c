"""Events of engines with several KV cache groups and with offload: faults, salts, and what cannot be right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_events import KVEventBatch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import (
    OffloadingEventGroupSpec,
    OffloadingEventsTracker,
)
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_offload.base import Medium, OffloadingEvent, OffloadingKVEventsConfig, OffloadKey, make_offload_key

from serve_app.blocks import block_keys, namespace_key, pack_tokens, split_keys
from serve_app.events.engine_blocks import EngineBlocks
from serve_app.events.engine_groups import EngineGroup, GroupError, engine_layout
from serve_app.events.wire import BlockRemoved, BlockStored, Event, decode_batch
from serve_app.types import CPU, GPU, ModelId, Tier
from tests.contract.test_hybrid_layouts import LAYOUTS, Followed, conversations
from tests.vllm_engine import BLOCK_SIZE, VLLMEngine, chunked, full, mamba, sliding

MODEL = ModelId("m")
GEMMA = LAYOUTS["five sliding to one full"]


def tokens_of(seed: int, blocks: int, more: int = 3) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50_000) for _ in range(blocks * BLOCK_SIZE + more)]


# -- said again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [[full()], GEMMA, [sliding(64)], [mamba(), full()]], ids=str)
def test_a_report_of_what_is_reused_is_no_second_copy(groups: Sequence[KVCacheSpec]) -> None:
    """`kv_cache_report_mode: full`, which any client can ask for."""
    followed = Followed(VLLMEngine(groups, 600, retention=None))
    for number, tokens in enumerate(conversations(3, 120)):
        followed.serve(tokens, report="full" if number % 3 else "incremental")
        if len(tokens) > 2 * BLOCK_SIZE:
            assert abs(followed.predicted(tokens) - followed.engine.reusable(tokens)) <= BLOCK_SIZE
        assert followed.blocks.unused <= followed.engine.empty_blocks * 1.01
    assert followed.blocks.skipped["said_again"] > 20
    for seed in range(100, 130):  # push everything out
        followed.serve(tokens_of(seed, 40))
    for tokens in list(conversations(3, 120))[-20:]:
        assert followed.predicted(tokens) <= followed.engine.reusable(tokens) + BLOCK_SIZE


# -- offload ----------------------------------------------------------------------------------------------------------


class Offload:
    """vLLM's own tracker of what native offload tells."""

    def __init__(self, followed: Followed, *, self_describing: bool) -> None:
        self._followed = followed
        self._tracker = OffloadingEventsTracker(
            OffloadingKVEventsConfig(enable_kv_cache_events=True, self_describing_kv_events=self_describing)
        )

    def store(
        self, tokens: list[int], blocks: int, salt: str | None = None, group: int = 0, per_chunk: int = 1
    ) -> list[OffloadKey]:
        request = self._followed.engine.request(tokens, salt=salt)
        windowed = self._followed.engine.groups[group].kind != "full_attention"
        config: Any = SimpleNamespace(
            sliding_window_size_in_chunks=4 if windowed else None,
            hashes_per_chunk=per_chunk,
            tokens_per_chunk=BLOCK_SIZE * per_chunk,
            tokens_per_block=BLOCK_SIZE,
            group_idx=group,
            kv_event_group_spec=OffloadingEventGroupSpec("sliding_window" if windowed else "full_attention", None),
        )
        keys = []
        for chunk in range(blocks // per_chunk):
            block_hash: BlockHash = request.block_hashes[(chunk + 1) * per_chunk - 1]
            keys.append(make_offload_key(block_hash, group))
            self._tracker.record_store(request, config, chunk, keys[-1])
        self._hear(OffloadingEvent(keys=keys, medium=Medium.CPU, removed=False))
        return keys

    def remove(self, keys: list[OffloadKey]) -> None:
        self._hear(OffloadingEvent(keys=keys, medium=Medium.CPU, removed=True))

    def _hear(self, event: OffloadingEvent) -> None:
        events = list(self._tracker.take_events([event]))
        self._followed.hear(decode_batch(msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=events))).events)


def held(followed: Followed, tokens: Sequence[int], salt: str | None, tier: Tier) -> int:
    """Blocks of a prompt that a tier has, from its beginning."""
    keys = split_keys(block_keys(pack_tokens(tokens), BLOCK_SIZE, namespace_key(MODEL, BLOCK_SIZE, None, salt)))
    there = set(split_keys(followed.blocks.snapshot().get(tier, b"")))
    return next((i for i, key in enumerate(keys) if key not in there), len(keys))


@pytest.mark.parametrize("per_chunk", [1, 4])
@pytest.mark.parametrize("self_describing", [False, True])
def test_what_a_tenant_offloads_is_the_tenants_and_gone_when_it_is_evicted(
    self_describing: bool, per_chunk: int
) -> None:
    engine = VLLMEngine([full()], 200)
    followed = Followed(engine)
    followed.blocks = EngineBlocks(MODEL, BLOCK_SIZE, 200, chunk_blocks=per_chunk)
    offload = Offload(followed, self_describing=self_describing)
    tokens = tokens_of(1, 8)
    followed.serve(tokens, salt="tenant a")
    keys = offload.store(tokens, 8, "tenant a", per_chunk=per_chunk)
    for salt, blocks in (("tenant a", 8), (None, 0), ("tenant b", 0)):
        assert (held(followed, tokens, salt, GPU), held(followed, tokens, salt, CPU)) == (blocks, blocks)
    for seed in range(2, 16):  # the GPU evicts it
        followed.serve(tokens_of(seed, 20))
    assert held(followed, tokens, "tenant a", GPU) == engine.reusable(tokens, salt="tenant a") == 0
    assert held(followed, tokens, "tenant a", CPU) == 8
    offload.remove(keys)
    assert followed.blocks.snapshot().get(CPU, b"") == b""
    assert not followed.blocks.unindexed


def test_offload_without_names_that_are_known_is_said_to_be_missing() -> None:
    followed = Followed(VLLMEngine([full()], 200))
    Offload(followed, self_describing=False).store(tokens_of(1, 4), 4)  # from before the publisher listened
    assert followed.blocks.skipped["not_described"] == 4
    assert list(followed.blocks.unindexed) == [CPU]
    tokens = tokens_of(2, 4)
    followed.serve(tokens)
    Offload(followed, self_describing=False).store(tokens, 4)
    assert held(followed, tokens, None, CPU) == 4
    assert not followed.blocks.unindexed


def test_a_salted_prompt_that_was_not_heard_of_is_not_taken_for_anybodys() -> None:
    followed = Followed(VLLMEngine([full()], 200))
    offload = Offload(followed, self_describing=True)
    tokens = tokens_of(1, 4)
    offload.store(tokens, 4, "secret")
    assert followed.blocks.snapshot() == {}
    offload.store(tokens, 4)
    assert held(followed, tokens, None, CPU) == 4


def test_offloaded_blocks_of_all_groups_are_loaded_behind_the_gpus() -> None:
    followed = Followed(VLLMEngine([sliding(64), full()], 120))
    offload = Offload(followed, self_describing=True)
    tokens = tokens_of(1, 12)
    followed.serve(tokens)
    offload.store(tokens, 12, group=1)
    for seed in range(2, 12):
        followed.serve(tokens_of(seed, 20))
    assert followed.engine.reusable(tokens) == 0
    assert followed.predicted(tokens) == 0  # the window of the other group is gone
    followed.serve(tokens)
    offload.store(tokens, 12, group=0)
    for seed in range(12, 22):
        followed.serve(tokens_of(seed, 20))
    assert followed.engine.reusable(tokens) == 0
    assert followed.predicted(tokens) == 12 * BLOCK_SIZE


# -- faults -----------------------------------------------------------------------------------------------------------


# A state that is used again and again is not stored again, so it stays unknown while the engine keeps it.
@pytest.mark.parametrize(
    ("name", "share"), [("five sliding to one full", 0.9), ("full of larger blocks", 0.9), ("mamba and full", 0.5)]
)
def test_after_lost_events_nothing_is_promised_that_is_not_there(name: str, share: float) -> None:
    groups = LAYOUTS[name]
    followed = Followed(VLLMEngine(groups, 150 * len(groups), retention=None))
    prompts = conversations(5, 2000)
    for tokens in (next(prompts) for _ in range(60)):
        followed.serve(tokens)
    for tokens in (next(prompts) for _ in range(10)):
        followed.engine.serve(followed.engine.request(tokens), lambda _: None)
    followed.blocks.doubt()
    assert followed.blocks.degraded

    def is_right_after(tokens: list[int]) -> bool:
        followed.serve(tokens)
        return not followed.blocks.degraded

    assert any(map(is_right_after, prompts))
    right = 0
    after = list(conversations(5, 2300))[-100:]
    for tokens in after:
        predicted, actual = followed.predicted(tokens), followed.engine.reusable(tokens)
        assert predicted <= actual + followed.blocks.block_size
        right += abs(predicted - actual) <= followed.blocks.block_size
        followed.serve(tokens)
    assert right >= share * len(after)


def test_a_reset_empties_every_group() -> None:
    followed = Followed(VLLMEngine(GEMMA, 600))
    followed.serve(tokens_of(1, 20))
    assert followed.blocks.snapshot().keys() == {GPU, Tier("gpu/1")}
    assert followed.engine.manager.reset_prefix_cache()
    followed.hear(followed.engine.events())
    assert followed.blocks.snapshot() == {}
    assert followed.predicted(tokens_of(1, 20)) == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.sampled_from([full(), full(32), sliding(40), sliding(96, 32), mamba(), chunked(64)]), min_size=1, max_size=4
    ),
    st.sampled_from([0, None]),
    st.integers(0, 1 << 16),
    st.integers(60, 400),
)
def test_any_groups_and_any_traffic(groups: list[KVCacheSpec], retention: int | None, seed: int, blocks: int) -> None:
    if any(spec == chunked(64) for spec in groups) and len({spec.block_size for spec in groups}) > 1:
        return  # vLLM refuses it
    if not any(spec in (full(), full(32)) for spec in groups) and chunked(64) in groups:
        return  # without full attention vLLM takes whole chunks for cached that were never computed
    followed = Followed(VLLMEngine(groups, blocks * len(groups) + 200, retention=retention))
    errors = []
    for tokens in conversations(seed, 60):
        errors.append(followed.predicted(tokens) - followed.engine.reusable(tokens))
        followed.serve(tokens)
    size = followed.engine.manager.coordinator.scheduler_block_size
    assert sum(abs(error) <= size for error in errors) >= 0.98 * len(errors), errors


# -- what cannot be right ---------------------------------------------------------------------------------------------


def stored(**more: Any) -> BlockStored:
    fields: dict[str, Any] = {"medium": "GPU", "group_idx": 0, "kv_cache_spec_kind": "full_attention", **more}
    return BlockStored([11], None, list(range(BLOCK_SIZE)), BLOCK_SIZE, **fields)


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (stored(group_idx=7), "group_index"),
        (stored(kv_cache_spec_kind="mamba"), "group_changed"),
        (stored(kv_cache_spec_kind="of next year"), "group_changed"),
        (stored(group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=999), "group_changed"),
    ],
)
def test_a_group_that_is_not_as_known_is_never_exact(event: Event, reason: str) -> None:
    groups = engine_layout([EngineGroup("full_attention", 16), EngineGroup("sliding_window", 16, 64)])
    blocks = EngineBlocks(MODEL, BLOCK_SIZE, 100, groups=groups)
    assert blocks.apply([event]) == []
    assert blocks.skipped == {reason: 1}
    assert blocks.degraded
    blocks.clear()
    assert not blocks.degraded


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (EngineGroup("of next year", 16), "group_kind"),
        (EngineGroup("sliding_window", 16, -1), "group_window"),
        (EngineGroup("chunked_local_attention", 16), "group_window"),
        (EngineGroup("full_attention", 0), "group_block_size"),
        (EngineGroup("cross_attention", 16), "no_groups"),
    ],
)
def test_groups_that_nobody_understands_are_refused(group: EngineGroup, reason: str) -> None:
    with pytest.raises(GroupError) as refused:
        engine_layout([group])
    assert refused.value.reason == reason


def test_a_removal_in_an_unknown_group_is_counted() -> None:
    blocks = EngineBlocks(MODEL, BLOCK_SIZE)
    blocks.apply([stored(), BlockRemoved([11], "GPU", 5)])
    assert blocks.skipped == {"group_index": 1}
    assert len(blocks) == 1


def test_blocks_that_follow_each_other_in_a_ring_end() -> None:
    blocks = EngineBlocks(MODEL, BLOCK_SIZE, 100)
    tokens = list(range(BLOCK_SIZE))
    blocks.apply(
        [
            BlockStored([1], None, tokens, BLOCK_SIZE),
            BlockStored([2], 1, tokens, BLOCK_SIZE),
            BlockStored([1], 2, tokens, BLOCK_SIZE),
            BlockStored([3], 3, tokens, BLOCK_SIZE),
        ]
    )
    blocks.doubt()
    blocks.apply([BlockStored([9], 2, tokens, BLOCK_SIZE)])
    assert blocks.degraded
