"""Trust is earned: predictions that do not hold are noticed within some requests, and healthy pods stay exact."""

from __future__ import annotations

import random

import msgspec
import pytest

from serve_app.events.engine_blocks import Added, EngineBlocks, Removed
from serve_app.events.wire import BlockStored, Event
from serve_app.routing.prediction_check import HEALED, MISSES, WINDOW, PredictionCheck
from serve_app.routing.receipts import Actual, Receipt, Terms
from serve_app.types import Domain, EngineSpec, PodId
from tests.contract.test_hybrid_layouts import DOMAIN, EPOCH, LAYOUTS, MODEL, Followed, conversations
from tests.vllm_engine import BLOCK_SIZE, VLLMEngine, full

POD = PodId("pod")
IDLE, BUSY = {"decode_s": 0.0}, {"decode_s": 0.1}


def served(
    predicted: int,
    cached: int,
    *,
    prompt: int = 1000,
    counted: int = 1000,
    queued_s: float = 0.0,
    expected: int = 0,
    cost_s: dict[str, float] = BUSY,
) -> Receipt:
    """A receipt of a request: predicted by the index, and cached as the engine says."""
    terms = Terms({"gpu": predicted}, expected, cost_s=cost_s)
    return Receipt(
        "r",
        0.0,
        "router",
        "hit",
        "prefix",
        POD,
        0.0,
        prompt,
        predicted,
        replicas={POD: terms},
        actual=Actual(counted, cached, queued_s, 0.1),
    )


def after(*receipts: Receipt) -> str:
    check = PredictionCheck()
    for receipt in receipts:
        check.observe(receipt, BLOCK_SIZE)
    return check.causes.get(POD, "")


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (served(0, 640), "the engine reused more"),
        (served(640, 0), "more was predicted"),
        (served(640, 0, counted=990), "other prompt tokens"),
    ],
)
def test_a_pod_whose_predictions_do_not_hold_is_named_with_its_likely_cause(wrong: Receipt, cause: str) -> None:
    right = served(640, 640)
    assert cause in after(*[right, right, wrong] * MISSES)
    assert after(*[wrong] * (MISSES - 1)) == ""
    assert after(*[wrong] * WINDOW, *[right] * (WINDOW - HEALED)) == ""


@pytest.mark.parametrize(
    "left_out",
    [
        served(640, 0, queued_s=5.0),  # it waited, and the engine evicted meanwhile
        served(0, 640, expected=640),  # the burst's first request was still to be computed
        msgspec.structs.replace(served(640, 0), incomplete="media"),
        msgspec.structs.replace(served(640, 0), one_sequence=False),
        msgspec.structs.replace(served(640, 0), actual=None),
        served(640, 640 - BLOCK_SIZE),  # one block is no miss
        served(0, 0),
    ],
)
def test_what_says_nothing_of_the_index_is_left_out(left_out: Receipt) -> None:
    assert after(*[left_out] * 3 * WINDOW) == ""


def test_what_was_expected_must_have_come_by_the_time_that_it_was_reused() -> None:
    check = PredictionCheck()
    for came in (True, False):
        assert not check.causes
        for _ in range(WINDOW):
            check.observe(served(0, 640, expected=640), BLOCK_SIZE, came=came)
    assert "reused more" in check.causes[POD]


def test_an_idle_pods_blocks_must_be_known_whatever_the_ledger_expects() -> None:
    assert after(*[served(0, 640, expected=640, cost_s=IDLE)] * WINDOW)


def run(followed: Followed, requests: int) -> tuple[PredictionCheck, int]:
    """Requests in turn; how many until the pod is distrusted."""
    check = PredictionCheck()
    for number, tokens in enumerate(conversations(7, requests)):
        held = followed.predicted(tokens)
        cached = followed.serve(tokens)
        check.observe(served(held, cached, prompt=len(tokens), counted=len(tokens)), BLOCK_SIZE)
        if check.causes:
            return check, number + 1
    return check, requests


def test_a_hybrid_taken_for_a_plain_engine_is_noticed_in_under_20_requests() -> None:
    """The group code switched off, as with an engine that does not say what its groups are."""
    followed = Followed(VLLMEngine(LAYOUTS["five sliding to one full"], 4000))
    plain = EngineBlocks(MODEL, BLOCK_SIZE)
    followed.index.leave(DOMAIN, EPOCH)
    followed.index.join(Domain(DOMAIN, EPOCH, EngineSpec(MODEL, BLOCK_SIZE, "t"), POD))

    def hear(events: list[Event]) -> None:
        told = [
            msgspec.structs.replace(event, kv_cache_spec_kind=None) if isinstance(event, BlockStored) else event
            for event in events
            if not getattr(event, "group_idx", 0)  # group 0 speaks for all, as before there were groups
        ]
        for change in plain.apply(told):
            match change:
                case Added(tier, keys):
                    followed.index.add(DOMAIN, EPOCH, tier, keys)
                case Removed(tier, keys):
                    followed.index.remove(DOMAIN, EPOCH, tier, keys)

    followed.hear = hear  # type: ignore[method-assign]
    check, requests = run(followed, 60)
    assert requests < 20
    assert "reused more than was predicted" in check.causes[POD]


def test_a_dense_engine_under_eviction_stays_exact() -> None:
    check, requests = run(Followed(VLLMEngine([full()], 160)), 400)
    assert (check.causes, requests) == ({}, 400)


def test_a_gap_in_a_hundred_does_not_matter() -> None:
    dice = random.Random(1)
    assert after(*[served(640, 0 if dice.random() < 0.01 else 640) for _ in range(2000)]) == ""


def test_an_engine_that_was_started_again_begins_with_trust() -> None:
    check = PredictionCheck()
    for _ in range(WINDOW):
        check.observe(served(0, 640), BLOCK_SIZE)
    assert check.causes
    check.forget(POD)
    assert check.causes == {}
    check.observe(served(0, 640), BLOCK_SIZE)
    assert check.causes == {}
