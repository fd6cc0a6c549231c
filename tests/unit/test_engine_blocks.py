"""Engine events -> canonical changes: copies, tiers, chunks, namespaces, and whatever cannot be understood."""

from serve_app.blocks import block_keys, namespace_key, pack_tokens, split_keys
from serve_app.events.engine_blocks import Added, Cleared, EngineBlocks, Removed
from serve_app.events.wire import AllBlocksCleared, BlockRemoved, BlockStored
from serve_app.types import CPU, GPU, LMCACHE, BlockKey, ModelId

MODEL = ModelId("m")
SIZE = 2


def canonical(tokens: list[int], lora: str | None = None, salt: str | None = None) -> list[BlockKey]:
    return split_keys(block_keys(pack_tokens(tokens), SIZE, namespace_key(MODEL, SIZE, lora, salt)))


def stored(hashes: list[bytes], tokens: list[int], parent: bytes | None = None, **more: object) -> BlockStored:
    return BlockStored(list(hashes), parent, tokens, **{"block_size": SIZE, "medium": "GPU", **more})  # type: ignore[arg-type]


def test_keys_are_those_of_the_request_whatever_the_engine_calls_its_blocks() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    k1, k2, k3 = canonical([1, 2, 3, 4, 5, 6])
    assert blocks.apply([stored([b"x", b"y"], [1, 2, 3, 4])]) == [Added(GPU, k1 + k2)]
    assert blocks.apply([stored([b"z"], [5, 6], parent=b"y")]) == [Added(GPU, k3)]
    assert blocks.apply([BlockRemoved([b"y", b"z"], "GPU")]) == [Removed(GPU, k2 + k3)]
    assert blocks.snapshot() == {GPU: k1}


def test_a_block_held_twice_is_gone_when_both_copies_are() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    (k1,) = canonical([1, 2])
    event = stored([b"x"], [1, 2])
    assert blocks.apply([event, event]) == [Added(GPU, k1)]
    assert blocks.apply([BlockRemoved([b"x"], "GPU")]) == []
    assert blocks.apply([BlockRemoved([b"x"], "GPU")]) == [Removed(GPU, k1)]
    assert len(blocks) == 0


def test_tiers_are_told_apart() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    (k1,) = canonical([1, 2])
    assert blocks.apply([stored([b"x"], [1, 2]), stored([b"x"], [1, 2], medium="CPU")]) == [
        Added(GPU, k1),
        Added(CPU, k1),
    ]
    assert blocks.apply([BlockRemoved([b"x"], "GPU")]) == [Removed(GPU, k1)]
    assert blocks.apply([BlockRemoved([b"x"], "CPU")]) == [Removed(CPU, k1)]


def test_a_tier_that_never_says_what_it_deletes_is_not_believed() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    (k1,) = canonical([1, 2])
    events = [stored([b"x"], [1, 2]), *(stored([name], [1, 2], medium="STORAGE") for name in (b"x", b"y"))]
    assert blocks.apply(events) == [Added(GPU, k1)]
    assert blocks.snapshot() == {GPU: k1}
    assert blocks.skipped == {"never_removed": 2}
    assert blocks.apply([BlockRemoved([b"x"], "GPU")]) == [Removed(GPU, k1)]


def test_an_old_engine_that_names_no_medium_means_gpu() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    (k1,) = canonical([1, 2])
    assert blocks.apply([stored([b"x"], [1, 2], medium=None), BlockRemoved([b"x"])]) == [
        Added(GPU, k1),
        Removed(GPU, k1),
    ]


def test_larger_chunks_are_cut_into_canonical_blocks() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    keys = canonical([1, 2, 3, 4, 5, 6, 7, 8])
    assert blocks.apply([stored([b"c1", b"c2"], [1, 2, 3, 4, 5, 6, 7, 8], medium="CPU", block_size=4)]) == [
        Added(CPU, b"".join(keys))
    ]
    assert blocks.apply([BlockRemoved([b"c1"], "CPU")]) == [Removed(CPU, b"".join(keys[:2]))]
    assert blocks.apply([stored([b"g"], [9, 10], parent=b"c2")]) == [Added(GPU, canonical(list(range(1, 11)))[4])]


def test_lora_and_salt_are_the_namespace() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    for more, expected in (
        ({"lora_name": "l", "extra_keys": [("l",), ("l",)]}, canonical([1, 2, 3, 4], lora="l")),
        ({"extra_keys": [("s",), None]}, canonical([1, 2, 3, 4], salt="s")),
        ({"lora_name": "l", "extra_keys": [("l", "s"), ("l",)]}, canonical([1, 2, 3, 4], lora="l", salt="s")),
    ):
        assert blocks.apply([stored([b"x", b"y"], [1, 2, 3, 4], **more)]) == [Added(GPU, b"".join(expected))]
        blocks.clear()


def test_an_image_ends_the_prefix_that_a_text_request_can_match() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    text = canonical([1, 2, 3, 4, 5, 6])
    (added,) = blocks.apply(
        [stored([b"x", b"y", b"z"], [1, 2, 3, 4, 5, 6], extra_keys=[None, (("image-hash", 0),), None])]
    )
    assert isinstance(added, Added)
    first, *others = split_keys(added.keys)
    assert first == text[0]
    assert not set(others) & set(text)


def test_cleared_means_everything_in_gpu() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    blocks.apply([stored([b"x", b"y"], [1, 2, 3, 4])])
    assert blocks.apply([AllBlocksCleared()]) == [Cleared()]
    assert blocks.snapshot() == {}


def test_a_reset_of_the_prefix_cache_leaves_what_was_offloaded() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    k1, k2, k3 = canonical([1, 2, 3, 4, 5, 6])
    blocks.apply([stored([b"x", b"y"], [1, 2, 3, 4]), stored([b"x"], [1, 2], medium="CPU")])
    assert blocks.apply([AllBlocksCleared()]) == [Removed(GPU, k1 + k2)]
    assert blocks.apply([AllBlocksCleared()]) == []
    assert blocks.snapshot() == {CPU: k1}
    assert blocks.apply([stored([b"z"], [5, 6], parent=b"y")]) == []  # y is unknown now
    assert blocks.apply([stored([b"y", b"z"], [3, 4, 5, 6], parent=b"x")]) == [Added(GPU, k2 + k3)]
    assert blocks.apply([BlockRemoved([b"x"], "CPU")]) == [Removed(CPU, k1)]


def test_a_shared_chunk_is_there_once_however_many_ranks_stored_it() -> None:
    blocks = EngineBlocks(MODEL, SIZE, counted=False)
    keys = canonical([1, 2, 3, 4])
    event = stored([b"c"], [1, 2, 3, 4], medium="LMCACHE", block_size=4)
    assert blocks.apply([event, event]) == [Added(LMCACHE, b"".join(keys))]
    assert blocks.apply([BlockRemoved([b"c"], "LMCACHE")]) == [Removed(LMCACHE, b"".join(keys))]
    assert blocks.apply([BlockRemoved([b"c"], "LMCACHE")]) == []
    assert blocks.apply([event]) == [Added(LMCACHE, b"".join(keys))]


def test_what_cannot_be_understood_is_skipped_and_counted() -> None:
    blocks = EngineBlocks(MODEL, SIZE)
    assert (
        blocks.apply(
            [
                stored([b"x"], [1, 2], parent=b"never seen"),
                stored([b"x"], [1, 2, 3], block_size=3),
                stored([b"x"], [], block_size=0),
                stored([b"x"], [1, 2, 3, 4]),
                stored([b"x"], [1, 2], group_idx=1),
                stored([b"x"], [1, 2], extra_keys=[None, None]),
                BlockRemoved([b"never seen"], "GPU"),
                BlockRemoved([b"x"], "GPU", group_idx=2),
            ]
        )
        == []
    )
    assert blocks.skipped == {
        "unknown_parent": 1,
        "block_size": 2,
        "token_count": 1,
        "group_index": 2,
        "extra_keys": 1,
        "unknown_block": 1,
    }
