"""Text that is cut, tokenized in parts and joined has the ids of the whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import AddedToken

from serve_app.blocks import pack_tokens
from serve_app.errors import PromptError
from serve_app.prompts.tokenizer import Segment, Tokenizer
from tests.unit.prompts import families

CHAT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def cuts(tokenizer: Tokenizer, text: str, special: bool = False) -> list[str]:
    return [s.text for s in tokenizer.split(text, special)]


@pytest.mark.parametrize("name", families.NAMES)
def test_cuts_before_special_tokens(name: str) -> None:
    tokenizer = Tokenizer(families.build(name), min_segment_chars=1)
    assert cuts(tokenizer, CHAT) == ["<|im_start|>user\nhi", "<|im_end|>\n", "<|im_start|>assistant\n"]


def test_short_segments_are_joined() -> None:
    tokenizer = Tokenizer(families.build("byte-level"), min_segment_chars=20)
    assert cuts(tokenizer, CHAT) == ["<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>assistant\n"]


def test_longest_token_wins() -> None:
    tokenizer = Tokenizer(families.build("byte-level"), min_segment_chars=1)
    assert cuts(tokenizer, "a<|b|><|c<|im|>") == ["a", "<|b", "|><|c", "<|im|>"]


def test_no_cut_before_tokens_that_look_around() -> None:
    tokenizer = Tokenizer(families.build("byte-level"), min_segment_chars=1)
    text = "a <mask> b<r> c <w> word eot Yester \n\n <n>"
    assert cuts(tokenizer, text) == [text]


def test_nothing_to_split() -> None:
    tokenizer = Tokenizer(families.build("byte-level"))
    assert tokenizer.split("", False) == []
    assert cuts(tokenizer, "hi") == ["hi"]


def test_special_tokens_are_added_to_the_whole_only() -> None:
    tokenizer = Tokenizer(families.build("llama3"), min_segment_chars=1)
    assert tokenizer.split(CHAT, True) == [Segment(CHAT, True)]
    assert len(tokenizer.split(CHAT, False)) == 3
    assert len(Tokenizer(families.build("byte-level"), 1).split(CHAT, True)) == 3, "it has none to add"


def test_split_special_tokens() -> None:
    """With `encode_special_tokens` special tokens in a text are ordinary text: no cuts."""
    backend = Tokenizer(families.build("byte-level"))._backend
    backend.encode_special_tokens = True
    tokenizer = Tokenizer(backend, min_segment_chars=1)
    assert cuts(tokenizer, CHAT) == [CHAT]


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    backend = Tokenizer(families.build("byte-level"))._backend
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    (ids,) = Tokenizer(backend).encode_segments([Segment("hello")])
    assert ids == pack_tokens(families.build("byte-level").encode("hello").ids)


def test_half_a_surrogate_pair() -> None:
    with pytest.raises(PromptError) as caught:
        Tokenizer(families.build("byte-level")).split("a\ud800", False)
    assert caught.value.reason == "bad_unicode"


def test_threads() -> None:
    tokenizer = Tokenizer(families.build("byte-level"), min_segment_chars=1)
    texts = [f"{CHAT} {i} " * 20 for i in range(64)]
    segments = [tokenizer.split(t, False) for t in texts]
    expected = [tokenizer.encode_segments(s) for s in segments]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode_segments, segments)) == expected


@pytest.mark.parametrize("text", [" " * 500_000, "a" * 500_000, "<|" * 100_000, "\n" * 500_000])
def test_long_and_dull(text: str) -> None:
    tokenizer = Tokenizer(families.build("llama3"))
    ids = b"".join(tokenizer.encode_segments(tokenizer.split(text, False)))
    assert ids == pack_tokens(families.build("llama3").encode(text, add_special_tokens=False).ids)


def test_a_token_that_starts_with_whitespace_is_no_place_to_cut() -> None:
    """An rstrip token in front of it swallows its whitespace, so it is not found where it stands."""
    backend = Tokenizer(families.build("byte-level", awkward=False))._backend
    backend.add_tokens([AddedToken("<r>", rstrip=True, normalized=False), AddedToken(" <x>", normalized=False)])
    tokenizer = Tokenizer(backend, min_segment_chars=1)
    assert cuts(tokenizer, "a<r> <x>") == ["a<r> <x>"]


@pytest.mark.parametrize("name", families.NAMES)
def test_cuts_inside_text_where_the_pattern_is_known(name: str) -> None:
    tokenizer = Tokenizer(families.build(name, awkward=False), min_segment_chars=1, min_text_chars=4)
    known = name in ("byte-level", "llama3")
    expected = ["<|im_start|>the", " quick", " brown", " fox 1 2 3 .  jumps", " over", "<|im_end|>x"]
    assert cuts(tokenizer, "".join(expected)) == (expected if known else ["".join(expected[:-1]), expected[-1]])


def test_no_cut_inside_text_beside_tokens_that_look_around() -> None:
    tokenizer = Tokenizer(families.build("byte-level", awkward=True), min_segment_chars=1, min_text_chars=1)
    assert cuts(tokenizer, "the quick brown fox") == ["the quick brown fox"]


def test_prompts_with_a_common_prefix_have_common_segments() -> None:
    tokenizer = Tokenizer(families.build("llama3", awkward=False))
    text = "the quick brown fox jumps over the lazy dog " * 500
    one, two = cuts(tokenizer, text + "one"), cuts(tokenizer, text + "two")
    assert one[:-1] == two[:-1]
    assert len(one) == 11
