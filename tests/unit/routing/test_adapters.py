"""LoRA adapters: who has one, who can get it, and that neither a burst nor a crowd has them loaded again and again."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from serve_app.index.keyspace import ADAPTERS_MAX, DomainRecord
from serve_app.routing.adapters import COMING_S, LOAD_S, NEVER_S, Adapters
from serve_app.routing.choice import Policy
from serve_app.scoring import Strategy
from serve_app.types import Domain, DomainId, EngineSpec, Epoch, ModelId, PodId
from tests.unit.routing.fleet import START_S, A, B, C, D, Router, prompt, text

TALES = "base:tales"


def domain(pod: PodId, adapters: tuple[str, ...] = (), slots: int = 0) -> Domain:
    spec = EngineSpec(ModelId("base"), 16, "")
    return Domain(DomainId(pod), Epoch(1), spec, pod, adapters=adapters, adapter_slots=slots)


def test_what_it_costs_where_it_is_not() -> None:
    """The example of the module's docstring."""
    adapters = Adapters()
    adapters.learn([domain(A, (TALES,), 2), domain(B, ("base:x",), 2), domain(C, ("base:x", "base:y"), 2), domain(D)])
    costs = adapters.cost_s(TALES, (A, B, C, D), START_S)
    assert costs == {B: LOAD_S, C: 2 * LOAD_S, D: NEVER_S}
    adapters.sent(TALES, B, START_S)
    assert B not in adapters.cost_s(TALES, (A, B), START_S + COMING_S - 1)
    assert B in adapters.cost_s(TALES, (A, B), START_S + COMING_S)


@pytest.mark.parametrize("name", ["", "base", "unknown"])
def test_what_nobody_can_have_is_no_adapter(name: str) -> None:
    adapters = Adapters()
    assert adapters.cost_s(name, (A, B), START_S) == {}
    adapters.learn([domain(A, (TALES,), 2), domain(B, slots=2)])
    assert adapters.cost_s(name, (A, B), START_S) == {}


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("policy", list(Policy))
def test_an_engine_that_lacks_it_gets_no_request_for_it(policy: Policy, strategy: Strategy) -> None:
    """vLLM's own `--lora-modules`, or `/v1/load_lora_adapter` of one engine: the others would answer 404."""
    router = Router((A, B, C), policy=policy, strategy=strategy)
    router.chooser.adapters.learn([domain(A), domain(B, ("tales",)), domain(C)])
    keys = text("x", 8)
    router.stored(A, keys)  # blocks of the base model's
    for i in range(20):
        for found in (router.found(prompt(keys)), None):
            choice = router.chooser.choose(router.pods, found, START_S + i, model="tales")
            assert choice.ranked[0] == B
            router.chooser.sent(B, found, choice, START_S + i)


class Fleet:
    """Four pods with some slots each: an adapter that is not there is loaded, and the least recently used one goes."""

    def __init__(self, slots: int) -> None:
        self.router = Router()
        self.slots = slots
        self.has: dict[PodId, OrderedDict[str, None]] = {pod: OrderedDict() for pod in self.router.pods}
        self.loads = self.requests = 0
        self.now_s = START_S

    def ask(self, name: str, number: int) -> PodId:
        router = self.router
        router.chooser.adapters.learn([domain(pod, tuple(names), self.slots) for pod, names in self.has.items()])
        found = router.found(prompt(text(f"{name} {number}", 8)))
        choice = router.chooser.choose(router.pods, found, self.now_s, model=name)
        pod = choice.ranked[0]
        router.chooser.sent(pod, found, choice, self.now_s)
        self.requests += 1
        names = self.has[pod]
        if name not in names:
            self.loads += 1
            if len(names) == self.slots:
                names.popitem(last=False)
        names[name] = None
        names.move_to_end(name)
        router.stored(pod, found.prompts[0].keys)
        router.reported(pod, 0, self.now_s + 0.1)
        self.now_s += 0.2
        return pod


@pytest.mark.parametrize(("count", "slots"), [(3, 4), (8, 2)])
def test_requests_go_where_their_adapter_is(count: int, slots: int) -> None:
    fleet, rng = Fleet(slots), random.Random(1)
    names = [f"base:{i}" for i in range(count)]
    for number in range(600):
        fleet.ask(rng.choice(names), number)
    assert fleet.loads <= 0.05 * fleet.requests, fleet.loads


def test_more_adapters_than_slots_do_not_thrash() -> None:
    """16 adapters in 8 slots, asked for by Zipf's law: about as well as one LRU cache of all slots."""
    fleet, rng = Fleet(2), random.Random(2)
    names = [f"base:{i}" for i in range(16)]
    asked = rng.choices(names, [1 / (i + 1) for i in range(16)], k=800)
    one_cache: OrderedDict[str, None] = OrderedDict()
    least = 0
    for number, name in enumerate(asked):
        fleet.ask(name, number)
        if name not in one_cache:
            least += 1
            if len(one_cache) == 8:
                one_cache.popitem(last=False)
        one_cache[name] = None
        one_cache.move_to_end(name)
    assert fleet.loads <= 1.5 * least, (fleet.loads, least)


def test_a_burst_for_a_new_adapter_stays_together() -> None:
    router = Router()
    router.chooser.adapters.learn([domain(pod, slots=4) for pod in router.pods])
    pods = set()
    for number in range(10):
        found = router.found(prompt(text(f"{number}", 2)))
        choice = router.chooser.choose(router.pods, found, START_S, model=TALES)
        router.chooser.sent(choice.ranked[0], found, choice, START_S)
        pods.add(choice.ranked[0])
    assert len(pods) <= 2


def test_what_engines_and_clients_make_up_is_bounded() -> None:
    many = tuple(f"base:{i}" for i in range(5000))
    record = DomainRecord.of(domain(A, many, 2))
    assert len(record.adapters) == ADAPTERS_MAX
    assert record.domain(DomainId(A)).adapters == many[:ADAPTERS_MAX]
    adapters = Adapters()
    adapters.learn([domain(A, slots=2)])
    for name in many:
        adapters.sent(name, A, START_S)
    assert len(adapters._coming[A]) <= 64
    adapters.learn([])
    assert not adapters._coming
