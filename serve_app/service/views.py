"""What the page at /kvcache/ is told, as JSON. The OpenAPI document is made of these. No prompt is in any of them."""

from __future__ import annotations

from typing import Annotated

import msgspec

from serve_app.routing.receipts import Receipt


def _said(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class Replica(msgspec.Struct, frozen=True, omit_defaults=True):
    """One pod: a replica, or one data parallel rank of it."""

    pod: str
    replica: str
    live: bool
    trust: str
    address: str = ""
    rank: int | None = None
    cause: Annotated[str, _said("Why it is not trusted.")] = ""
    held_blocks: Annotated[dict[str, int], _said("By tier; `all` where Redis does not tell the tiers.")] = {}
    capacity_blocks: Annotated[int | None, _said("Of its GPU cache; absent: not known.")] = None
    in_flight: Annotated[int, _said("Requests there, as a decision would count them.")] = 0
    waiting: Annotated[int, _said("Of these, without a first token, as far as is known.")] = 0
    queued_tokens: Annotated[int, _said("Prefill that was routed there and is not done.")] = 0
    age_s: Annotated[float | None, _said("Since it reported its load; absent: never.")] = None
    events_applied: int = 0
    events_lost: int = 0
    events_skipped: int = 0


class Store(msgspec.Struct, frozen=True, omit_defaults=True):
    """A domain of no pod: an LMCache server."""

    domain: str
    live: bool
    address: str = ""
    held_blocks: dict[str, int] = {}
    events_lost: int = 0


class Redis(msgspec.Struct, frozen=True, omit_defaults=True):
    stale_for_s: Annotated[float | None, _said("Since it answered the index; absent: it never has.")] = None
    log_lag_s: Annotated[float, _said("How late the newest entry of the log was applied.")] = 0.0
    answered_in_s: float | None = None
    error: Annotated[str, _said("What it refused, and what to do.")] = ""


class Fleet(msgspec.Struct, frozen=True):
    replicas: Annotated[list[Replica], _said("By name; at most 256, and those that are not well first of all.")]
    left_out: Annotated[int, _said("Replicas beyond these.")]
    stores: list[Store]
    blocks: Annotated[dict[str, int], _said("Distinct blocks in the index, by tier.")]
    block_size: Annotated[int, _said("Tokens; 0: no replica has said.")]
    routers: Annotated[int, _said("Routers that have announced themselves.")]
    redis: Redis
    loops: Annotated[dict[str, str], _said("What runs in the background -> what is wrong; empty: nothing.")]


class Traffic(msgspec.Struct, frozen=True):
    """Of the last decisions: what the engines have told of."""

    requests: int = 0
    compared: Annotated[int, _said("Of these, those with a prediction of one whole prompt.")] = 0
    prompt_tokens: int = 0
    cached_tokens: Annotated[int, _said("Of these, from a cache, by the engine's own count.")] = 0
    exact: Annotated[int, _said("Of the compared ones: predicted to the token.")] = 0
    error_tokens: Annotated[int, _said("Sum over the compared ones.")] = 0


class Branch(msgspec.Struct, frozen=True):
    """A beginning that several of the last prompts have in common."""

    blocks: Annotated[int, _said("Its length: a power of two, and so a little less than what they share.")]
    requests: int
    holders: Annotated[list[str], _said("Live pods that hold its last block themselves; at most 8.")]
    holder_count: int
    parent: Annotated[int, _said("Place in this list of the shorter one that it goes on from; -1: none.")] = -1


class Overview(msgspec.Struct, frozen=True):
    model: str
    models: list[str]
    at_s: Annotated[float, _said("Seconds since 1970.")]
    fleet: Fleet
    traffic: Traffic
    by_replica: dict[str, Traffic]
    branches: Annotated[list[Branch], _said("The hottest ones, each behind the one that it goes on from.")]


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """A receipt, and what came before it."""

    receipt: Receipt
    conversation: Annotated[str, _said("The same for requests that go on from each other; empty: not known.")] = ""
    id: Annotated[str, _said("Its place; absent: no engine has told of it yet.")] = ""


class Decisions(msgspec.Struct, frozen=True):
    decisions: Annotated[list[Decision], _said("Complete ones, newest first.")]
    open: Annotated[list[Decision], _said("Of this process, newest first: no engine has told of them yet.")]
    last: Annotated[str, _said("For `after`, to be told of what is new.")]
