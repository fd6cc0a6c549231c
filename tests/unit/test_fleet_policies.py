"""The simulator's baselines: what each is known to do, and the ports against their originals."""

from __future__ import annotations

import random

import pytest

from benchmarks.fleet.policies import ConsistentHash, FleetInfo, LeastLoaded, PowerOfTwo, RoundRobin
from benchmarks.fleet.policies_dynamo import ActiveRequests, DynamoKvRouter
from benchmarks.fleet.policies_ours import ChooserPolicy
from benchmarks.fleet.policies_ray import PrefixCacheAffinity, PrefixTree
from benchmarks.fleet.registry import POLICIES
from benchmarks.fleet.requests import FleetView
from benchmarks.fleet.workloads import Builder, Keys
from serve_app.types import BlockKey

FLEET = FleetInfo(4, 16, 1_000, 8_192)


def view(*in_flight: int) -> FleetView:
    return FleetView(list(in_flight), [None] * len(in_flight))


@pytest.mark.parametrize("name", POLICIES)
def test_a_replica_that_refuses_is_not_chosen_again(name: str) -> None:
    policy = POLICIES[name](FleetInfo(4, 16, 1_000, 8_192), random.Random(1))
    builder = Builder(Keys())
    for _ in range(20):
        loads = view(3, 1, 2, 0)
        request = builder.request(0.0, (), 100, 5, 0)
        for _ in range(4):
            chosen = policy.route(request, 0.0, loads)
            assert chosen is not None
            assert chosen not in loads.closed
            loads.closed.add(chosen)


def test_baselines() -> None:
    request = Builder(Keys()).request(0.0, (), 100, 5, 7)
    rng = random.Random(0)
    robin = RoundRobin(FLEET, rng)
    assert sorted(robin.route(request, 0.0, view(0, 0, 0, 0)) for _ in range(4)) == [0, 1, 2, 3]
    assert {LeastLoaded(FLEET, rng).route(request, 0.0, view(1, 0, 0, 2)) for _ in range(50)} == {1, 2}
    power = PowerOfTwo(FLEET, rng)
    assert 3 not in {power.route(request, 0.0, view(0, 1, 2, 9)) for _ in range(100)}
    hashed = ConsistentHash(FLEET, rng)
    home = hashed.route(request, 0.0, view(0, 0, 0, 0))
    moved = view(9, 9, 9, 9)
    assert hashed.route(request, 0.0, moved) == home
    moved.closed.add(home)
    assert hashed.route(request, 0.0, moved) != home


def test_ours_goes_to_the_longest_prefix() -> None:
    builder = Builder(Keys())
    request = builder.request(0.0, (), 160, 5, 0)
    for removed, chosen in ((False, 1), (True, 2)):
        policy = ChooserPolicy(FLEET, random.Random(0))
        policy.on_stored(2, b"".join(request.prompt_keys[:4]), 0.0)
        policy.on_stored(1, b"".join(request.prompt_keys[:6]), 0.0)
        if removed:
            policy.on_removed(1, b"".join(request.prompt_keys), 0.0)
        assert policy.route(request, 0.0, view(0, 3, 0, 0)) == chosen


def test_dynamo_cost_by_hand() -> None:
    """As in its documentation: 8 + 10, 5 + 5, 2 + 9 blocks, so the second, which is not the one with most hits."""
    builder = Builder(Keys())
    request = builder.request(0.0, (), 160, 5, 0)
    policy = DynamoKvRouter(FleetInfo(3, 16, 1_000, 8_192), random.Random(0))
    for replica, held, decoding in ((0, 2, 10), (1, 5, 5), (2, 8, 9)):
        policy.on_stored(replica, b"".join(request.prompt_keys[:held]), 0.0)
        running = builder.request(0.0, (), decoding * 16, 5, 0)
        policy._active[replica].add(running, 16, 100)
        policy._active[replica].prefill.done(running)
    assert policy.route(request, 0.0, view(0, 0, 0)) == 1


def test_dynamo_active_requests_come_back_to_nothing() -> None:
    builder, active = Builder(Keys()), ActiveRequests()
    first = builder.request(0.0, (), 100, 5, 0)
    second = builder.request(0.0, first.prompt_keys, 200, 5, 0)
    active.add(first, 16, 100)
    assert active.new_blocks(second.prompt_keys) == 12 - 6
    active.add(second, 16, 104)
    assert (len(active.blocks), active.partial_blocks, active.prefill.total) == (12, 2, 204)
    active.prefill.done(second)
    active.remove(first, 16)
    active.remove(second, 16)
    assert (len(active.blocks), active.partial_blocks, active.prefill.total) == (0, 0, 0)


def test_ray_policy() -> None:
    builder = Builder(Keys())
    first, other = builder.request(0.0, (), 160, 5, 0), builder.request(0.0, (), 320, 5, 0)
    fleet = FleetInfo(3, 16, 1_000, 8_192)
    one, two = (PrefixCacheAffinity(fleet, random.Random(i)) for i in range(2))
    home = one.route(first, 0.0, view(0, 0, 0))
    busy = view(*(50 if replica == home else 0 for replica in range(3)))
    assert two.route(first, 0.0, busy) == home, "one tree for all routers, and no regard to load"
    assert two.route(other, 0.0, view(0, 0, 0)) != home, "an unknown prompt goes where least text went"


@pytest.mark.parametrize("seed", range(3))
def test_prefix_tree_equals_rays_own(seed: int) -> None:
    """One character of text stands for one block."""
    from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree as RaysTree

    rng, keys = random.Random(seed), Keys()
    names = [str(i) for i in range(4)]
    theirs, ours = RaysTree(), PrefixTree([0] * 4)
    theirs.add_tenants(names, 0.0)
    letters: dict[BlockKey, str] = {}
    known: list[tuple[BlockKey, ...]] = [()]
    for step in range(500):
        start = rng.choice(known)
        prompt = (*start[: rng.randint(0, len(start))], *keys.fresh(rng.randint(1, 5)))
        if rng.random() < 0.3 and start:
            prompt = start
        known.append(prompt)
        text = "".join(letters.setdefault(key, chr(0x100 + len(letters))) for key in prompt)
        matched, tenants = theirs.prefix_match(text, names)
        length, ours_tenants = ours.match(prompt)
        assert length == len(matched)
        if length:
            assert [str(tenant) for tenant in ours_tenants] == tenants
        assert [str(tenant) for tenant in ours.smallest()] == theirs.get_smallest_tenants()
        tenant = rng.randrange(4)
        theirs.insert(text, str(tenant), float(step + 1))
        ours.insert(prompt, tenant)
        assert ours.sizes == [theirs.tenant_to_char_count[name] for name in names]
