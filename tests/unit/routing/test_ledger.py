"""What was routed and not yet seen: when it counts, and every way in which it ends."""

from collections.abc import Sequence

from serve_app.blocks import KEY_BYTES
from serve_app.routing.in_flight import FORGET_S as FORGET_IN_FLIGHT_S
from serve_app.routing.in_flight import REPORT_DELAY_S, InFlight
from serve_app.routing.ledger import FORGET_S, SPECULATE_S, Ledger
from serve_app.types import BlockKeys, PodId, PodLoad
from tests.unit.routing.fleet import START_S, A, B, Router, prompt, text


def nothing_is_held(pods: Sequence[PodId], keys: BlockKeys) -> list[bool]:
    assert len(keys) == len(pods) * KEY_BYTES
    return [False] * len(pods)


def test_tokens_queue_and_blocks_will_be_there() -> None:
    """The example of the module's docstring."""
    ledger = Ledger()
    keys = text("x", 6)
    ledger.sent(A, keys, 4 * 16, START_S)
    assert ledger.queued_tokens(A) == 64
    assert ledger.speculative_blocks(keys, {A: 2, B: 0}, START_S) == {A: 6}
    assert ledger.speculative_blocks(keys + text("more", 3), {A: 2}, START_S) == {A: 6}
    assert ledger.speculative_blocks(keys, {A: 6}, START_S) == {}  # nothing beyond what it holds
    assert ledger.speculative_blocks(text("y", 6), {A: 0}, START_S) == {}
    ledger.settle(lambda pods, last: [last == keys[-KEY_BYTES:]], START_S + 0.1)
    assert ledger.queued_tokens(A) == 0


def test_the_pods_own_events_close_an_entry_and_no_other_pods() -> None:
    router = Router([A, B])
    keys, other = text("x", 20), text("y", 20)
    ledger = router.chooser.ledger
    ledger.sent(A, keys, 320, START_S)
    ledger.sent(A, other, 100, START_S)
    router.stored(B, keys)
    router.stored(A, keys[:-KEY_BYTES])  # not its last block
    ledger.settle(router.index.held, START_S + 0.1)
    assert ledger.queued_tokens(A) == 420
    router.stored(A, keys)
    ledger.settle(router.index.held, START_S + 0.1)
    assert ledger.queued_tokens(A) == 100


def test_the_choice_itself_follows_the_events() -> None:
    router = Router([A, B])
    keys = text("x", 200)
    first = router.route(keys)
    waiting = router.choose(text("z", 10), START_S + 0.1).costs[first]
    router.stored(first, keys)
    done = router.choose(text("z", 10), START_S + 0.2).costs[first]
    assert waiting.queue_s > 0 == done.queue_s


def test_a_load_report_closes_the_oldest_beyond_what_the_pod_has() -> None:
    ledger = Ledger()
    for i in range(4):
        ledger.sent(A, text(f"{i}", 3), 10**i, START_S + i)
    ledger.reported(A, PodLoad(2, START_S + 3 + REPORT_DELAY_S))
    assert ledger.queued_tokens(A) == 100 + 1000
    ledger.sent(A, text("new", 3), 10_000, START_S + 4)
    ledger.reported(A, PodLoad(0, START_S + 4))  # cannot have seen the last one
    assert ledger.queued_tokens(A) == 10_000
    ledger.reported(B, PodLoad(0, START_S + 9))
    ledger.reported(A, PodLoad(7, START_S + 9))
    assert ledger.queued_tokens(A) == 10_000
    ledger.reported(A, PodLoad(0, START_S + 9))
    assert ledger.queued_tokens(A) == 0


def test_a_report_closes_what_was_sent_first_in_whatever_order_it_became_known() -> None:
    """Another router's route may arrive after one of our own that is younger."""
    ledger = Ledger()
    ledger.sent(A, text("ours", 3), 1, START_S + 1.0)
    ledger.sent(A, text("theirs", 3), 10, START_S)
    ledger.reported(A, PodLoad(0, START_S + 0.5 + REPORT_DELAY_S))
    assert ledger.queued_tokens(A) == 1


def test_time_closes_what_nothing_was_heard_of() -> None:
    ledger = Ledger()
    ledger.sent(A, text("x", 3), 10, START_S)
    ledger.sent(A, b"", 5, START_S)  # shorter than a block: no event will tell of it
    ledger.settle(nothing_is_held, START_S + FORGET_S - 1)
    assert ledger.queued_tokens(A) == 15
    ledger.settle(nothing_is_held, START_S + FORGET_S)
    assert ledger.queued_tokens(A) == 0


def test_blocks_are_speculative_as_long_as_they_are_queued_and_a_while_longer() -> None:
    ledger = Ledger()
    keys = text("x", 30)
    ledger.sent(A, keys, 480, START_S)
    for i in range(1, 20):  # others come and make the tables turn
        ledger.sent(B, text(f"{i}", 3), 1, START_S + i * SPECULATE_S)
        assert ledger.speculative_blocks(keys, {A: 0}, START_S + i * SPECULATE_S) == {A: 30}
    end_s = START_S + 20 * SPECULATE_S
    ledger.reported(A, PodLoad(0, end_s))
    ledger.sent(B, text("b", 3), 1, end_s)
    assert ledger.speculative_blocks(keys, {A: 0}, end_s) == {A: 30}
    for i in range(1, 3):
        ledger.sent(B, text("b", 3), 1, end_s + i * SPECULATE_S)
    assert ledger.speculative_blocks(keys, {A: 0}, end_s + 2 * SPECULATE_S) == {}


def test_speculative_blocks_are_forgotten_in_a_pause() -> None:
    """Whoever asks after it finds what the index knows, not what was sent before: the engine may have been reset."""
    ledger = Ledger()
    keys = text("x", 30)
    ledger.sent(A, keys, 480, START_S)
    ledger.reported(A, PodLoad(0, START_S + 1))
    assert ledger.speculative_blocks(keys, {A: 0}, START_S + SPECULATE_S - 0.1) == {A: 30}
    assert ledger.speculative_blocks(keys, {A: 0}, START_S + 2 * SPECULATE_S) == {}


def test_withdraw() -> None:
    ledger = Ledger()
    one = ledger.sent(A, text("x", 3), 10, START_S)
    two = ledger.sent(A, text("x", 3), 20, START_S)
    ledger.withdraw(one)
    assert ledger.queued_tokens(A) == 20
    ledger.withdraw(one)  # it is closed
    assert ledger.queued_tokens(A) == 20
    ledger.keep_only([B])
    ledger.withdraw(two)
    assert ledger.queued_tokens(A) == 0


def test_a_withdrawn_request_counts_nowhere() -> None:
    router = Router([A, B])
    before = router.chooser.expected(router.pods, router.found(prompt(text("probe", 10))), START_S)
    sent, _ = router.send(prompt(text("x", 50)))
    router.chooser.withdraw(sent)
    after = router.chooser.expected(router.pods, router.found(prompt(text("probe", 10))), START_S)
    assert after == before


def test_many_pods_come_and_go() -> None:
    """Places in the masks are used again, and are clean then."""
    ledger = Ledger()
    keys = text("x", 5)
    for i in range(200):
        pod = PodId(f"pod {i}")
        assert pod not in ledger.speculative_blocks(keys, {pod: 0}, START_S)
        ledger.sent(pod, text("y", 5), 1, START_S)
        assert pod not in ledger.speculative_blocks(keys, {pod: 0}, START_S)
        ledger.sent(pod, keys, 1, START_S)
        assert ledger.speculative_blocks(keys, {pod: 0}, START_S)[pod] == 5
        ledger.keep_only([pod] if i % 2 else [])
    everybody = Ledger()
    for i in range(150):
        everybody.sent(PodId(f"{i}"), keys, 1, START_S)
    held = {PodId(f"{i}"): i % 5 for i in range(150)}
    assert everybody.speculative_blocks(keys, held, START_S) == {PodId(f"{i}"): 5 for i in range(150)}


def test_in_flight_is_what_was_reported_and_what_was_sent_since() -> None:
    in_flight = InFlight()
    in_flight.sent(A, 10.0)
    in_flight.sent(A, 10.1)
    assert in_flight.count(A, 10.2) == 2
    in_flight.reported(B, PodLoad(3, 10.0))
    assert in_flight.count(B, 10.2) == 3
    in_flight.reported(A, PodLoad(1, 10.05 + REPORT_DELAY_S))  # may have seen the first, not the second
    assert in_flight.count(A, 10.2) == 2
    in_flight.reported(A, PodLoad(0, 11.0))
    assert in_flight.count(A, 11.0) == 0
    in_flight.withdrawn(A)  # the report was faster
    in_flight.sent(A, 12.0)
    in_flight.withdrawn(A)
    assert in_flight.count(A, 12.0) == 0


def test_in_flight_forgets_what_nobody_reports() -> None:
    in_flight = InFlight()
    in_flight.sent(A, 10.0)
    in_flight.sent(B, 10.0)
    assert in_flight.count(A, 10.0 + FORGET_IN_FLIGHT_S) == 0
    in_flight.keep_only([A])
    assert in_flight.count(B, 10.0) == 0
