"""The store of token ids by prefix: what it shares, and what it evicts."""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve_app.blocks import block_keys, namespace_key, pack_tokens
from serve_app.prompts.prefix_store import EncodedPrompt, PrefixStore
from serve_app.prompts.tokenizer import Segment
from serve_app.types import BlockKey, ModelId

BLOCK_SIZE = 4
ROOT = namespace_key(ModelId("m"), BLOCK_SIZE)


def ids_of(segment: Segment) -> bytes:
    return pack_tokens(list(segment.text.encode()))


def encode(store: PrefixStore, *texts: str, root: BlockKey = ROOT, tokenizer: str = "") -> EncodedPrompt:
    lookup = store.lookup(root, [Segment(t) for t in texts], BLOCK_SIZE, tokenizer)
    return store.complete(lookup, [ids_of(s) for s in lookup.missing])


def test_two_steps() -> None:
    store = PrefixStore(10**6)
    first = encode(store, "abcdef", "ghi")
    assert (first.token_count, first.cached_token_count) == (9, 0)
    assert first.block_keys == block_keys(pack_tokens(list(b"abcdefghi")), BLOCK_SIZE, ROOT)
    lookup = store.lookup(ROOT, [Segment("abcdef"), Segment("xyz")], BLOCK_SIZE)
    assert lookup.missing == [Segment("xyz")]
    second = store.complete(lookup, [pack_tokens(list(b"xyz"))])
    assert (second.token_count, second.cached_token_count) == (9, 6)
    assert second.block_keys == block_keys(pack_tokens(list(b"abcdefxyz")), BLOCK_SIZE, ROOT)
    assert bytes(second.token_ids()) == b"abcdefxyz"


def test_warm() -> None:
    store = PrefixStore(10**6)
    cold = encode(store, "abcdef", "ghi")
    lookup = store.lookup(ROOT, [Segment("abcdef"), Segment("ghi")], BLOCK_SIZE)
    assert lookup.missing == []
    warm = store.complete(lookup, [])
    assert warm.block_keys == cold.block_keys
    assert warm.cached_token_count == warm.token_count == 9


def test_empty_prompt() -> None:
    assert encode(PrefixStore(10**6)) == EncodedPrompt(b"", 0, 0, ())


def test_same_text_cut_elsewhere_is_another_entry() -> None:
    store = PrefixStore(10**6)
    encode(store, "ab", "c")
    assert store.lookup(ROOT, [Segment("a"), Segment("bc")], BLOCK_SIZE).missing == [Segment("a"), Segment("bc")]


def test_nothing_is_shared_across_namespaces_and_tokenizers() -> None:
    store = PrefixStore(10**6)
    encode(store, "abcd")
    for root, tokenizer, flag in [
        (namespace_key(ModelId("m"), BLOCK_SIZE, lora="l"), "", False),
        (namespace_key(ModelId("m"), BLOCK_SIZE, salt="s"), "", False),
        (ROOT, "other", False),
        (ROOT, "", True),
    ]:
        assert store.lookup(root, [Segment("abcd", flag)], BLOCK_SIZE, tokenizer).missing


def test_wrong_number_of_ids() -> None:
    store = PrefixStore(10**6)
    with pytest.raises(ValueError, match="1 segments were missing"):
        store.complete(store.lookup(ROOT, [Segment("a")], BLOCK_SIZE), [])


def test_leaves_go_first() -> None:
    store = PrefixStore(10**6)
    encode(store, "root", "a")
    one = store.stats().bytes // 2
    store = PrefixStore(one * 3 + one // 2)
    for leaf in "abcdef":
        encode(store, "root", leaf)
    stats = store.stats()
    assert (stats.entries, stats.evictions) == (3, 4)
    assert store.lookup(ROOT, [Segment("root"), Segment("f")], BLOCK_SIZE).missing == []
    assert store.lookup(ROOT, [Segment("root"), Segment("a")], BLOCK_SIZE).missing == [Segment("a")]


def test_evicted_between_the_steps() -> None:
    store = PrefixStore(600)
    encode(store, "abcd")
    lookup = store.lookup(ROOT, [Segment("abcd"), Segment("efgh")], BLOCK_SIZE)
    assert lookup.missing == [Segment("efgh")]
    encode(store, "something else")
    prompt = store.complete(lookup, [pack_tokens(list(b"efgh"))])
    assert prompt.block_keys == block_keys(pack_tokens(list(b"abcdefgh")), BLOCK_SIZE, ROOT)


def test_counts() -> None:
    store = PrefixStore(10**6)
    encode(store, "a", "b")
    encode(store, "a", "c")
    encode(store, "a", "b")
    stats = store.stats()
    assert (stats.entries, stats.hits, stats.misses, stats.evictions) == (3, 3, 3, 0)


def test_bytes_are_those_of_memory() -> None:
    texts = [f"{i:06d}" * 20 for i in range(3000)]
    segments = [[Segment(t)] for t in texts]
    packed = [ids_of(s[0]) for s in segments]
    del texts
    gc.collect()
    store = PrefixStore(10**9)
    tracemalloc.start()
    for one, ids in zip(segments, packed, strict=True):
        store.complete(store.lookup(ROOT, one, BLOCK_SIZE), [bytes(bytearray(ids))])
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert store.stats().bytes == pytest.approx(used, rel=0.1)


def test_threads() -> None:
    store = PrefixStore(20_000)
    prompts = [["system", f"user {i % 50}", f"answer {i % 7}"] for i in range(2000)]

    def check(texts: list[str]) -> bool:
        expected = block_keys(pack_tokens(list("".join(texts).encode())), BLOCK_SIZE, ROOT)
        return encode(store, *texts).block_keys == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, prompts))
    assert store.stats().bytes <= 20_000
    assert store.stats().bytes == sum(e.size_bytes() for e in store._entries.values())
