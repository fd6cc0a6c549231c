"""msgpack from outside: one kind of error for whatever is wrong with it.

msgspec raises UnicodeDecodeError for a text that is none, and RecursionError for what is too deep, beside its own
DecodeError: whoever forgets one of them ends a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def decoder(type_: type[T] | Any) -> Callable[[bytes], T]:
    """A function from bytes to `type_`, which raises msgspec.DecodeError and nothing else."""
    decode = msgspec.msgpack.Decoder(type_).decode

    def safe(data: bytes) -> T:
        try:
            decoded: T = decode(data)
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(str(error)) from error
        return decoded

    return safe
