"""Loaded by `lmcache server --server-module`: makes the server's event stream say what an index must know.

The stream (lmcache_source.py) reports a stored chunk with the tokens that it was told of beforehand, and leaves out
chunks whose tokens it does not know. LMCache 0.5.6 tells it where the server itself moves the data (`lmcache_driven`,
CUDA and NPU), and forgets to where the engine does (`engine_driven`, CPU and all other devices). So this publishes the
same MP_TOKENS event there: for each chunk of a store, before the write is finished, its hash, its tokens and the hash
before it.

And the stream has no `cache_salt`: a chunk of a salted request looks like the unsalted one with the same tokens, though
the server keeps both, and gives each only to its own. So the salt is added to what a record says of its medium:

    stored in CPU, hash h      of a request without a salt
    stored in CPU@alice, h     of one with `cache_salt: alice`  ("@" is in no salt: LMCache forbids it)

LMCache's engines repeat only what is in `CPU`, so salted chunks are on nobody else's stream.

It runs in LMCache's process and imports nothing else of ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmcache.logging import init_logger
from lmcache.v1.mp_observability.event import Event, EventType
from lmcache.v1.multiprocess.modules.engine_driven_transfer import EngineDrivenTransferModule
from lmcache.v1.multiprocess.modules.kv_events import KVEventModule
from lmcache.v1.multiprocess.token_hasher import TokenHasher

logger = init_logger(__name__)


def build_server_modules(build: Any) -> None:
    """LMCache's `ExtServerModuleFactory`: adds no module, it completes two."""
    for module in build.modules:
        if isinstance(module, EngineDrivenTransferModule):
            _complete(module, build.server_context)
        elif isinstance(module, KVEventModule):
            tell_salts(module, build.server_context.event_bus)


def _complete(module: Any, context: Any) -> None:
    resolve = module._resolve_single_group_obj_keys  # called by every step of a transfer, also right before a write

    def resolve_and_tell(key: Any) -> Any:
        object_keys = resolve(key)
        _tell_tokens(context, key, object_keys)
        return object_keys

    module._resolve_single_group_obj_keys = resolve_and_tell
    logger.info("engine-driven stores carry their token ids on the KV event stream")


def tell_salts(module: Any, event_bus: Any) -> None:
    """Have records of the stream made for one salt at a time, and the salt added to their medium."""
    record, append = module._record_kv_event, module._append_kv_event
    salt = ""  # of the records that are made now; there is one thread for it, the bus'

    def record_by_salt(event: Event) -> None:
        nonlocal salt
        by_salt: dict[str, list[Any]] = {}
        for key in event.metadata["keys"]:
            by_salt.setdefault(key.cache_salt, []).append(key)
        for salt, keys in by_salt.items():  # noqa: B007, PERF102  # append_with_salt reads it
            record(replace(event, metadata={**event.metadata, "keys": keys}))
        salt = ""

    def append_with_salt(*arguments: Any) -> None:
        with module._kv_event_lock:  # nobody reads the record before it is whole
            append(*arguments)
            if salt:
                module._kv_event_log[-1].medium += f"@{salt}"

    module._append_kv_event = append_with_salt
    for event_type, subscribers in event_bus._subscribers.items():
        if record in subscribers and event_type is not EventType.MP_TOKENS:
            subscribers[subscribers.index(record)] = record_by_salt


def _tell_tokens(context: Any, key: Any, object_keys: list[Any]) -> None:
    if key.worker_id != 0 or not object_keys:  # tokens are the same for every rank
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
