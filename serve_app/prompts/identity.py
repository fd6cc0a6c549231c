"""What an engine makes prompts with, as digests that two processes can compare without sharing files.

    part            digest of
    tokenizer       the fast tokenizer, whole: vocabulary, merges, normalizer, added and special tokens
    template        the chat template for requests without tools
    tools_template  the one for requests with tools
    probe:NAME      the token ids of a canned request (`PROBES`), as the engine itself makes them

Parts tell which file differs; probes tell what no file shows: code, versions, flags. The engine says its own in the
pod's record, the router works out what it would do, and what differs is not scored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import xxhash

from serve_app.blocks import pack_tokens

Identity = Mapping[str, str]
"""Part -> digest. A part that one side does not know is not compared."""

TOKENIZER: Final = "tokenizer"
TEMPLATE: Final = "template"
TOOLS_TEMPLATE: Final = "tools_template"

_TEXT: Final = "Ünïcode\u2019s caf\u00e9,\t  spaces\n\n1234567 don't — 你好 <|im_start|> <s> \U0001f980 HTTPServer_v2"
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_TURNS: Final = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": _TEXT},
]
# Bodies that /tokenize takes too.
PROBES: Final[Mapping[str, Mapping[str, Any]]] = {
    "text": {"prompt": _TEXT},
    "chat": {"messages": [{"role": "user", "content": "Hello"}]},
    "turns": {"messages": _TURNS},
    "tools": {"messages": _TURNS[:2], "tools": [_TOOL]},
}


def digest_of_text(text: str) -> str:
    """128 bits of the text, in hex."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def digest_of_ids(ids: Iterable[int]) -> str:
    """128 bits of the token ids, in hex."""
    return digest_of_packed(pack_tokens(list(ids)))


def digest_of_packed(ids: bytes) -> str:
    """Args: ids: as `pack_tokens` makes them."""
    return xxhash.xxh3_128_hexdigest(ids)


def digest_of_tokenizer(backend: Any) -> str:
    """Args: backend: a `tokenizers.Tokenizer`. Truncation and padding are of a call, not of the tokenizer."""
    own = copy.deepcopy(backend)
    own.no_truncation()
    own.no_padding()
    return digest_of_text(own.to_str())


def parts_of(backend: Any, template: Callable[[bool], str | None]) -> dict[str, str]:
    """The parts that stand in files.

    Args:
        backend: a `tokenizers.Tokenizer`; None if the tokenizer is none.
        template: Jinja source, given whether there are tools; None if there is none.
    """
    parts = {TOKENIZER: digest_of_tokenizer(backend)} if backend is not None else {}
    for name, with_tools in ((TEMPLATE, False), (TOOLS_TEMPLATE, True)):
        source = template(with_tools)
        if source is not None:
            parts[name] = digest_of_text(source)
    return parts


def probe_name(name: str) -> str:
    """What a probe's digest is called in the pod's record."""
    return f"probe:{name}"


def differing(ours: Identity, theirs: Identity) -> list[str]:
    """Parts that both know and that are not the same."""
    return [part for part, digest in theirs.items() if part in ours and ours[part] != digest]
