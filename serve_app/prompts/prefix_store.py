"""What is known of prompts seen before: token ids and finished block keys, segment by segment.

In: the segments of a prompt. Out: which of them still have to be tokenized; given their ids, the prompt's block keys.
A known segment is neither tokenized nor hashed into block keys again. A prompt that has a name (a digest of the request
it is made of) is found by it as a whole, without its text: its block keys are filed under the name.

Each segment is filed under XXH3-128 over `digest of the segment before || its text`; the first digest is made of the
namespace key and the tokenizer, so no entry is shared across models, block sizes, LoRAs, salts or tokenizers.

    block_size=4, segments of 6 and 3 tokens -> entry 1: 1 key, tail of 2 tokens; entry 2: 1 key, tail of 1 token
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import xxhash

from serve_app.blocks import KEY_BYTES, TOKEN_BYTES, block_keys
from serve_app.prompts.conversations import Conversations
from serve_app.prompts.tokenizer import Segment
from serve_app.types import BlockKey, BlockKeys

_DIGEST_BYTES = 16
# Of one entry beside its payload: dict slot and list node of OrderedDict (measured with tracemalloc, CPython 3.11).
_SLOT_BYTES = 110
_NAMED_SHARE = 8  # named prompts take at most 1/8 of the store
_CONVERSATIONS_SHARE = 16  # and conversations 1/16, set aside for them


@dataclass(frozen=True, slots=True)
class _Entry:
    ids: bytes  # packed token ids of the segment
    keys: BlockKeys  # of the blocks that end in the segment
    tail: bytes  # packed token ids since the last full block, also from segments before
    parent: BlockKey  # key of the last full block, to go on from

    def size_bytes(self) -> int:
        payload = (self, self.ids, self.keys, self.tail, self.parent)
        return sum(map(sys.getsizeof, payload)) + sys.getsizeof(b"") + _DIGEST_BYTES + _SLOT_BYTES


@dataclass(frozen=True, slots=True)
class _Named:
    digests: tuple[bytes, ...]  # of its segments
    keys: BlockKeys
    token_count: int

    def size_bytes(self) -> int:
        payload = (self, self.digests, self.keys, self.token_count)
        digests = (len(self.digests) + 1) * (sys.getsizeof(b"") + _DIGEST_BYTES)
        return sum(map(sys.getsizeof, payload)) + digests + _SLOT_BYTES


@dataclass(frozen=True, slots=True)
class Lookup:
    """A prompt between its two steps: what is known of it, what is missing."""

    missing: list[Segment]  # to be tokenized: everything behind the longest known prefix
    block_size: int
    root: BlockKey
    digests: tuple[bytes, ...]  # one per segment
    known: tuple[_Entry, ...]  # the first segments


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the index sees it."""

    block_keys: BlockKeys  # of its full blocks
    token_count: int
    cached_token_count: int  # of these, how many did not have to be tokenized
    chunks: tuple[bytes, ...]  # packed token ids

    def token_ids(self) -> list[int]:
        """All token ids; made when asked for."""
        ids = array("I", b"".join(self.chunks))
        if sys.byteorder == "big":
            ids.byteswap()
        return ids.tolist()


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the start, but for `entries` and `bytes`, which are of now."""

    entries: int
    bytes: int
    hits: int  # segments found
    misses: int  # segments that had to be tokenized
    evictions: int


class PrefixStore:
    """Thread-safe, bounded by bytes, least recently used first out."""

    def __init__(self, max_bytes: int) -> None:
        self.conversations = Conversations(max_bytes // _CONVERSATIONS_SHARE)
        self._max_bytes = max_bytes - max_bytes // _CONVERSATIONS_SHARE
        self._lock = Lock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # oldest use first
        self._named: OrderedDict[bytes, _Named] = OrderedDict()  # by name of the prompt
        self._named_bytes = 0
        self._bytes = self._hits = self._misses = self._evictions = 0

    def lookup(self, root: BlockKey, segments: Sequence[Segment], block_size: int, tokenizer: str = "") -> Lookup:
        """First step: what of a prompt is known.

        Args:
            root: key of the namespace (`serve_app.blocks.namespace_key`).
            segments: the whole prompt.
            block_size: tokens per block; the one in `root`.
            tokenizer: tells apart tokenizers that are used in the same namespace.
        """
        lookup = self.go_on((), root, segments, block_size, tokenizer)
        assert lookup is not None
        return lookup

    def go_on(
        self, before: tuple[bytes, ...], root: BlockKey, segments: Sequence[Segment], block_size: int, tokenizer: str
    ) -> Lookup | None:
        """The same for a prompt of which only the end is given; None if some of what is before it was evicted.

        Args:
            before: digests of the segments before, of an earlier lookup with this root and tokenizer.
            segments: the rest of the prompt.
            root, block_size, tokenizer: as in `lookup`.
        """
        start = before[-1] if before else xxhash.xxh3_128_digest(root + tokenizer.encode())
        digests = (*before, *_digests(start, segments))
        known: list[_Entry] = []
        with self._lock:
            for digest in digests:
                entry = self._entries.get(digest)
                if entry is None:
                    break
                known.append(entry)
            if len(known) < len(before):
                return None
            if len(known) == len(digests):  # else `complete` will
                self._touch(digests)
            self._hits += len(known)
            self._misses += len(digests) - len(known)
        return Lookup(list(segments[len(known) - len(before) :]), block_size, root, digests, tuple(known))

    def find_named(self, name: bytes) -> EncodedPrompt | None:
        """The whole prompt of that name, unless some of it was evicted."""
        with self._lock:
            named = self._named.get(name)
            if named is None:
                return None
            self._named.move_to_end(name)
            entries = self._entries
            chunks: list[bytes] = []
            for digest in reversed(named.digests):  # the order of `_touch`
                entry = entries.get(digest)
                if entry is None:
                    return None
                entries.move_to_end(digest)
                chunks.append(entry.ids)
            self._hits += len(chunks)
        return EncodedPrompt(named.keys, named.token_count, named.token_count, tuple(reversed(chunks)))

    def name(self, name: bytes, lookup: Lookup, encoded: EncodedPrompt) -> None:
        """Let a prompt be found by its name, which must tell apart all that `lookup` was made of, root included."""
        named = _Named(lookup.digests, encoded.block_keys, encoded.token_count)
        with self._lock:
            replaced = self._named.pop(name, None)
            self._named[name] = named
            self._named_bytes += named.size_bytes() - (replaced.size_bytes() if replaced else 0)
            while self._named_bytes > self._max_bytes // _NAMED_SHARE:
                self._named_bytes -= self._named.popitem(last=False)[1].size_bytes()
            self._evict()

    def complete(self, lookup: Lookup, ids: Sequence[bytes]) -> EncodedPrompt:
        """Second step: store what was missing, and give the whole.

        Args:
            lookup: of the first step. What it knows is used even if it was evicted in between.
            ids: packed token ids of `lookup.missing`, one each.
        """
        if len(ids) != len(lookup.missing):
            raise ValueError(f"{len(lookup.missing)} segments were missing, got ids of {len(ids)}")
        parent, tail = (lookup.known[-1].parent, lookup.known[-1].tail) if lookup.known else (lookup.root, b"")
        made: list[_Entry] = []
        for segment_ids in ids:
            tokens = tail + segment_ids
            keys = block_keys(tokens, lookup.block_size, parent)
            tail = tokens[len(keys) // KEY_BYTES * lookup.block_size * TOKEN_BYTES :]
            parent = BlockKey(keys[-KEY_BYTES:]) if keys else parent
            made.append(_Entry(segment_ids, keys, tail, parent))
        if made:
            self._store(lookup.digests, len(lookup.known), made)
        return _joined((*lookup.known, *made), len(lookup.known))

    @staticmethod
    def known(lookup: Lookup) -> EncodedPrompt:
        """The known segments alone."""
        return _joined(lookup.known, len(lookup.known))

    def stats(self) -> StoreStats:
        with self._lock:
            held = self._bytes + self._named_bytes + self.conversations.size_bytes()
            return StoreStats(len(self._entries), held, self._hits, self._misses, self._evictions)

    def _store(self, digests: Sequence[bytes], first: int, made: Sequence[_Entry]) -> None:
        with self._lock:
            for digest, entry in zip(digests[first:], made, strict=True):
                replaced = self._entries.pop(digest, None)  # another thread had the same prompt
                self._bytes += entry.size_bytes() - (replaced.size_bytes() if replaced else 0)
                self._entries[digest] = entry
            self._touch(digests)
            self._evict()

    def _evict(self) -> None:
        while self._entries and self._bytes + self._named_bytes > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self._bytes -= evicted.size_bytes()
            self._evictions += 1

    def _touch(self, digests: Sequence[bytes]) -> None:
        """Mark as used, the last segment first: a segment is then never evicted before those that build on it."""
        entries = self._entries
        for digest in reversed(digests):
            if digest in entries:
                entries.move_to_end(digest)


def _joined(entries: Sequence[_Entry], known: int) -> EncodedPrompt:
    chunks = tuple([entry.ids for entry in entries])
    cached = sum(map(len, chunks[:known]))
    return EncodedPrompt(
        block_keys=b"".join([entry.keys for entry in entries]),
        token_count=(cached + sum(map(len, chunks[known:]))) // TOKEN_BYTES,
        cached_token_count=cached // TOKEN_BYTES,
        chunks=chunks,
    )


def _digests(digest: bytes, segments: Sequence[Segment]) -> Iterator[bytes]:
    for segment in segments:
        flag = b"\1" if segment.add_special_tokens else b"\0"
        digest = xxhash.xxh3_128_digest(digest + flag + segment.text.encode())
        yield digest
