"""The one promise of this module: token ids and keys from the store are those of the whole prompt, always."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.blocks import block_keys, namespace_key, pack_tokens
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.tokenizer import Tokenizer
from serve_app.types import ModelId
from tests.unit.prompts import families

FRAGMENTS = [
    *families.PLAIN,
    *(t.content for t in families.AWKWARD),
    *("<|im_", "start|>", "|>", "<", "<|im_start", "<|im|", "eo", "t", "wor", "d", "words", " word", "_", "1"),
    *(
        "a b",
        "Z z",
        "I'll be",
        "don't we",
        "e\u0301 a",
        "a \u0301b",
        "x  y",
        "q 1",
        "a\nb c",
        "(a b)",
        "\u0130 \u0131",
        "s S",
    ),
    *(" ", "   ", "\n", "\t", "\r\n", "\u00a0", "\u200d", "\u3000"),
    *("hello", "hel", "lo", "Yesterday", "yester", "the quick brown", "naïve", "ﬁ", "e\u0301", "\u0301", "日本", "Ⅷ"),
    *("👩‍👩‍👧", "\U0001f1e9\U0001f1ea", "▁", "Ġ", "''s", "don't", "1234567", "{'a': 1}", "\x00"),
]
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=30).map("".join)
MARK = "<|im_start|>"


@pytest.mark.parametrize("name", families.NAMES)
@pytest.mark.parametrize("awkward", [True, False])
@settings(max_examples=150, deadline=None)
@given(text=texts, special=st.booleans(), min_chars=st.sampled_from([1, 20]))
def test_segments_encode_to_the_whole(name: str, awkward: bool, text: str, special: bool, min_chars: int) -> None:
    backend = families.build(name, awkward=awkward)
    tokenizer = Tokenizer(backend, min_segment_chars=min_chars, min_text_chars=min_chars)
    segments = tokenizer.split(text, special)
    assert "".join(s.text for s in segments) == text
    encoded = b"".join(tokenizer.encode_segments(segments))
    assert encoded == pack_tokens(backend.encode(text, add_special_tokens=special).ids)


@pytest.mark.parametrize("name", families.NAMES)
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(texts, min_size=1, max_size=5),
    awkward=st.booleans(),
    picks=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=12),
    special=st.booleans(),
    max_bytes=st.sampled_from([0, 1_000, 4_000, 10**7]),
    block_size=st.integers(1, 8),
)
def test_prompts_that_share_prefixes(
    name: str,
    parts: list[str],
    awkward: bool,
    picks: list[list[int]],
    special: bool,
    max_bytes: int,
    block_size: int,
) -> None:
    """A sequence of prompts over one small store, so that entries are hit, evicted and made again."""
    backend = families.build(name, awkward=awkward)
    tokenizer = Tokenizer(backend, min_segment_chars=1, min_text_chars=3)
    store = PrefixStore(max_bytes)
    root = namespace_key(ModelId("m"), block_size)
    for pick in picks:
        text = MARK.join(parts[i % len(parts)] for i in pick)
        lookup = store.lookup(root, tokenizer.split(text, special), block_size)
        prompt = store.complete(lookup, tokenizer.encode_segments(lookup.missing))
        ids = backend.encode(text, add_special_tokens=special).ids
        assert prompt.token_ids() == ids
        assert prompt.token_count == len(ids)
        assert prompt.cached_token_count <= len(ids)
        assert prompt.block_keys == block_keys(pack_tokens(ids), block_size, root)
        assert store.stats().bytes <= max_bytes
