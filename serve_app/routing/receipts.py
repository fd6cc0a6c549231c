"""A receipt per request: what was known, what each replica would have cost, who got it and why, and what came of it.

    open    at the decision; kept until the engine has told of the request, or `OPEN_MAX` others came after it
    close   with the engine's own figures: prompt tokens, cached tokens, time queued and time of prefill

Predicted and actual cached tokens are compared by vLLM's rule: whole blocks, and never the whole prompt, for its last
token must be computed to have something to sample from.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

import msgspec

from serve_app.accounting import most_usable_tokens
from serve_app.blocks import KEY_BYTES
from serve_app.routing.choice import Choice
from serve_app.types import BlockKeys, Found, PodId, Served

OPEN_MAX = 4096
SHOWN_MAX = 16  # replicas in a receipt, and half as many more
MARKS_MAX = 16  # of a prompt's blocks: 1, 2, 4, ... 32,768
TAIL_BLOCKS = 32

_MARKS = tuple(slice((depth - 1) * KEY_BYTES, depth * KEY_BYTES) for depth in (1 << i for i in range(MARKS_MAX)))


# `gc=False`: none of these can be in a cycle, and a collection that looks at thousands of receipts holds the router.


class Terms(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One replica, as the decision saw it."""

    matched_tokens: dict[str, int]  # contiguous prefix by tier, fastest first
    expected_tokens: int = 0  # that it would have in its cache when the request's turn comes
    trust: str = "exact"
    cost_s: dict[str, float] = {}  # terms of routing.choice.Cost; empty: the decision did not rest on costs


class Actual(msgspec.Struct, frozen=True, gc=False):
    """What the engine says of the request. Seconds."""

    prompt_tokens: int
    cached_tokens: int
    queued_s: float
    prefill_s: float


class Trail(NamedTuple):
    """Keys that tell which requests belong together. They are in Redis, beside the receipt; no client gets them."""

    marks: BlockKeys = b""  # of the prompt's blocks 1, 2, 4, ...: which beginnings requests have in common
    tail: BlockKeys = b""  # of its last `TAIL_BLOCKS`: which request it goes on from


NO_TRAIL = Trail()


class Receipt(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """JSON as `GET /kvcache/v1/receipts` gives it."""

    request_id: str
    at_s: float  # seconds since 1970
    router: str
    outcome: str
    reason: str
    chosen: str
    decision_s: float
    prompt_tokens: int = 0  # 0: not known
    predicted_cached_tokens: int = 0
    incomplete: str = ""  # why some of the prompt is not known (late, media): the prediction is of a part then
    one_sequence: bool = True  # if not, the engine's figures are of one of several prompts or answers
    replicas: dict[str, Terms] = {}  # the best `SHOWN_MAX`, and those that held most of it
    others: int = 0  # replicas that are not among these
    refused_by: str = ""  # the first choice, if it did not take the request
    actual: Actual | None = None  # None: not known yet, or never told


def receipt(
    request_id: str, router: str, at_s: float, decision_s: float, pod: PodId, choice: Choice, found: Found | None
) -> Receipt:
    """The receipt of a decision for `pod`."""
    head = (request_id, at_s, router, str(choice.outcome), choice.reason, str(pod), round(decision_s, 6))
    if found is None:
        return Receipt(*head)
    shown = _shown(choice)
    return Receipt(
        *head,
        prompt_tokens=found.prompt_tokens,
        predicted_cached_tokens=predicted_tokens(found, pod, choice),
        incomplete=found.incomplete,
        one_sequence=found.one_sequence,
        replicas={
            str(candidate): Terms(
                {str(tier): tokens for tier, tokens in found.matched_tokens(candidate).items()},
                choice.held_tokens.get(candidate, 0),
                str(found.trust(candidate)),
                {name: round(term, 6) for name, term in cost._asdict().items()}
                if (cost := choice.costs.get(candidate)) is not None
                else {},
            )
            for candidate in shown
        },
        others=len(choice.ranked) - len(shown),
    )


def trail(found: Found | None) -> Trail:
    """Of a request with one prompt."""
    if found is None or len(found.prompts) != 1:
        return NO_TRAIL
    keys = found.prompts[0].keys
    marks = _MARKS[: (len(keys) // KEY_BYTES).bit_length()]
    return Trail(b"".join([keys[mark] for mark in marks]), keys[-TAIL_BLOCKS * KEY_BYTES :])


def _shown(choice: Choice) -> list[PodId]:
    """Whom a receipt tells of: in a large fleet most replicas are like each other."""
    if len(choice.ranked) <= SHOWN_MAX:
        return choice.ranked
    best = choice.ranked[:SHOWN_MAX]
    held = heapq.nlargest(SHOWN_MAX // 2, choice.held_tokens.items(), key=itemgetter(1))
    return [*best, *(pod for pod, tokens in held if tokens and pod not in best)]


def predicted_tokens(found: Found, pod: PodId, choice: Choice) -> int:
    """Tokens that the engine should take from its cache."""
    held = max(sum(found.matched_tokens(pod).values()), choice.held_tokens.get(pod, 0))
    if len(found.prompts) != 1:
        return held
    return min(held, most_usable_tokens(found.prompt_tokens, found.block_size))


def last_expected(found: Found | None, pod: PodId, choice: Choice) -> BlockKeys:
    """Key of the last block that the pod did not hold and was expected to hold by the request's turn; or nothing."""
    expected = choice.held_tokens.get(pod, 0)
    if found is None or len(found.prompts) != 1 or expected <= sum(found.matched_tokens(pod).values()):
        return b""
    end = expected // found.block_size * KEY_BYTES
    return found.prompts[0].keys[end - KEY_BYTES : end]


class Open(NamedTuple):
    """A receipt that the engine has not told of, or that is complete now."""

    receipt: Receipt
    expected: BlockKeys = b""  # see `last_expected`: by now the index must know of it
    trail: Trail = NO_TRAIL


class Receipts:
    """Open receipts of one router, by request id."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Open] = OrderedDict()

    def open(
        self, new: Receipt, expected: BlockKeys = b"", trail: Trail = NO_TRAIL, *, again: bool = False
    ) -> Open | None:
        """Returns the oldest one if it has to go, as it is.

        Args:
            expected: `last_expected` of the decision.
            again: it is the same request, decided once more. Without that, two of one id are two requests of a client
                that gives several the same `x-request-id`: the engine's figures tell them not apart, so both go.
        """
        if not again and self._open.pop(new.request_id, None) is not None:
            return None
        self._open[new.request_id] = Open(new, expected, trail)
        return self._open.popitem(last=False)[1] if len(self._open) > OPEN_MAX else None

    def moved(self, request_id: str, pod: PodId) -> None:
        """The first choice refused the request, and `pod` got it."""
        if (known := self._open.get(request_id)) is not None:
            before = known.receipt
            moved = msgspec.structs.replace(before, chosen=str(pod), refused_by=before.chosen)
            self._open[request_id] = Open(moved, trail=known.trail)

    def latest(self, count: int) -> list[Open]:
        """Those that no engine has told of, newest first."""
        return list(islice(reversed(self._open.values()), count))

    def close(self, pod: PodId, served: Served) -> Open | None:
        """The receipt of a request that `pod` has served, completed; None if it was not routed here."""
        if not served.request_id:  # the mean of several (events/scraping.py)
            return None
        found = self._open.pop(_request_id(served.request_id, self._open), None)
        if found is None or found.receipt.chosen != pod:
            return found
        actual = Actual(
            served.prompt_tokens, served.cached_tokens, round(served.queued_s, 6), round(served.prefill_s, 6)
        )
        return found._replace(receipt=msgspec.structs.replace(found.receipt, actual=actual))


def _request_id(engine_id: str, known: Mapping[str, Open]) -> str:
    """`chatcmpl-ID`, `cmpl-ID-0`, and the ID itself -> ID."""
    if engine_id in known:
        return engine_id
    own = engine_id.partition("-")[2]
    return own if own in known else own.rpartition("-")[0]
