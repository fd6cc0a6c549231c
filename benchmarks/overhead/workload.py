"""Conversations that grow: realistic request bodies of a given size, each the last one plus a turn.

In: a size in bytes and a seed. Out: JSON bodies of `/v1/chat/completions`. A conversation starts with a document (half
of its size) and a history of messages; every body is its predecessor with one more answer and one more question. So all
but the last hundred bytes of a body were sent before: to a router that has seen the conversation, it is warm.
"""

from __future__ import annotations

import json
import random
from typing import Final

_MESSAGE_CHARS: Final = 700  # of a message in the history
TURN_BYTES: Final = 230  # about what one turn adds to a body

_NOUNS: Final = [
    "river",
    "report",
    "engine",
    "garden",
    "committee",
    "market",
    "winter",
    "bridge",
    "letter",
    "teacher",
    "harbour",
    "machine",
    "forest",
    "village",
    "contract",
    "library",
    "kitchen",
    "mountain",
    "budget",
    "museum",
    "captain",
    "doctor",
    "window",
    "journey",
    "painting",
    "season",
    "factory",
    "meeting",
    "railway",
    "story",
]
_VERBS: Final = [
    "described",
    "followed",
    "changed",
    "reached",
    "measured",
    "carried",
    "answered",
    "improved",
    "crossed",
    "repaired",
    "explained",
    "noticed",
    "planned",
    "questioned",
    "supported",
    "finished",
    "compared",
    "delivered",
    "opened",
    "remembered",
]
_ADJECTIVES: Final = [
    "quiet",
    "recent",
    "narrow",
    "public",
    "careful",
    "distant",
    "empty",
    "early",
    "modern",
    "heavy",
    "useful",
    "northern",
    "broken",
    "second",
    "official",
    "warm",
    "familiar",
    "unexpected",
    "small",
    "careless",
]
_ENDINGS: Final = (
    "before the end of the week",
    "although nobody had asked for it",
    "which surprised the whole town",
    "because the costs had doubled since spring",
    "and wrote down the result",
    "as the minutes of 1987 say",
    "without a single delay",
    "while the rain went on",
)


class Conversation:
    """One conversation.

    Args:
        model: as the body says it.
        start_bytes: size of the first body, about.
        seed: the same one gives the same conversation.
    """

    def __init__(self, model: str, start_bytes: int, seed: str) -> None:
        self._random = random.Random(seed)
        self._head = json.dumps({"model": model, "max_tokens": 16})[:-1].encode() + b', "messages": ['
        messages = [self._message("system", self._text(start_bytes // 2))]
        size = len(self._head) + len(messages[0])
        while size < start_bytes - TURN_BYTES:
            pair = (
                self._message("user", self._text(min(_MESSAGE_CHARS, (start_bytes - size) // 3))),
                self._message("assistant", self._text(min(_MESSAGE_CHARS, (start_bytes - size) // 3))),
            )
            messages += pair
            size += len(pair[0]) + len(pair[1])
        self._messages = b", ".join(messages)

    def next_body(self) -> bytes:
        """The conversation so far and a new question; the next body will have an answer to it."""
        asked = self._messages + b", " + self._message("user", self._text(60))
        self._messages = asked + b", " + self._message("assistant", "Noted.")
        return self._head + asked + b"]}"

    def _text(self, chars: int) -> str:
        sentences: list[str] = []
        length = 0
        while length < chars:
            sentences.append(self._sentence())
            length += len(sentences[-1]) + 1
        return " ".join(sentences)

    def _sentence(self) -> str:
        pick = self._random.choice
        return (
            f"The {pick(_ADJECTIVES)} {pick(_NOUNS)} {pick(_VERBS)} the {pick(_ADJECTIVES)} {pick(_NOUNS)} "
            f"near the {pick(_NOUNS)} {pick(_ENDINGS)}."
        )

    @staticmethod
    def _message(role: str, content: str) -> bytes:
        return json.dumps({"role": role, "content": content}).encode()
