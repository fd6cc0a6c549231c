"""Small things that many tests need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from serve_app.index.mirror import Mirror
from serve_app.types import GPU, BlockKeys, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId, Tier

MODEL = ModelId("test-model")
T = TypeVar("T")
SPEC = EngineSpec(MODEL, block_size=4, tokenizer="none")


def keys(*numbers: int) -> BlockKeys:
    """Keys of blocks, one for each number."""
    return b"".join((number + 1).to_bytes(8, "big") for number in numbers)


def pod(name: str, epoch: int = 1, attached: tuple[str, ...] = ()) -> Domain:
    return Domain(DomainId(name), Epoch(epoch), SPEC, PodId(name), attached=tuple(map(DomainId, attached)))


def shared(name: str, epoch: int = 1, chunk_size: int = 8) -> Domain:
    """A domain of no pod, whose chunks are two blocks."""
    return Domain(DomainId(name), Epoch(epoch), SPEC, chunk_size=chunk_size)


@contextmanager
def following(url: str, model: ModelId, tier_order: Sequence[Tier] = (GPU,)) -> Iterator[Mirror]:
    """A mirror that has loaded what there is."""
    mirror = Mirror(url, model, tier_order=tier_order)
    mirror.start()
    assert mirror.wait_ready(5)
    yield mirror
    mirror.close()


def collected(into: list[T], read: Callable[[], Iterable[T]]) -> list[T]:
    """`into`, with what `read` has now."""
    into.extend(read())
    return into


def eventually(check: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait until `check` is true once; assert that it is so in time."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.01)
