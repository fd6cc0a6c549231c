"""Token ids -> canonical block keys.

The canonical key of a block is XXH3-64 over `parent key || little-endian uint32 token ids || extras`, chained;
the first parent is the key of the namespace (model, block size, LoRA name, cache salt). So equal keys mean equal
prefixes, whatever hash function and seed an engine uses for itself. Only full blocks have a key, as in vLLM.

    block_size=2, ids=[5, 6, 7, 8, 9] -> 2 keys: k1 = h(root|5,6), k2 = h(k1|7,8); token 9 is in no full block
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence

import msgspec
import xxhash

from serve_app.types import BlockKey, ModelId

KEY_BYTES = 8
_TOKEN_BYTES = 4


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
) -> list[BlockKey]:
    """Keys of the full blocks in `tokens`.

    Args:
        tokens: packed token ids (`pack_tokens`), starting right after `parent`'s block.
        block_size: tokens per block.
        parent: key of the block before, or `namespace_key(...)`.
        extras: per block, bytes that tell apart blocks with equal tokens (images, embeddings); b"" for none.
    """
    digest = xxhash.xxh3_64_digest
    step = block_size * _TOKEN_BYTES
    keys: list[BlockKey] = []
    key: bytes = parent
    for i, start in enumerate(range(0, len(tokens) - step + 1, step)):
        content = key + tokens[start : start + step]
        key = digest(content + extras[i] if extras else content)
        keys.append(BlockKey(key))
    return keys


def split_keys(packed: bytes) -> list[BlockKey]:
    """Undo `b"".join(keys)`."""
    return [BlockKey(packed[i : i + KEY_BYTES]) for i in range(0, len(packed), KEY_BYTES)]
