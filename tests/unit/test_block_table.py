"""The table against a dict, with keys that crowd into few slots, through growth, eviction and erasure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.index.table import BlockTable


def pack(numbers: Iterable[int]) -> bytes:
    return np.array(list(numbers), np.uint64).tobytes()


def masks(table: BlockTable, numbers: list[int]) -> list[int]:
    return [sum(word << 64 * w for w, word in enumerate(words)) for words in table.masks(pack(numbers)).tolist()]


# The highest bits choose the slot: these fall into few, two of which are neighbours, and one is the last.
crowded = st.builds(lambda slot, n: slot << 57 | n, st.sampled_from([0, 1, 64, 127]), st.integers(1, 30))
numbers = st.one_of(crowded, st.integers(1, 2**64 - 1), st.just(2**64 - 1))
changes = st.tuples(st.sampled_from(["add", "remove", "erase"]), st.integers(0, 130), st.lists(numbers, max_size=60))


@settings(max_examples=300, deadline=None)
@given(st.lists(changes, max_size=30), st.lists(numbers, max_size=20))
def test_equals_a_dict(history: list[tuple[str, int, list[int]]], others: list[int]) -> None:
    table, model = BlockTable(), dict[int, int]()
    for change, bit, some in history:
        match change:
            case "add":
                table.add(pack(some), bit)
                for number in some:
                    model[number] = model.get(number, 0) | 1 << bit
            case "remove":
                table.remove(pack(some), bit)
                for number in some:
                    model[number] = model.get(number, 0) & ~(1 << bit)
            case "erase":
                table.erase(bit)
                model = {number: mask & ~(1 << bit) for number, mask in model.items()}
        assert len(table) == sum(mask > 0 for mask in model.values())
        asked = [*some, *others, *model]
        assert masks(table, asked) == [model.get(number, 0) for number in asked]


def test_a_table_of_stable_size_stays_small_while_blocks_come_and_go() -> None:
    table, rng = BlockTable(), np.random.default_rng(1)
    held: list[bytes] = []
    for _ in range(300):
        held.append(rng.integers(0, 2**63, 500, np.uint64).tobytes())
        table.add(held[-1], 0)
        if len(held) > 20:
            table.remove(held.pop(0), 0)
    assert len(table) == 20 * 500
    assert table.size_bytes < 1_000_000
    assert all(table.masks(keys).all() for keys in held)


def test_eviction_takes_what_was_added_longest_ago() -> None:
    table = BlockTable()
    for start in range(0, 1000, 100):
        table.add(pack(range(start + 1, start + 101)), 0)
    table.add(pack(range(1, 51)), 1)  # these are new again
    assert table.evict(200) == 250  # 51 to 100, 101 to 200, and the batch that the rest is from
    assert masks(table, [1, 50]) == [0b11, 0b11]
    assert masks(table, [51, 100, 101, 300]) == [0, 0, 0, 0]
    assert masks(table, [301, 1000]) == [1, 1]
    assert len(table) == 750
    assert table.evict(0) == 0
    assert table.evict(10_000) == 750  # more than there are


def test_a_key_of_zeros_is_a_block_too() -> None:
    table = BlockTable()
    assert masks(table, [0]) == [0]
    table.add(pack([0]), 3)
    assert masks(table, [0]) == [8]
    assert table.runs(pack([0]), 0, 8) == [(1, 8)]
    table.remove(pack([0]), 3)
    assert masks(table, [0]) == [0]
    assert len(table) == 0
