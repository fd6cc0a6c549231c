"""A regular expression that finds the longest of many literal strings, in time that does not grow with their number.

    <|a|>, <|ab|>, <|b|>, <     ->     <(?:\\|(?:a(?:\\|>|b\\|>)|b\\|>))?

An alternation of 6,415 strings tries each at every place that looks like the beginning of one: 3.5 s for 200 KB of near
misses. Here equal beginnings are looked at once. A string that is the beginning of another makes the rest optional, and
an optional rest is tried first, so the longest one wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_END: Final = ""  # key of the end of a string, in a trie
_Trie = dict[str, "_Trie"]


def longest_match(strings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches, at every place, the longest of the strings there; of no strings, nothing."""
    trie: _Trie = {}
    for string in strings:
        node = trie
        for character in string:
            node = node.setdefault(character, {})
        node[_END] = {}
    return re.compile(_pattern(trie) if trie else r"(?!)")


def _pattern(trie: _Trie) -> str:
    """Of everything that may follow; deep only where strings are beginnings of each other, or part."""
    branches = []
    for character, following in trie.items():
        if character == _END:
            continue
        literal, node = character, following
        while len(node) == 1 and _END not in node:  # one way to go on
            ((more, node),) = node.items()
            literal += more
        branches.append(re.escape(literal) + (_pattern(node) if node.keys() - {_END} else ""))
    if not branches:
        return ""
    optional = "?" if _END in trie else ""
    return branches[0] if len(branches) == 1 and not optional else f"(?:{'|'.join(branches)}){optional}"
