"""Conversations that are known: how far the next turn need not be rendered, cut and looked up again.

In: a chat request's prompt. Out: digests of its start, of ever more messages, and what was kept under the longest of
them. A digest stands for all that the rendered text may depend on: the request but for its messages (tools, template
variables), the messages one after the other, the model and its namespace. They are taken of MessagePack, where 1, 1.0
and true differ, as they do in a template.

    400 messages, 16 in a step: the next turn finds what the last one kept under its first 400, and does the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import msgspec
import xxhash
from cachetools import LRUCache

from serve_app.prompts.request import ChatPrompt
from serve_app.prompts.resumable import Mark

STEP = 16  # messages between two digests: each costs 2 us, a message that is rendered again some 5
_DIGEST_BYTES = 16
_SLOT_BYTES = 600  # of one conversation beside its payload: its mark, the dict's slot, the list's node


@dataclass(frozen=True, slots=True)
class Chain:
    """Digests of a request's start."""

    whole: bytes
    steps: Sequence[bytes]  # of the first STEP messages, of 2 * STEP, ...

    @property
    def messages(self) -> int:
        """That the last step stands for."""
        return len(self.steps) * STEP

    def step(self, messages: int) -> bytes:
        """The first that stands for so many messages, from 1 to `self.messages`."""
        return self.steps[(messages - 1) // STEP]


@dataclass(frozen=True, slots=True)
class Known:
    """The start of a conversation, rendered and tokenized."""

    mark: Mark  # where its text ends
    digests: tuple[bytes, ...]  # of its segments in the prefix store
    chars: int  # in those segments
    tail: str  # text behind them, up to the mark

    def size_bytes(self) -> int:
        digests = len(self.digests) * (sys.getsizeof(b"") + _DIGEST_BYTES)
        return sys.getsizeof(self.digests) + digests + sys.getsizeof(self.tail) + _SLOT_BYTES


class Conversations:
    """Thread-safe, bounded by bytes, least recently used first out."""

    def __init__(self, max_bytes: int) -> None:
        self._lock = Lock()
        self._known: LRUCache[bytes, Known] = LRUCache(max_bytes, Known.size_bytes)

    def size_bytes(self) -> int:
        return int(self._known.currsize)

    def find(self, chain: Chain) -> Known | None:
        """What is known of the longest start of the request."""
        with self._lock:
            for digest in reversed(chain.steps):
                if (known := self._known.get(digest)) is not None:
                    return known
        return None

    def keep(self, digest: bytes, known: Known) -> None:
        with self._lock:
            if known.size_bytes() <= self._known.maxsize:
                self._known[digest] = known


def chain_of(prompt: ChatPrompt, context: bytes) -> Chain:
    """
    Args:
        prompt: of the request.
        context: what the text depends on beside it.

    Raises:
        TypeError, ValueError, OverflowError, RecursionError: it has no digest (half a surrogate pair, deep nesting).
    """
    pack = msgspec.msgpack.encode
    beside = (
        prompt.tools,
        prompt.documents,
        prompt.add_generation_prompt,
        prompt.continue_final_message,
        prompt.add_special_tokens,
        prompt.chat_template,
        prompt.chat_template_kwargs,
        prompt.ordered,
        prompt.other,
    )
    digest = xxhash.xxh3_128_digest(context + pack(beside))
    steps = []
    messages = prompt.messages
    whole = len(messages) - len(messages) % STEP
    for start in range(0, whole, STEP):
        digest = xxhash.xxh3_128_digest(digest + pack(messages[start : start + STEP]))
        steps.append(digest)
    return Chain(xxhash.xxh3_128_digest(digest + pack(messages[whole:])), steps)
