"""What an answer's `usage` says, read from the end of its body: JSON, or server-sent events.

OpenAI's shapes (chat and completions: `prompt_tokens`; responses: `input_tokens`) and Anthropic's, whose `input_tokens`
are those that were not cached. Only the last bytes of an answer are kept, whatever its length.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

KEPT_BYTES = 8 * 1024  # a `usage` is some 200 bytes, and what engines write behind it less than that
_NAME = b'"usage"'  # a text that says so has `\"usage\"`
_decoder = json.JSONDecoder()


class Usage(NamedTuple):
    """What an answer says of its prompt, in tokens; None: it does not."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None


class AnswerEnd:
    """The last bytes of an answer that is passing by."""

    def __init__(self) -> None:
        self._kept = b""

    def passed(self, chunk: bytes) -> None:
        self._kept = chunk[-KEPT_BYTES:] if len(chunk) >= KEPT_BYTES else (self._kept + chunk)[-KEPT_BYTES:]

    def usage(self) -> Usage:
        """The last one that is named; nothing known if there is none, or it is not understood."""
        at = len(self._kept)
        while (at := self._kept.rfind(_NAME, 0, at)) >= 0:
            text = self._kept[at + len(_NAME) :].decode("utf-8", "replace").lstrip()
            if text.startswith(":") and (usage := _object(text[1:].lstrip())) is not None:
                return _read(usage)
        return Usage()


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text begins with."""
    try:
        found, _ = _decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read(usage: dict[str, Any]) -> Usage:
    for total, details in (("prompt_tokens", "prompt_tokens_details"), ("input_tokens", "input_tokens_details")):
        if (tokens := _count(usage, total)) is None:
            continue
        more = usage.get(details)
        cached = _count(more, "cached_tokens") if isinstance(more, dict) else None
        read = _count(usage, "cache_read_input_tokens")
        if cached is None and read is not None:
            return Usage(tokens + read + (_count(usage, "cache_creation_input_tokens") or 0), read)
        return Usage(tokens, cached)
    return Usage()


def _count(values: dict[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
