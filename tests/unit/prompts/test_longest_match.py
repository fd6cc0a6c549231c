"""The trie's pattern finds what the alternation of all strings, longest first, finds."""

from __future__ import annotations

import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.prompts.longest_match import longest_match

STRINGS = st.lists(st.text("<|ab>.*[ é", min_size=1, max_size=6), max_size=12)


def alternation(strings: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or r"(?!)")


@settings(max_examples=500)
@given(STRINGS, st.text("<|ab>.*[ é", max_size=60))
def test_it_finds_what_an_alternation_finds(strings: list[str], text: str) -> None:
    expected = [match.span() for match in alternation(strings).finditer(text)]
    assert [match.span() for match in longest_match(strings).finditer(text)] == expected


@given(STRINGS)
def test_every_string_is_found_whole(strings: list[str]) -> None:
    pattern = longest_match(strings)
    assert all(pattern.fullmatch(string) for string in strings)


def test_runs_of_one_character_are_no_deep_pattern() -> None:
    spaces = [" " * length for length in range(1, 200)]
    assert [len(match.group()) for match in longest_match(spaces).finditer(" " * 250)] == [199, 51]


def test_near_misses_of_thousands_of_tokens_cost_no_more_than_those_of_a_few() -> None:
    """Compared with itself in one run: the alternation took a thousand times as long."""
    text = "<|reserved_token_99" * 10_000

    def taken_s(count: int) -> float:
        pattern = longest_match(f"<|reserved_token_{i}|>" for i in range(count))
        started_s = time.perf_counter()
        assert not list(pattern.finditer(text))
        return time.perf_counter() - started_s

    assert min(taken_s(6_415) for _ in range(3)) < 20 * min(taken_s(10) for _ in range(3))
