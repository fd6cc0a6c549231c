"""A client of the score service: `KVCacheClient`, and `AsyncKVCacheClient` for an event loop.

with KVCacheClient("http://127.0.0.1:8100") as kv:
    choice = kv.choose({"model": "smollm2", "messages": [...]})
    ...                                     # send the request to choice.chosen.address
    kv.done(choice.request_id, prompt_tokens=900, cached_tokens=896)
"""

from serve_app.client.client import AsyncKVCacheClient, KVCacheClient
from serve_app.client.errors import ServiceError

__all__ = ["AsyncKVCacheClient", "KVCacheClient", "ServiceError"]
