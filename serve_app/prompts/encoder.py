"""Request body -> block keys: the prompt stages of one model put together.

In: the parsed JSON of a request. Out: one `EncodedPrompt` per prompt in it. Two steps with the tokenization in
between, so that the caller may have that done elsewhere:

    for prepared in encoder.prepare(body):
        ids = await tokenize(prepared.missing)      # or encoder.tokenize(prepared.missing)
        prompt = encoder.finish(prepared, ids)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import xxhash

from serve_app.blocks import TOKEN_BYTES, block_keys, namespace_key
from serve_app.errors import PromptError
from serve_app.prompts.anthropic import merges_system
from serve_app.prompts.chat import ChatRenderer
from serve_app.prompts.conversations import Chain, Known, chain_of
from serve_app.prompts.identity import (
    PROBES,
    TEMPLATE,
    TOKENIZER,
    TOOLS_TEMPLATE,
    differing,
    digest_of_packed,
    digest_of_text,
    probe_name,
)
from serve_app.prompts.media import MEDIA_TOKENS, STAND_IN, media_start
from serve_app.prompts.messages import count_media
from serve_app.prompts.prefix_store import EncodedPrompt, Lookup, PrefixStore
from serve_app.prompts.request import ChatPrompt, EngineRules, Prompt, TokenPrompt, namespace_of, parse_request
from serve_app.prompts.resumable import Rendering
from serve_app.prompts.tokenizer import Segment, Tokenizer
from serve_app.types import BlockKey, EngineSpec

_NOT_PURE = ("strftime_now", "random", "lipsum")  # what a template can render differently the next time
_MODES = ("auto", "hf")  # of vLLM's --tokenizer-mode: those that take the Hugging Face tokenizer
CHARS_PER_TOKEN = 4  # a guess, for text that has not been tokenized
MAX_PROMPT_CHARS = 8 * 2**20  # what HAProxy hands over at most; some 2M tokens


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt that is rendered and looked up. Token prompts, and those known by their name, are finished already."""

    segments: list[Segment]  # of the prompt's text, without its known start; none for token ids or a name
    missing: list[Segment]  # to be tokenized
    lookup: Lookup | None
    encoded: EncodedPrompt | None
    name: bytes = b""  # what the store shall know it by
    incomplete: str = ""  # why the segments end before the prompt does: media
    unknown_tokens: int = 0  # behind the segments; a guess

    @property
    def missing_digests(self) -> tuple[bytes, ...]:
        """What the missing segments are filed under; each stands for all the text up to its end."""
        return self.lookup.digests[len(self.lookup.known) :] if self.lookup is not None else ()


class PromptEncoder:
    """All that is needed to score the prompts of one model. Safe to call from several threads."""

    def __init__(self, spec: EngineSpec, store: PrefixStore) -> None:
        """Loads the tokenizer: some seconds, call it in a thread.

        Args:
            spec: of the engine whose block keys are wanted.
            store: may be shared by encoders of several models.
        """
        self.spec = spec
        self._store = store
        if spec.tokenizer_mode not in _MODES:
            raise PromptError(
                "unsupported_model",
                f"the engine tokenizes with code of vLLM's own (tokenizer_mode {spec.tokenizer_mode})",
            )
        self._tokenizer = Tokenizer(spec.source)
        template_kwargs = json.loads(spec.template_kwargs) if spec.template_kwargs else None
        self._renderer = ChatRenderer(spec.source, spec.chat_template, spec.content_format, template_kwargs)
        self._rules = EngineRules(spec.pooling, spec.excludes_tools, merges_system(spec.chat_template))
        self._renders_alike = not any(word in template for template in self._templates() for word in _NOT_PURE)
        self._source_key = spec.source.key
        self._spec_digest = xxhash.xxh3_128_digest(msgspec.msgpack.encode(spec))

    def differing(self) -> list[str]:
        """Parts of the engine's identity that are not what they are here; some 100 ms, call it in a thread.

        What neither side can make a prompt of is not compared: such requests are not scored anyway.
        """
        theirs = dict(self.spec.identity)
        if not theirs:
            return []
        ours = {TOKENIZER: self._tokenizer.digest()}
        for name, tools in ((TEMPLATE, None), (TOOLS_TEMPLATE, [{}])):
            with suppress(PromptError):
                ours[name] = digest_of_text(self._renderer.template(tools))
        for name, body in PROBES.items():
            with suppress(PromptError):
                ours[probe_name(name)] = digest_of_packed(self._ids(body))
        return differing(ours, theirs)

    def _ids(self, body: Mapping[str, Any]) -> bytes:
        """Packed token ids of a request's first prompt, past the store."""
        prompt = parse_request(body, self._rules)[0]
        assert not isinstance(prompt, TokenPrompt)
        text = self._render(prompt) if isinstance(prompt, ChatPrompt) else prompt.text
        return b"".join(self.tokenize(self._split(text, prompt.add_special_tokens)))

    def prepare(self, body: Mapping[str, Any]) -> list[Prepared]:
        """Parse, render, split and look up.

        Raises:
            PromptError: the request has no prompt that can be scored.
        """
        lora, salt = namespace_of(body, self.spec.model, self.spec.served_names)
        root = namespace_key(self.spec.model, self.spec.block_size, lora, salt)
        return [self._prepare(prompt, root) for prompt in parse_request(body, self._rules)]

    def tokenize(self, segments: Sequence[Segment]) -> list[bytes]:
        """Packed token ids of each segment."""
        return self._tokenizer.encode_segments(segments)

    def finish(self, prepared: Prepared, ids: Sequence[bytes]) -> EncodedPrompt:
        """Block keys of a prepared prompt, given the ids of what was missing."""
        if prepared.encoded is not None:
            return prepared.encoded
        assert prepared.lookup is not None
        encoded = self._store.complete(prepared.lookup, ids)
        if prepared.name:
            self._store.name(prepared.name, prepared.lookup, encoded)
        return encoded

    def known(self, prepared: Prepared) -> EncodedPrompt:
        """What is known of a prompt without the missing."""
        assert prepared.lookup is not None
        return self._store.known(prepared.lookup)

    def encode(self, body: Mapping[str, Any]) -> list[EncodedPrompt]:
        """All steps in this process."""
        return [self.finish(p, self.tokenize(p.missing)) for p in self.prepare(body)]

    def _prepare(self, prompt: Prompt, root: BlockKey) -> Prepared:
        if isinstance(prompt, TokenPrompt):
            keys = block_keys(prompt.packed, self.spec.block_size, root)
            count = len(prompt.packed) // TOKEN_BYTES
            return Prepared([], [], None, EncodedPrompt(keys, count, 0, (prompt.packed,)))
        if isinstance(prompt, ChatPrompt) and (media := count_media(prompt.messages)):
            if prompt.other is not None:
                raise PromptError("ambiguous", "the request has images, and may be for either of two endpoints")
            return self._prepare_with_media(prompt, media, root)
        if isinstance(prompt, ChatPrompt):
            return self._prepare_chat(prompt, root)
        return self._looked_up(prompt.text, prompt.add_special_tokens, root)

    def _prepare_chat(self, prompt: ChatPrompt, root: BlockKey) -> Prepared:
        chain = self._chain(prompt, root)
        name = chain.whole if chain is not None and self._renders_alike else b""
        if name and (known := self._store.find_named(name)) is not None:
            return Prepared([], [], None, known)
        if chain is not None and chain.steps and (prepared := self._next_turn(prompt, root, chain, name)) is not None:
            return prepared
        return self._looked_up(self._render(prompt), prompt.add_special_tokens, root, name)

    def _next_turn(self, prompt: ChatPrompt, root: BlockKey, chain: Chain, name: bytes) -> Prepared | None:
        """Render, split and look up what is new in a conversation; None if that cannot be proven to be the same."""
        if prompt.other is not None or (prompt.add_special_tokens and self._tokenizer.adds_tokens):
            return None
        known = self._store.conversations.find(chain)
        rendering = self._renderer.resume(prompt, known.mark if known is not None else None)
        if rendering is None:
            return None
        before, text = None, rendering.text
        if known is not None and rendering.resumed:
            before, text = known, known.tail + text
        segments = self._split(text, False, before.chars if before is not None else 0)
        digests = before.digests if before is not None else ()
        lookup = self._store.go_on(digests, root, segments, self.spec.block_size, self._source_key)
        if lookup is None:
            return None
        self._keep(chain, rendering, text, segments, lookup, before)
        return Prepared(segments, lookup.missing, lookup, None, name)

    def _keep(
        self,
        chain: Chain,
        rendering: Rendering,
        text: str,
        segments: Sequence[Segment],
        lookup: Lookup,
        before: Known | None,
    ) -> None:
        """Have the conversation known up to the last step of its chain that proves a mark of the rendering."""
        proven = [(mark, place) for mark, place in rendering.marks if 0 < mark.needs <= chain.messages]
        if not proven or (before is not None and proven[-1][0].count == before.mark.count):
            return
        mark, place = proven[-1]
        cut, chars, digests = 0, 0, 0
        if before is not None:
            place, chars, digests = place + len(before.tail), before.chars, len(before.digests)
        for segment in segments:
            end = cut + len(segment.text)
            if end + self._tokenizer.cutter.reach > place:
                break
            cut, digests = end, digests + 1
        known = Known(mark, lookup.digests[:digests], chars + cut, text[cut:place])
        self._store.conversations.keep(chain.step(mark.needs), known)

    def _looked_up(self, text: str, add_special_tokens: bool, root: BlockKey, name: bytes = b"") -> Prepared:
        segments = self._split(text, add_special_tokens)
        lookup = self._store.lookup(root, segments, self.spec.block_size, self._source_key)
        return Prepared(segments, lookup.missing, lookup, None, name)

    def _render(self, prompt: ChatPrompt) -> str:
        text = self._renderer.render(prompt)
        if prompt.other is not None and self._renderer.render(prompt.other) != text:
            raise PromptError("ambiguous", "/v1/chat/completions and /v1/messages make different prompts of it")
        return text

    def _prepare_with_media(self, prompt: ChatPrompt, media: int, root: BlockKey) -> Prepared:
        """The text before the first image; the rest is not known."""
        if prompt.add_special_tokens and self._tokenizer.adds_tokens:
            raise PromptError("media", "a text with an image that gets special tokens at its ends is not scored")
        text = self._renderer.render(prompt)
        end = media_start(text, self._renderer.render(prompt, STAND_IN), self._tokenizer.cutter, self.spec.source)
        segments = self._split(text[:end], False)
        lookup = self._store.lookup(root, segments, self.spec.block_size, self._source_key)
        unknown_tokens = (len(text) - end) // CHARS_PER_TOKEN + media * MEDIA_TOKENS
        return Prepared(segments, lookup.missing, lookup, None, b"", "media", unknown_tokens)

    def _split(self, text: str, add_special_tokens: bool, chars_before: int = 0) -> list[Segment]:
        chars = chars_before + len(text)
        if chars > MAX_PROMPT_CHARS:
            raise PromptError("too_long", f"the prompt has {chars} characters, more than {MAX_PROMPT_CHARS}")
        return self._tokenizer.split(text, add_special_tokens)

    def _templates(self) -> list[str]:
        """The templates that the renderer may choose from: without tools, and with."""
        found = []
        for with_tools in (False, True):
            with suppress(PromptError):  # then every request of this kind fails to render
                found.append(self._renderer.template([{}] if with_tools else None))
        return found

    def _chain(self, prompt: ChatPrompt, root: BlockKey) -> Chain | None:
        """Digests of all that the rendered text depends on, beside the time and chance; None if there are none."""
        try:
            return chain_of(prompt, root + self._spec_digest)
        except (TypeError, ValueError, OverflowError, RecursionError):
            # Not from JSON, half a surrogate pair, or hundreds of brackets deep: rendering will tell.
            return None
