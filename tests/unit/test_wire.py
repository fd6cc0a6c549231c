"""Event batches as vLLM packs them: by its own structs, in the older array form, and damaged."""

import msgspec
import pytest

from serve_app.errors import WireError
from serve_app.events.wire import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch

STORED = {
    "type": "BlockStored",
    "block_hashes": [b"h1", b"h2"],
    "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
}


def pack(*events: object, rank: int | None = None) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), rank])


def test_bytes_of_vllm_itself() -> None:
    """The wire format is vLLM's: what its own structs encode to is what we decode."""
    from vllm.distributed import kv_events as vllm

    payload = msgspec.msgpack.encode(
        vllm.KVEventBatch(
            ts=1.5,
            events=[
                vllm.BlockStored(
                    block_hashes=[b"h1"],
                    parent_block_hash=b"h0",
                    token_ids=[7, 8],
                    block_size=2,
                    lora_id=None,
                    medium=vllm.MEDIUM_GPU,
                    lora_name="adapter",
                    extra_keys=[("adapter", "salt")],
                    group_idx=0,
                ),
                vllm.BlockRemoved(block_hashes=[b"h1"], medium=vllm.MEDIUM_CPU),
                vllm.AllBlocksCleared(),
            ],
            data_parallel_rank=0,
        )
    )
    batch = decode_batch(payload)
    assert batch.ts == 1.5
    assert not batch.skipped
    stored, removed, cleared = batch.events
    assert stored == BlockStored([b"h1"], b"h0", [7, 8], 2, None, "GPU", "adapter", [("adapter", "salt")], 0)
    assert removed == BlockRemoved([b"h1"], "CPU")
    assert cleared == AllBlocksCleared()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (["BlockStored", [11], None, [1, 2], 2, None], BlockStored([11], None, [1, 2], 2)),
        (["BlockStored", [11], 10, [1, 2], 2, 3, "CPU"], BlockStored([11], 10, [1, 2], 2, 3, "CPU")),
        (
            ["BlockStored", [11], 10, [1, 2], 2, None, "GPU", "x", None, 0, "mamba", None, "of a later version"],
            BlockStored([11], 10, [1, 2], 2, None, "GPU", "x", None, 0, "mamba"),
        ),
        (["BlockRemoved", [11, 12]], BlockRemoved([11, 12])),
        (["BlockRemoved", [11], "GPU"], BlockRemoved([11], "GPU")),
        (["AllBlocksCleared"], AllBlocksCleared()),
    ],
)
def test_older_array_form(array: list[object], expected: object) -> None:
    assert decode_batch(pack(array)).events == [expected]


def test_unknown_fields_are_ignored_and_unknown_events_skipped() -> None:
    batch = decode_batch(
        pack({**STORED, "of_a_later_version": {"a": [1]}}, {"type": "BlockMoved", "to": 3}, ["BlockMoved", 3], rank=1)
    )
    assert batch.events == [BlockStored([b"h1", b"h2"], None, [1, 2, 3, 4], 2, None, "GPU")]
    assert batch.skipped == {"unknown_type": 2}


@pytest.mark.parametrize(
    "event", [{"type": "BlockStored"}, {**STORED, "token_ids": "no"}, ["BlockRemoved", 5], {"kind": 1}, 17, []]
)
def test_malformed_events_do_not_harm_their_batch(event: object) -> None:
    batch = decode_batch(pack(event, {"type": "AllBlocksCleared"}))
    assert batch.events == [AllBlocksCleared()]
    assert batch.skipped == {"malformed": 1}


@pytest.mark.parametrize("payload", [b"", b"\x00", b"not msgpack", msgspec.msgpack.encode({"events": []})])
def test_what_is_no_batch_is_an_error(payload: bytes) -> None:
    with pytest.raises(WireError):
        decode_batch(payload)
