"""Loaded by `lmcache server --server-module`: makes the server's event stream say what an index must know.

The stream (lmcache_source.py) reports a stored chunk with the tokens that it was told of beforehand, and leaves out
chunks whose tokens it does not know. LMCache 0.5.6 tells it where the server itself moves the data (`lmcache_driven`,
CUDA and NPU), and forgets to where the engine does (`engine_driven`, CPU and all other devices). So this publishes the
same MP_TOKENS event there: for each chunk of a store, before the write is finished, its hash, its tokens and the hash
before it.

And the stream has no `cache_salt`: a salted chunk looks like the unsalted one, which nobody may have. So for chunks of
salted requests no tokens are told on either way, and the index does not hear of them.

It runs in LMCache's process and imports nothing else of ours.
"""

from __future__ import annotations

from typing import Any

from lmcache.logging import init_logger
from lmcache.v1.mp_observability.event import Event, EventType
from lmcache.v1.multiprocess.modules.engine_driven_transfer import EngineDrivenTransferModule
from lmcache.v1.multiprocess.modules.lmcache_driven_transfer import LMCacheDrivenTransferModule
from lmcache.v1.multiprocess.token_hasher import TokenHasher

logger = init_logger(__name__)


def build_server_modules(build: Any) -> None:
    """LMCache's `ExtServerModuleFactory`: adds no module, it completes two."""
    for module in build.modules:
        if isinstance(module, EngineDrivenTransferModule):
            _complete(module, build.server_context)
        elif isinstance(module, LMCacheDrivenTransferModule):
            _leave_out_salted(module)


def _complete(module: Any, context: Any) -> None:
    resolve = module._resolve_single_group_obj_keys  # called by every step of a transfer, also right before a write

    def resolve_and_tell(key: Any) -> Any:
        object_keys = resolve(key)
        _tell_tokens(context, key, object_keys)
        return object_keys

    module._resolve_single_group_obj_keys = resolve_and_tell
    logger.info("engine-driven stores carry their token ids on the KV event stream")


def _leave_out_salted(module: Any) -> None:
    publish = module._publish_token_bindings

    def publish_unsalted(key: Any, object_keys: list[Any]) -> None:
        if not key.cache_salt:
            publish(key, object_keys)

    module._publish_token_bindings = publish_unsalted


def _tell_tokens(context: Any, key: Any, object_keys: list[Any]) -> None:
    if key.worker_id != 0 or key.cache_salt or not object_keys:  # tokens are the same for every rank
        return
    size, start = context.chunk_size, key.start
    hashes = [object_key.chunk_hash for object_key in object_keys]
    before = None
    if start >= size:  # hashed when the keys were resolved
        session = context.session_manager.get_or_create(key.request_id)
        before = TokenHasher.hash_to_bytes(session.get_hashes(start - size, start)[0])
    offsets = range(start, start + size * len(hashes), size)
    context.event_bus.publish(
        Event(
            event_type=EventType.MP_TOKENS,
            session_id=key.request_id,
            metadata={
                "chunk_hashes": hashes,
                "token_chunks": [list(key.token_ids[offset : offset + size]) for offset in offsets],
                "token_offsets": list(offsets),
                "parent_hashes": [before, *hashes[:-1]],
            },
        )
    )
