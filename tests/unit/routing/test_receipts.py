"""A receipt per decision, completed by the engine's own figures."""

import base64

import msgspec

from serve_app.routing.choice import Choice, Cost, Outcome
from serve_app.routing.receipts import OPEN_MAX, TAIL_BLOCKS, Receipts, predicted_tokens, receipt, trail
from serve_app.types import CPU, GPU, EncodedKeys, Found, PodId, PodMatch, Served
from tests.helpers import keys

A, B = PodId("a"), PodId("b")


def found(prompt_tokens: int = 1000, gpu: int = 320, cpu: int = 0) -> Found:
    return Found(
        [EncodedKeys(b"", prompt_tokens, prompt_tokens)], [{A: PodMatch({GPU: gpu, CPU: cpu}), B: PodMatch()}], 32
    )


def choice(held: int = 0) -> Choice:
    return Choice([A, B], Outcome.HIT, "prefix", {A: Cost(0.5, 0.1)}, {A: held})


def test_a_receipt_tells_what_the_decision_rested_on() -> None:
    made = receipt("id", "router", 5.0, 0.0002, A, choice(352), found(cpu=32))
    assert (made.chosen, made.outcome, made.reason, made.prompt_tokens) == ("a", "hit", "prefix", 1000)
    assert made.replicas["a"].matched_tokens == {"gpu": 320, "cpu": 32}
    assert made.replicas["a"].cost_s["compute_s"] == 0.5
    assert made.replicas["b"].matched_tokens == {}
    assert made.actual is None


def test_prediction_follows_the_engines_rule() -> None:
    """vLLM never takes the last token from its cache, and takes whole blocks."""
    assert predicted_tokens(found(320, gpu=320), A, choice()) == 288
    assert predicted_tokens(found(321, gpu=320), A, choice()) == 320
    assert predicted_tokens(found(1000, gpu=320), A, choice(640)) == 640  # speculative: it will be there
    assert predicted_tokens(found(), B, choice()) == 0


def test_the_engines_figures_complete_it_by_request_id() -> None:
    receipts = Receipts()
    for request_id in ("4f-2a", "77-b"):
        receipts.open(receipt(request_id, "r", 5.0, 0.0, A, choice(), found()))
    chat = receipts.close(A, Served("chatcmpl-4f-2a", 1000, 320, 0.1, 0.5))
    assert chat is not None
    assert chat.receipt.actual is not None
    assert chat.receipt.request_id == "4f-2a"
    assert (chat.receipt.actual.cached_tokens, chat.receipt.actual.prefill_s) == (320, 0.5)
    completion = receipts.close(A, Served("cmpl-77-b-0", 1000, 288, 0.1, 0.5))
    assert completion is not None
    assert completion.receipt.request_id == "77-b"
    assert receipts.close(A, Served("chatcmpl-4f-2a", 1000, 320, 0.1, 0.5)) is None  # once
    assert receipts.close(A, Served("another-router's", 1, 0, 0.0, 0.0)) is None


def test_a_refused_request_is_under_the_name_of_who_took_it() -> None:
    receipts = Receipts()
    receipts.open(receipt("x", "r", 5.0, 0.0, A, choice(), found()))
    receipts.moved("x", B)
    closed = receipts.close(B, Served("cmpl-x-0", 1000, 0, 0.0, 0.1))
    assert closed is not None
    assert (closed.receipt.chosen, closed.receipt.refused_by) == ("b", "a")


def test_two_requests_of_one_id_are_not_taken_for_each_other() -> None:
    receipts = Receipts()
    for again in (False, True):  # the same request, decided twice
        receipts.open(receipt("x", "r", 5.0, 0.0, A, choice(), found()), again=again)
    assert receipts.close(A, Served("cmpl-x-0", 1000, 0, 0.0, 0.1)) is not None
    for _ in range(2):
        receipts.open(receipt("x", "r", 5.0, 0.0, A, choice(), found()))
    assert receipts.close(A, Served("cmpl-x-0", 1000, 0, 0.0, 0.1)) is None


def test_open_receipts_are_bounded() -> None:
    receipts = Receipts()
    gone = [receipts.open(receipt(str(i), "r", 5.0, 0.0, A, choice(), None)) for i in range(OPEN_MAX + 2)]
    assert [one.receipt.request_id for one in gone if one is not None] == ["0", "1"]


def test_a_receipt_holds_nothing_of_the_prompt() -> None:
    """Neither text nor ids nor block keys: of what was encoded, only counts go in."""
    secret = b"SECRETKEY-0123456789abcdef"
    keys = EncodedKeys(secret, 1000, 1000)
    known = Found([keys], [{A: PodMatch({GPU: 320}), B: PodMatch()}], 32)
    made = msgspec.json.encode(receipt("id", "router", 5.0, 0.0002, A, choice(), known))
    for shown in (secret, base64.b64encode(secret)[:20], secret.hex().encode()):
        assert shown not in made


def test_a_trail_names_blocks_1_2_4_and_the_last_ones() -> None:
    def of(blocks: int) -> tuple[bytes, bytes]:
        prompt = EncodedKeys(keys(*range(1, blocks + 1)), 32 * blocks, 0)
        return trail(Found([prompt], [{}], 32))

    assert of(0) == (b"", b"")
    assert of(1) == (keys(1), keys(1))
    assert of(11) == (keys(1, 2, 4, 8), keys(*range(1, 12)))
    assert of(100) == (keys(1, 2, 4, 8, 16, 32, 64), keys(*range(101 - TAIL_BLOCKS, 101)))
    two = EncodedKeys(keys(1), 32, 0)
    assert trail(Found([two, two], [{}, {}], 32)) == trail(None) == (b"", b"")


def test_the_newest_open_ones_come_first() -> None:
    receipts = Receipts()
    for name in "abc":
        receipts.open(receipt(name, "r", 5.0, 0.0, A, choice(), found()))
    assert [one.receipt.request_id for one in receipts.latest(2)] == ["c", "b"]
