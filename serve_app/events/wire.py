"""Bytes of one KV event batch -> typed events.

Wire format (vLLM `distributed/kv_events.py`): a batch is msgpack `[ts, [event, ...], dp_rank]`. An event is a map
tagged by `type` (vLLM >= 0.17) or, in older versions, an array whose first element is the tag. LMCache emits the
same structs through vLLM. Unknown fields are ignored; an unknown or malformed event is skipped and counted, the
other events of its batch are kept. So are token ids, block sizes and groups that cannot be.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from serve_app.decoding import decoder
from serve_app.errors import WireError
from serve_app.types import EngineHash

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class BlockStored(msgspec.Struct, tag=True, gc=False, frozen=True):
    """Blocks that the engine can now reuse: block i covers `token_ids[i * block_size : (i + 1) * block_size]`.

    A sparse group (sliding window, Mamba) may name fewer blocks than the tokens have: those that it keeps. Offload
    that is not self-describing has no tokens and block size 0: only what the chunk's last block is called.
    """

    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[TokenId]
    block_size: Count  # tokens per block hash; an LMCache chunk is larger than an engine block
    lora_id: int | None = None
    medium: str | None = None  # GPU, CPU, STORAGE; None in old versions means GPU
    lora_name: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None  # one per block: LoRA name, images, cache_salt
    group_idx: Count | None = None  # KV cache group of a hybrid model
    kv_cache_spec_kind: str | None = None  # vLLM's KVCacheSpecKind of the group
    kv_cache_spec_sliding_window: Count | None = None  # tokens


class BlockRemoved(msgspec.Struct, tag=True, gc=False, frozen=True):
    """Blocks that were evicted. One event per physical block: a prefix held twice is removed twice."""

    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: Count | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False, frozen=True):
    """The engine forgot everything (`/reset_prefix_cache`, sleep)."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


# The same events as arrays: fields in the order of the struct, later fields may be missing. vLLM's order of the
# first fields has never changed.
class _StoredArray(msgspec.Struct, tag="BlockStored", array_like=True, gc=False):
    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[TokenId]
    block_size: Count
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: Count | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: Count | None = None


class _RemovedArray(msgspec.Struct, tag="BlockRemoved", array_like=True, gc=False):
    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: Count | None = None


class _ClearedArray(msgspec.Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _WholeBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[Event]


_decode_whole: Callable[[bytes], _WholeBatch] = decoder(_WholeBatch)
_decode_raw: Callable[[bytes], _Batch] = decoder(_Batch)
_decode_map: Callable[[bytes], Event] = decoder(Event)
_decode_array: Callable[[bytes], _StoredArray | _RemovedArray | _ClearedArray] = decoder(
    _StoredArray | _RemovedArray | _ClearedArray
)
_decode_anything: Callable[[bytes], Any] = decoder(Any)


class Batch(msgspec.Struct, gc=False, frozen=True):
    """One decoded batch. `skipped` counts events left out, by reason."""

    ts: float  # seconds since 1970, engine's clock
    events: list[Event]
    skipped: Counter[str]


def decode_batch(payload: bytes) -> Batch:
    """Decode one batch.

    Raises:
        WireError: the payload is not a batch at all. (A batch with events that are not understood is no error.)
    """
    with contextlib.suppress(msgspec.DecodeError):  # all maps, all understood: the usual case
        whole = _decode_whole(payload)
        return Batch(whole.ts, whole.events, Counter())
    try:
        batch = _decode_raw(payload)
    except msgspec.DecodeError as error:
        raise WireError(f"not a KV event batch: {error}") from error
    events: list[Event] = []
    skipped: Counter[str] = Counter()
    for raw in batch.events:
        try:
            events.append(_decode_event(raw))
        except msgspec.ValidationError:
            skipped[_why_skipped(raw)] += 1
        except msgspec.DecodeError:
            skipped["malformed"] += 1
    return Batch(batch.ts, events, skipped)


def _decode_event(raw: msgspec.Raw) -> Event:
    if not _is_array(raw):
        return _decode_map(raw)
    match _decode_array(raw):
        case _StoredArray() as stored:
            return BlockStored(*(getattr(stored, name) for name in BlockStored.__struct_fields__))
        case _RemovedArray() as removed:
            return BlockRemoved(removed.block_hashes, removed.medium, removed.group_idx)
        case _:
            return AllBlocksCleared()


def _is_array(raw: msgspec.Raw) -> bool:
    """msgpack: fixarray 0x90-0x9f, array16 0xdc, array32 0xdd."""
    first = memoryview(raw)[0]
    return 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)


def _why_skipped(raw: msgspec.Raw) -> str:
    try:
        event = _decode_anything(raw)
    except (msgspec.DecodeError, TypeError):  # TypeError: a map with a map as its key
        return "malformed"
    match event:
        case {"type": str(tag)} | [str(tag), *_]:
            return "malformed" if tag in ("BlockStored", "BlockRemoved", "AllBlocksCleared") else "unknown_type"
        case _:
            return "malformed"
