"""Token ids -> canonical block keys.

The canonical key of a block is XXH3-64 over `parent key || little-endian uint32 token ids || extras`, chained;
the first parent is the key of the namespace (model, block size, LoRA name, cache salt). So equal keys mean equal
prefixes, whatever hash function and seed an engine uses for itself. Only full blocks have a key, as in vLLM.

    block_size=2, ids=[5, 6, 7, 8, 9] -> 2 keys: k1 = h(root|5,6), k2 = h(k1|7,8); token 9 is in no full block
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import cast

import msgspec
import xxhash

from serve_app.types import BlockKey, BlockKeys, ModelId

KEY_BYTES = 8
TOKEN_BYTES = 4
_HUNDRED_KEYS = struct.Struct(f"{KEY_BYTES}s" * 100)


def namespace_key(model: ModelId, block_size: int, lora: str | None = None, salt: str | None = None) -> BlockKey:
    """The parent of a prompt's first block. Prompts of different namespaces never share a key."""
    return BlockKey(xxhash.xxh3_64_digest(msgspec.msgpack.encode((model, block_size, lora or "", salt or ""))))


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Little-endian uint32 bytes of token ids.

    Raises:
        OverflowError: an id is negative or does not fit 32 bits.
    """
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def block_keys(
    tokens: bytes,
    block_size: int,
    parent: BlockKey,
    extras: Sequence[bytes] | None = None,
) -> BlockKeys:
    """Keys of the full blocks in `tokens`, packed.

    Args:
        tokens: packed token ids (`pack_tokens`), starting right after `parent`'s block.
        block_size: tokens per block.
        parent: key of the block before, or `namespace_key(...)`.
        extras: per block, bytes that tell apart blocks with equal tokens (images, embeddings); b"" for none.
    """
    digest = xxhash.xxh3_64_digest
    step = block_size * TOKEN_BYTES
    keys: list[bytes] = []
    key: bytes = parent
    starts = range(0, len(tokens) - step + 1, step)
    if extras:
        for start, extra in zip(starts, extras, strict=False):
            keys.append(key := digest(key + tokens[start : start + step] + extra))
    else:
        for start in starts:
            keys.append(key := digest(key + tokens[start : start + step]))
    return b"".join(keys)


def split_keys(packed: BlockKeys) -> list[BlockKey]:
    """One by one."""
    many = len(packed) // _HUNDRED_KEYS.size * _HUNDRED_KEYS.size
    keys: list[bytes] = list(chain.from_iterable(_HUNDRED_KEYS.iter_unpack(packed[:many])))
    keys += [packed[i : i + KEY_BYTES] for i in range(many, len(packed), KEY_BYTES)]
    return cast("list[BlockKey]", keys)  # once: `BlockKey(key)` is a call for each
