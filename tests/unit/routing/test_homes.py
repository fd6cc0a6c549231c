"""A conversation that several pods hold alike stays with the one that served it last."""

from collections import Counter

import pytest

from serve_app.routing import homes
from serve_app.routing.homes import Homes
from tests.unit.routing.fleet import BLOCK_SIZE, START_S, A, B, C, D, Router, prompt, text


def test_the_request_before_is_found_by_its_last_block() -> None:
    """The example of the module's docstring, and an answer of a block behind it."""
    known = Homes()
    keys = text("conversation", 41)
    known.sent(A, keys[: 40 * 8])
    assert known.find(keys, 40) == A
    assert known.find(keys, 41) == A
    assert known.find(keys, 39) is None  # nobody holds that block any more
    assert known.find(text("another", 41), 40) is None
    known.sent(B, keys[: 40 * 8])
    assert known.find(keys, 40) == B
    known.sent(A, b"")
    assert known.find(b"", 0) is None


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "MAX_HOMES", 3)
    known = Homes()
    for name in ("one", "two", "three", "one", "four"):
        known.sent(A, text(name, 5))
    assert [known.find(text(name, 5), 5) for name in ("one", "two", "three", "four")] == [A, None, A, A]


def test_equal_pods_do_not_pass_a_conversation_around() -> None:
    """Turns of a few tokens; the document was copied to all pods before."""
    router = Router()
    document = text("document", 200)
    for pod in router.pods:
        router.stored(pod, document)
    last_s = START_S
    got = []
    for turn in range(12):
        sent, _ = router.send(prompt(document, rest_tokens=turn), now_s=last_s)
        got.append(sent.pod)
        last_s += 1.0
        for pod in router.pods:
            router.reported(pod, 0, last_s)
        last_s += 1.0
    assert len(set(got)) == 1


def test_conversations_about_one_document_are_spread_and_each_stays() -> None:
    router = Router()
    document = text("document", 200)
    for pod in router.pods:
        router.stored(pod, document)
    first = {i: router.answered(document + text(f"conversation {i}", 4), START_S + i) for i in range(20)}
    assert set(Counter(first.values()).values()) == {5}
    for i in first:
        for pod in router.pods:
            router.stored(pod, document + text(f"conversation {i}", 4))  # whoever has it: all are equal
    for turn in range(1, 4):
        for i, pod in first.items():
            keys = document + text(f"conversation {i}", 4)
            sent, _ = router.send(prompt(keys, rest_tokens=3 * turn), now_s=START_S + 100 * turn + i)
            assert sent.pod == pod
            router.reported(pod, 0, START_S + 100 * turn + i + 0.5)


def test_it_moves_when_its_pod_is_busy() -> None:
    router = Router([A, B])
    keys = text("conversation", 100)
    for pod in router.pods:
        router.stored(pod, keys)
    home = router.answered(keys, START_S)
    other = B if home == A else A
    for in_flight, ranked in ((1, [home, other]), (4, [other, home])):
        router.reported(home, in_flight, START_S + 2)
        assert router.choose(keys, START_S + 3).ranked == ranked


def test_it_moves_when_another_pod_holds_more() -> None:
    router = Router([A, B])
    keys = text("conversation", 100)
    router.stored(A, keys[: 50 * 8])
    assert router.answered(keys[: 50 * 8], START_S) == A
    router.stored(B, keys)
    assert router.choose(keys, START_S + 5).ranked == [B, A]


def test_a_home_that_is_gone_is_no_home() -> None:
    router = Router([A, B, C, D])
    keys = text("conversation", 100)
    for pod in router.pods:
        router.stored(pod, keys)
    home = router.route(keys)
    router.pods.remove(home)
    router.chooser.keep_only(router.pods)
    assert home not in router.choose(keys).ranked


def test_routers_share_homes() -> None:
    one = Router([A, B])
    two = Router([A, B], one.index)
    keys = text("conversation", 100)
    sent, found = one.send(prompt(keys))
    (route,) = one.chooser.route(sent, found)
    two.chooser.routed(route.pod, route.keys, route.tokens, START_S)
    for pod in one.pods:
        one.stored(pod, keys)
        for router in (one, two):
            router.reported(pod, 0, START_S + 1)
    later = START_S + 2
    assert {router.route(keys + text("next", 1), later) for router in (one, two)} == {sent.pod}
    assert found.prompts[0].token_count > 100 * BLOCK_SIZE
