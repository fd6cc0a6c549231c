"""Whether what the index predicts of a pod is what its engine does. Trust `exact` has to be earned.

In: completed receipts. Out: for each pod a cause why its predictions do not hold, or none.

Compared are predictions that rest on the index alone: of whole prompts that did not wait long (a queue gives the
engine time to evict). Those that count on something still under way are left out, if the index knows of it when the
request has been served, and the pod was not idle when it came: what an idle pod holds must be known at once. A
prediction misses if it is off by more than one block.

    last 16 of a pod, . right, x missed    ....x..x........   2: holds      .x..xx....x.x...   5: it does not
                                                                            until 1 of 16 is left

A quarter is far above what healthy pods show (`make audit`: 0 to 1%), and five misses come within seconds.
"""

from __future__ import annotations

from collections import deque

from serve_app.accounting import error_blocks, most_usable_tokens
from serve_app.routing.receipts import Receipt, Terms
from serve_app.types import PodId

WINDOW = 16  # comparable requests of a pod
MISSES = 5  # of these, and its predictions do not hold
HEALED = 1  # of these, and they do again
TOLERANCE_BLOCKS = 1
QUEUED_MAX_S = 1.0  # a request that waited longer is not compared

_OTHER_TOKENS = (
    "the engine counts other prompt tokens than the router: tokenizer or chat template differ; "
    "compare with `kvcache tokenize`"
)
_TOO_MUCH = (
    "more was predicted than the engine reused: removals are not heard, or attention layout, EAGLE or salts differ; "
    "see events_skipped and layout in /kvcache/v1/pods"
)
_TOO_LITTLE = (
    "the engine reused more than was predicted: events are not understood or not heard, or it loads from a tier that "
    "is not indexed; see events_skipped and unindexed in /kvcache/v1/pods"
)


class PredictionCheck:
    """One router's, used on one event loop."""

    def __init__(self) -> None:
        self._errors: dict[PodId, deque[tuple[int, bool]]] = {}  # blocks, and whether the prompt's tokens were the same
        self._causes: dict[PodId, str] = {}

    @property
    def causes(self) -> dict[PodId, str]:
        """Pods whose predictions do not hold, and the likely cause of each with what to do."""
        return dict(self._causes)

    def observe(self, complete: Receipt, block_size: int, *, came: bool = True) -> None:
        """Compare a request with what was predicted of it.

        Args:
            came: whether the index has come to know of all that was expected beyond what it knew.
        """
        predicted = _from_the_index(complete, block_size, came)
        actual = complete.actual
        if predicted is None or actual is None or not (predicted or actual.cached_tokens):
            return
        pod = PodId(complete.chosen)
        errors = self._errors.setdefault(pod, deque(maxlen=WINDOW))
        same = actual.prompt_tokens == complete.prompt_tokens
        errors.append((error_blocks(predicted, actual.cached_tokens, block_size), same))
        missed = [(error, same) for error, same in errors if abs(error) > TOLERANCE_BLOCKS]
        if len(missed) >= MISSES:
            self._causes[pod] = _cause(missed)
        elif len(missed) <= HEALED:
            self._causes.pop(pod, None)

    def forget(self, pod: PodId) -> None:
        """Its engine has begun a new life, or is gone."""
        self._errors.pop(pod, None)
        self._causes.pop(pod, None)


def _from_the_index(receipt: Receipt, block_size: int, came: bool) -> int | None:
    """Cached tokens that the index alone predicts; None if the request cannot be compared."""
    actual = receipt.actual
    if actual is None or actual.queued_s > QUEUED_MAX_S or receipt.incomplete or not receipt.one_sequence:
        return None
    terms = receipt.replicas.get(receipt.chosen)
    if terms is None:
        return None
    held = sum(terms.matched_tokens.values())
    if terms.expected_tokens > held and came and not _was_idle(terms):
        return None
    return min(held, most_usable_tokens(receipt.prompt_tokens, block_size))


def _was_idle(terms: Terms) -> bool:
    """Whether the pod had no request when the decision was made."""
    return terms.cost_s.get("decode_s", 1.0) == 0.0


def _cause(missed: list[tuple[int, bool]]) -> str:
    if sum(not same for _, same in missed) > len(missed) / 2:
        return _OTHER_TOKENS
    return _TOO_MUCH if sum(error > 0 for error, _ in missed) > len(missed) / 2 else _TOO_LITTLE
