"""How much of a request is looked at, and how many a caller may send. Every number is in `limits:` of the config.

On our own endpoints what is beyond is refused with a 4xx; at the gateway it is a fallback with the same reason.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from serve_app.errors import PromptError

_LONG = 64
_BUSY_S = 1.0
MAX_PODS = 4096


class Limits(BaseModel):
    """In the arguments of both applications."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: Annotated[PositiveInt, Field(description="Longest body that is parsed.")] = 32 * 2**20
    json_depth: Annotated[PositiveInt, Field(le=500, description="Deepest nesting of a body.")] = 64
    prompts: Annotated[PositiveInt, Field(le=64, description="Prompts in one request.")] = 64
    id_chars: Annotated[PositiveInt, Field(le=1024, description="Longest pod id in a question.")] = 128
    scores_per_s: Annotated[PositiveFloat, Field(description="Questions a second and key, per Scorer replica.")] = 200.0
    renders: Annotated[PositiveInt, Field(description="Questions being answered at a time, per Scorer replica.")] = 64


class LimitExceeded(Exception):
    """`status` is 413, 422 or 429; with 429 `retry_after_s` says when it is worth while to ask again."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s


def parse(raw: bytes, limits: Limits) -> dict[str, Any]:
    """A request body.

    Raises:
        PromptError: "body_too_long", "body_too_deep", or "no_body" where it is no JSON object.
    """
    if len(raw) > limits.body_bytes:
        raise PromptError("body_too_long", f"the body is longer than {limits.body_bytes} bytes")
    try:
        body = msgspec.json.decode(raw, type=dict[str, Any])
        is_too_deep = is_deeper(body, limits.json_depth)
    except RecursionError:  # of the parser, at some hundred levels
        is_too_deep = True
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PromptError("no_body", f"the body is no JSON object: {error}") from error
    if is_too_deep:
        raise PromptError("body_too_deep", f"the body is nested more than {limits.json_depth} levels deep")
    return body


def is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` levels. Looks at every value once, level by level."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or (type(inner) is list and not _is_flat(inner))
        ]
        if not level:
            return False
    return True


def _is_flat(value: list[Any]) -> bool:
    """Whether it is token ids, of which there are many: told in a fifth of the time that looking at each takes."""
    return len(value) > _LONG and type(value[0]) is int and set(map(type, value)) == {int}


async def read_body(chunks: AsyncIterable[bytes], declared: str | None, limits: Limits) -> bytes:
    """The body, of which no more than the limit is ever held.

    Args:
        chunks: as they come.
        declared: the Content-Length header.

    Raises:
        LimitExceeded: it is longer.
    """
    too_long = LimitExceeded(413, "body_too_long", f"the body is longer than {limits.body_bytes} bytes")
    if re.fullmatch("[0-9]{1,19}", declared or "") and int(declared or 0) > limits.body_bytes:
        raise too_long
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limits.body_bytes:
            raise too_long
    return bytes(body)


def check_prompts(body: Mapping[str, Any], limits: Limits) -> None:
    """How many prompts a body asks about, as far as it can be told before it is understood.

    Raises:
        PromptError: "many_prompts".
    """
    for field in ("prompt", "input"):
        value = body.get(field)
        if isinstance(value, list) and len(value) > limits.prompts and not isinstance(value[0], (int, dict)):
            raise PromptError("many_prompts", f"{field} has {len(value)} prompts, more than {limits.prompts}")


def check_ids(pods: Sequence[str] | None, limits: Limits) -> None:
    """That the pods of a question are of a length that names have.

    Raises:
        LimitExceeded: one is longer, or there are too many.
    """
    if pods and (len(pods) > MAX_PODS or max(map(len, pods)) > limits.id_chars):
        message = f"pods has more than {MAX_PODS} ids, or one of more than {limits.id_chars} characters"
        raise LimitExceeded(422, "too_long", message)


class Turnstile:
    """Counts what callers ask: a token bucket of one second for each, and a number at a time for all.

    Callers are the names of the keys file, so there are few; one that was idle for a second is forgotten.
    """

    def __init__(self, limits: Limits) -> None:
        self._rate, self._at_a_time = limits.scores_per_s, limits.renders
        self._burst = max(1.0, limits.scores_per_s)
        self._buckets: dict[str, tuple[float, float]] = {}  # caller -> tokens left, as of when
        self._inside = 0

    def enter(self, caller: str, now_s: float) -> None:
        """Each must be followed by `leave`.

        Raises:
            LimitExceeded: not now; nothing was entered.
        """
        left, since_s = self._buckets.get(caller, (self._burst, now_s))
        left = min(self._burst, left + (now_s - since_s) * self._rate)
        if left < 1:
            wait_s = (1 - left) / self._rate
            raise LimitExceeded(429, "too_many_requests", f"more than {self._rate:g} questions a second", wait_s)
        if self._inside >= self._at_a_time:
            raise LimitExceeded(429, "busy", f"{self._at_a_time} questions are being answered", _BUSY_S)
        self._buckets[caller] = (left - 1, now_s)
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1
