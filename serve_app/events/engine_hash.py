"""vLLM's own block hashes, computed from token ids.

An event of a sparse KV cache group (sliding window, Mamba) names some blocks of a range of tokens, and not which: the
hashes themselves say it, to whoever can compute them. Nothing else needs them, and scoring never sees one.

Source: vLLM 0.29, v1/core/kv_cache_utils.py `hash_block_tokens`, `init_none_hash`, `maybe_convert_block_hash`;
utils/hashing.py. A hash is of (hash of the block before, token ids, extra keys). The first block's parent is the hash
of a seed, which is PYTHONHASHSEED of the engine's process, or a fixed one.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import cbor2
import xxhash

from serve_app.errors import ConfigError
from serve_app.types import EngineHash

_DEFAULT_SEED = "vllm-none-hash"
_INT_BITS = (1 << 64) - 1  # vLLM sends the low 64 bits as an int, unless VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def _cbor(value: Any) -> bytes:
    return bytes(cbor2.dumps(value, canonical=True))


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


_ALGORITHMS: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], bytes]]] = {
    "sha256": (_pickled, _sha256),
    "sha256_cbor": (_cbor, _sha256),
    "xxhash": (_pickled, xxhash.xxh3_128_digest),
    "xxhash_cbor": (_cbor, xxhash.xxh3_128_digest),
}


class EngineHasher:
    """Args:
    algorithm: vLLM's `--prefix-caching-hash-algo`.
    seed: PYTHONHASHSEED of the engine; None: it was not set. (With xxhash vLLM then takes a random one that
        nobody else knows.)

    Raises:
        ConfigError: there is no such algorithm.
    """

    def __init__(self, algorithm: str = "sha256", seed: str | None = None) -> None:
        if algorithm not in _ALGORITHMS:
            raise ConfigError(f"hash algorithm {algorithm!r} is none of vLLM's: {', '.join(_ALGORITHMS)}")
        self._encode, self._hash = _ALGORITHMS[algorithm]
        self.root = self._hash(self._encode(_DEFAULT_SEED if seed is None else seed))

    def digest(self, parent: bytes, token_ids: Sequence[int], extras: tuple[Any, ...] | None) -> bytes:
        """Hash of one block; `parent` is the whole hash of the block before it, or `root`."""
        return self._hash(self._encode((parent, tuple(token_ids), extras)))


def as_int(digest: bytes) -> EngineHash:
    """A hash as events carry it by default."""
    return int.from_bytes(digest, "big") & _INT_BITS
