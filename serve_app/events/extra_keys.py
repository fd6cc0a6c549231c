"""What tells blocks of equal tokens apart: LoRA adapter, cache salt, images.

vLLM puts them into a block's extra keys, in this order: LoRA name, images, salt (block 0 only), prompt embeddings
(v1/core/kv_cache_utils.py `generate_block_hash_extra_keys`). LoRA name and salt are in our namespace, so that a
request's keys need no extras; the rest is hashed with the block.
"""

from __future__ import annotations

from typing import Any

import msgspec

from serve_app.events.wire import BlockStored


def cache_salt(event: BlockStored) -> str | None:
    """`cache_salt` of the request, if the event has its first block."""
    if not event.extra_keys or event.parent_block_hash is not None:
        return None
    own = _without_lora(event.extra_keys[0], event.lora_name)
    return own[0] if len(own) == 1 and isinstance(own[0], str) else None


def block_extras(event: BlockStored, canonical_blocks: int) -> list[bytes] | None:
    """Per canonical block, what is hashed with its tokens; None if there is nothing.

    Args:
        canonical_blocks: in each block of the event.
    """
    if not event.extra_keys:
        return None
    salt = cache_salt(event)
    extras: list[bytes] = []
    for i, extra in enumerate(event.extra_keys):
        own = _without_lora(extra, event.lora_name)
        if i == 0 and salt is not None:
            own = ()
        content = msgspec.msgpack.encode(own) if own else b""
        extras.extend([content] * canonical_blocks)
    return extras if any(extras) else None


def as_hashed(extra: Any) -> Any:
    """Extra keys as vLLM hashes them: what is a tuple there comes as a list."""
    return tuple(map(as_hashed, extra)) if isinstance(extra, (list, tuple)) else extra


def _without_lora(extra: tuple[Any, ...] | None, lora_name: str | None) -> tuple[Any, ...]:
    if not extra:
        return ()
    return extra[1:] if lora_name and extra[0] == lora_name else extra
