"""Canonical block keys: chained, full blocks only, and told apart by everything that must tell them apart."""

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from serve_app.blocks import KEY_BYTES, block_keys, namespace_key, pack_tokens, split_keys
from serve_app.types import BlockKey, ModelId

MODEL = ModelId("m")
ROOT = namespace_key(MODEL, 2)

ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_keys_are_xxh3_of_parent_and_little_endian_ids() -> None:
    first = xxhash.xxh3_64_digest(ROOT + bytes([5, 0, 0, 0, 6, 0, 0, 0]))
    second = xxhash.xxh3_64_digest(first + bytes([7, 0, 0, 0, 0, 1, 0, 0]))
    assert block_keys(pack_tokens([5, 6, 7, 256, 9]), 2, ROOT) == first + second


@given(ids, ids, st.integers(1, 5))
def test_common_prefix_of_tokens_is_common_prefix_of_keys(a: list[int], b: list[int], size: int) -> None:
    root = namespace_key(MODEL, size)
    keys_a, keys_b = (split_keys(block_keys(pack_tokens(some), size, root)) for some in (a, b))
    assert len(keys_a) == len(a) // size
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    for i in range(min(len(keys_a), len(keys_b))):
        assert (keys_a[i] == keys_b[i]) == ((i + 1) * size <= same)


@given(ids, st.integers(1, 5), st.integers(0, 7))
def test_keys_can_be_continued_from_any_block(tokens: list[int], size: int, cut: int) -> None:
    root = namespace_key(MODEL, size)
    whole = block_keys(pack_tokens(tokens), size, root)
    cut = min(cut, len(whole) // KEY_BYTES)
    head, tail = pack_tokens(tokens[: cut * size]), pack_tokens(tokens[cut * size :])
    first = block_keys(head, size, root)
    assert first + block_keys(tail, size, BlockKey(first[-KEY_BYTES:]) if first else root) == whole


def test_namespaces_share_nothing() -> None:
    roots = {
        namespace_key(MODEL, 2),
        namespace_key(ModelId("n"), 2),
        namespace_key(MODEL, 4),
        namespace_key(MODEL, 2, lora="a"),
        namespace_key(MODEL, 2, salt="a"),
        namespace_key(MODEL, 2, lora="a", salt="b"),
    }
    assert len(roots) == 6


def test_extras_change_their_block_and_all_after_it() -> None:
    tokens = pack_tokens(range(6))
    plain = split_keys(block_keys(tokens, 2, ROOT))
    marked = split_keys(block_keys(tokens, 2, ROOT, [b"", b"image", b""]))
    assert marked[0] == plain[0]
    assert marked[1] != plain[1]
    assert marked[2] != plain[2]


def test_packed_keys_split_again() -> None:
    keys = block_keys(pack_tokens(range(8)), 2, ROOT)
    assert b"".join(split_keys(keys)) == keys
    assert all(len(key) == KEY_BYTES for key in split_keys(keys))
