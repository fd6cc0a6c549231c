"""Text -> token ids, in segments that can be cached one by one.

In: text. Out: packed token ids (`serve_app.blocks.pack_tokens`). Encoding is done by the `tokenizers` library.

Cuts stand only where the ids of the pieces are proven to be the ids of the whole: see cuts.py. With
`add_special_tokens=True` and a post-processor that adds tokens a text stays whole.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from serve_app.blocks import pack_tokens
from serve_app.errors import PromptError
from serve_app.prompts.cuts import MIN_SEGMENT_CHARS, MIN_TEXT_CHARS, Cutter
from serve_app.prompts.hf import load_tokenizer, source_of
from serve_app.prompts.identity import digest_of_tokenizer
from serve_app.types import TokenizerSource


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt whose token ids do not depend on the pieces around it."""

    text: str
    add_special_tokens: bool = False  # only for a prompt that is one segment


class Tokenizer:
    """The tokenizer of one model. Safe to call from several threads: the library's object is only read."""

    def __init__(
        self,
        source: str | TokenizerSource | Any,
        min_segment_chars: int = MIN_SEGMENT_CHARS,
        min_text_chars: int = MIN_TEXT_CHARS,
    ) -> None:
        """
        Args:
            source: path or Hugging Face id, or a `tokenizers.Tokenizer`.
            min_segment_chars: shorter segments are joined with the next, since each costs an entry in the store.
            min_text_chars: before a cut inside ordinary text.
        """
        if isinstance(source, str | TokenizerSource):
            source = load_tokenizer(source_of(source)).backend_tokenizer
        backend = source
        self._backend = copy.deepcopy(backend)  # transformers changes its own between calls
        self._backend.encode_special_tokens = backend.encode_special_tokens  # not part of the copy
        self._backend.no_truncation()
        self._backend.no_padding()
        self.adds_tokens = self._backend.num_special_tokens_to_add(False) > 0
        self.cutter = Cutter(self._backend, min_segment_chars, min_text_chars)

    def digest(self) -> str:
        """Of all that its ids depend on; takes some 50 ms."""
        return digest_of_tokenizer(self._backend)

    def split(self, text: str, add_special_tokens: bool) -> list[Segment]:
        """Segments that make up `text`.

        Prompts with a common prefix have common segments.

        Raises:
            PromptError: the text cannot be tokenized (half a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("bad_unicode", f"the prompt is not valid Unicode: {error.reason}") from error
        if not text:
            return [Segment(text, True)] if add_special_tokens and self.adds_tokens else []
        if add_special_tokens and self.adds_tokens:
            return [Segment(text, True)]
        cuts = [0, *self.cutter.cuts(text), len(text)]
        return [Segment(text[a:b]) for a, b in pairwise(cuts)]

    def encode_segments(self, segments: Sequence[Segment]) -> list[bytes]:
        """Packed token ids of each segment."""
        ids: list[bytes] = [b""] * len(segments)
        for special in (False, True):
            at = [i for i, s in enumerate(segments) if s.add_special_tokens is special]
            if at:
                encodings = self._backend.encode_batch_fast([segments[i].text for i in at], add_special_tokens=special)
                for i, encoding in zip(at, encodings, strict=True):
                    ids[i] = pack_tokens(encoding.ids)
        return ids
