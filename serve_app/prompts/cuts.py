"""Where a text may be cut so that its pieces tokenize to the same ids as the whole.

In: a `tokenizers.Tokenizer`, then texts. Out: positions. Two kinds of place are proven safe, and only those are used.

1. Right before a special token, for every tokenizer. `tokenizers` (added_vocabulary.rs, `extract_and_normalize`) first
   looks for the non-normalized added tokens in the raw text, left to right, longest match first, and handles each piece
   between two matches on its own: normalizer, normalized added tokens, pre-tokenizer and model never look across.
   A cut in front of a match changes neither what is found before it (those matches end there at the latest) nor after
   (the search starts anew behind every match), provided that what lies at the cut cannot be seen from either side:
   - the token takes no whitespace around it (`lstrip`, `rstrip`) and is bound to no word (`single_word`);
   - its first character is neither whitespace, which an `rstrip` token before it would swallow, nor a word character,
     which would stop a `single_word` token before it.
   A metaspace is prepended at the very start of a text (`prepend_scheme: first`) or of every piece; a later segment
   starts with its special token, so its first piece is not at the start either.

2. Inside ordinary text, between an ASCII letter and ` x` (one space, one ASCII letter), for byte-level BPE with one of
   the patterns in `_PATTERNS`. No alternative of theirs has a letter followed by a space, so every match that covers
   the letter ends at the cut; none looks back, so matching starts anew there; the only look-ahead is behind whitespace.
   NFC does not reach across either. Added tokens must hold no whitespace and not look around.

    "<|im_start|>user\\nhi there<|im_end|>\\n"   cuts: before <|im_end|>; before " there", if the pattern is known
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from typing import Any

from serve_app.prompts.longest_match import longest_match

MIN_SEGMENT_CHARS = 256  # between cuts of the first kind: each segment costs an entry in the store
MIN_TEXT_CHARS = 2048  # before a cut of the second kind
_OPENERS = frozenset(string.punctuation) - {"_"}  # neither word character nor whitespace, in any regex engine
_WORD_GAP = re.compile("[A-Za-z](?= [A-Za-z])")
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2; ByteLevel's own
        _CL100K % "",  # Qwen 2, Qwen 3
        _CL100K % "{1,3}",  # Llama 3
    }
)


class Cutter:
    """Finds the cuts in texts for one tokenizer."""

    def __init__(self, backend: Any, min_segment_chars: int, min_text_chars: int) -> None:
        added = [t for t in backend.get_added_tokens_decoder().values() if t.content]
        raw = [t.content for t in added if not t.normalized]
        plain = {t.content for t in added if not (t.normalized or t.lstrip or t.rstrip or t.single_word)}
        self._openers = frozenset(t for t in plain if t[0] in _OPENERS)
        if backend.encode_special_tokens:  # special tokens in a text are then ordinary text
            self._openers = frozenset()
        self._added = longest_match(raw)
        self.reach = max([2, *map(len, raw)])  # characters behind a cut that it depends on
        self._min_segment_chars = min_segment_chars
        looks_around = any(t.lstrip or t.rstrip or t.single_word or any(map(str.isspace, t.content)) for t in added)
        self._min_text_chars = None if looks_around or not _splits_words(backend) else min_text_chars
        self._min_cut_chars = min(min_segment_chars, self._min_text_chars or min_segment_chars)

    def cuts(self, text: str) -> Iterator[int]:
        """Positions in rising order, 0 and the end left out.

        Whether there is a cut depends on the text before it and the word or token right behind it only, so prompts with
        a common prefix are cut at the same places in it.
        """
        last = 0
        for match in self._added.finditer(text):
            start = match.start()
            if start - last < self._min_cut_chars or match.group() not in self._openers:
                continue
            for last in self._word_gaps(text, last, start):  # noqa: B020  the next mark counts from the last gap
                yield last
            if start - last >= self._min_segment_chars and start > 0:
                last = start
                yield last
        yield from self._word_gaps(text, last, len(text))

    def added_tokens(self, text: str) -> Iterator[tuple[int, str]]:
        """Every added token that the tokenizer finds in the raw text, with its position."""
        return ((match.start(), match.group()) for match in self._added.finditer(text))

    def last_cut(self, text: str, end: int) -> int:
        """The last cut of the first kind at `end` or before it, however close to others; 0 if there is none."""
        return max((at for at, token in self.added_tokens(text) if at <= end and token in self._openers), default=0)

    def _word_gaps(self, text: str, last: int, end: int) -> Iterator[int]:
        if self._min_text_chars is None:
            return
        while match := _WORD_GAP.search(text, last + self._min_text_chars, end):
            last = match.end()
            yield last


def _splits_words(backend: Any) -> bool:
    """Whether the tokenizer is one that the second kind of cut is proven for."""
    try:
        config = json.loads(backend.to_str())
    except Exception:  # a part written in Python cannot be serialized, and nothing is known of it
        return False
    model, normalizer, pre = config["model"], config["normalizer"], config["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("end_of_word_suffix"):
        return False
    if model.get("continuing_subword_prefix") or (normalizer is not None and normalizer["type"] != "NFC"):
        return False
    if pre is None:
        return False
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    by_pattern = False
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                by_pattern |= step.get("use_regex", True)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                if pattern not in _PATTERNS:
                    return False
                by_pattern = True
            case {"type": "Digits"}:
                pass
            case _:
                return False
    return by_pattern
