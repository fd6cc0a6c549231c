"""The simulated replica: what must hold after every step, and times that can be worked out by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from benchmarks.fleet.cache import SharedCache
from benchmarks.fleet.engine import Outcome, ReplicaConfig, Timing, What
from benchmarks.fleet.replica import Replica
from benchmarks.fleet.requests import Record
from benchmarks.fleet.workloads import Builder, Keys
from serve_app.types import CPU, GPU, BlockKey

SMALL = ReplicaConfig(kv_tokens=16 * 120, max_num_seqs=12, max_num_batched_tokens=256)


def traffic(seed: int, count: int = 150) -> Iterator[Record]:
    """Prompts that share prefixes, some longer than a step's token budget; together far more than the cache holds."""
    rng, keys = random.Random(seed), Keys()
    builder = Builder(keys)
    shared = [keys.fresh(rng.randint(3, 25)) for _ in range(6)]
    known: list[Sequence[BlockKey]] = list(shared)
    at_s = 0.0
    for _ in range(count):
        at_s += rng.expovariate(12.0)
        start = rng.choice(known)
        request = builder.request(at_s, start, len(start) * 16 + rng.randint(1, 200), rng.randint(1, 120), 0)
        known.append(request.prompt_keys)
        if len(request.prompt_keys) < 40 and rng.random() < 0.3:
            known.append((*request.prompt_keys, *request.answer_keys))
        yield Record(request)


def play(replica: Replica, records: list[Record]) -> list[Outcome]:
    for record in records:
        replica.advance(record.request.arrival_s)
        assert replica.submit(record, record.request.arrival_s)
    replica.advance(float("inf"))
    return replica.outcomes


@pytest.mark.parametrize("seed", range(5))
def test_invariants_after_every_step(seed: int) -> None:
    replica = Replica(0, SMALL)
    records = list(traffic(seed))
    waiting = list(records)
    believed: set[BlockKey] = set()
    last_s = 0.0
    while waiting or replica.has_work:
        if waiting and (not replica.has_work or waiting[0].request.arrival_s <= replica.time_s):
            record = waiting.pop(0)
            assert replica.submit(record, record.request.arrival_s)
            continue
        replica.advance(replica.time_s + 1e-9)  # one step
        assert replica.time_s > last_s or not replica._running
        last_s = replica.time_s
        cache = replica.cache
        held = {block for sequence in replica._running for block in sequence.blocks}
        assert held.isdisjoint(cache.free_order())
        assert len(held) + cache.free_blocks == cache.capacity_blocks
        assert len(replica._running) <= SMALL.max_num_seqs
        for entry in replica.log:
            assert entry.time_s <= replica.time_s
            for stored, keys in entry.events:
                assert len(set(keys)) == len(keys)
                assert believed.isdisjoint(keys) if stored else believed.issuperset(keys)
                believed = believed | set(keys) if stored else believed - set(keys)
        replica.log.clear()
        assert believed == cache.keys()
    assert replica.cache.free_blocks == replica.cache.capacity_blocks
    assert replica.preemptions > 0, "the case is meant to be tight"
    assert replica._context_tokens == 0
    for record in records:
        request = record.request
        assert record.cached_tokens <= (request.prompt_tokens - 1) // 16 * 16
        assert request.arrival_s < record.first_token_s <= record.finished_s
    assert [o.time_s for o in replica.outcomes] == sorted(o.time_s for o in replica.outcomes)
    assert sum(o.what is What.FINISHED for o in replica.outcomes) == len(records)


@pytest.mark.parametrize("cpu_tokens", [0, 16 * 300])
@pytest.mark.parametrize("seed", range(5))
def test_tight_loop_equals_single_steps(seed: int, cpu_tokens: int) -> None:
    runs = []
    for step_by_step in (False, True):
        config = ReplicaConfig(
            kv_tokens=SMALL.kv_tokens,
            max_num_seqs=12,
            max_num_batched_tokens=256,
            cpu_tokens=cpu_tokens,
            step_by_step=step_by_step,
        )
        replica = Replica(0, config)
        records = list(traffic(seed))
        play(replica, records)
        runs.append((replica, records))
    (fast, fast_records), (slow, slow_records) = runs
    assert fast.steps == slow.steps
    assert fast.decode_tokens == slow.decode_tokens
    assert fast.prefill_tokens == slow.prefill_tokens
    assert fast.time_s == pytest.approx(slow.time_s, rel=1e-9)
    assert sum(fast.work_s) == pytest.approx(sum(slow.work_s), rel=1e-6)
    assert fast.cache.free_order() == slow.cache.free_order()
    assert [(e.tier, e.events) for e in fast.log] == [(e.tier, e.events) for e in slow.log]
    for one, other in zip(fast_records, slow_records, strict=True):
        assert one.cached_tokens == other.cached_tokens
        assert one.preemptions == other.preemptions
        assert one.first_token_s == pytest.approx(other.first_token_s, rel=1e-9)
        assert one.finished_s == pytest.approx(other.finished_s, rel=1e-9)


def test_times_by_hand() -> None:
    """1,000 tokens with a budget of 600: two steps of prompt, then one token a step, whose context grows by one."""
    timing = Timing(base_s=0.01, context_s_per_token=1e-6, prefill_tokens_per_s=10_000.0)
    replica = Replica(0, ReplicaConfig(kv_tokens=16_000, max_num_batched_tokens=600, timing=timing))
    record = Record(Builder(Keys()).request(2.0, (), 1_000, 4, 0))
    play(replica, [record])
    first_s = 2.0 + 2 * 0.01 + 0.1 + (600 + 1_000) * 1e-6
    assert record.first_token_s == pytest.approx(first_s)
    assert record.finished_s == pytest.approx(first_s + 3 * 0.01 + (1_001 + 1_002 + 1_003) * 1e-6)
    assert (replica.steps, replica.prefill_tokens, replica.decode_tokens) == (5, 1_000, 3)


def test_the_last_block_of_a_known_prompt_is_computed_again() -> None:
    """vLLM computes the last token to get logits, so a prompt of 4 full blocks hits 3, and one of 65 tokens 4."""
    for tokens, cached in ((64, 48), (65, 64)):
        replica, keys = Replica(0, ReplicaConfig(kv_tokens=1_600)), Keys()
        builder = Builder(keys)
        first = builder.request(0.0, (), tokens, 1, 0)
        again = Record(builder.request(1.0, first.prompt_keys, tokens, 1, 0))
        play(replica, [Record(first), again])
        assert again.cached_tokens == cached


def test_an_answer_is_a_hit_of_the_next_turn() -> None:
    builder = Builder(Keys())
    first = builder.request(0.0, (), 100, 61, 0)  # 160 tokens are computed: 10 blocks
    second = Record(builder.request(10.0, (*first.prompt_keys, *first.answer_keys), 200, 1, 0))
    play(Replica(0, ReplicaConfig(kv_tokens=16_000)), [Record(first), second])
    assert len(first.answer_keys) == 4
    assert second.cached_tokens == 160


def test_queue_limit_refuses() -> None:
    replica = Replica(0, ReplicaConfig(kv_tokens=1_600, max_waiting=2))
    builder = Builder(Keys())
    taken = [replica.submit(Record(builder.request(0.0, (), 100, 5, 0)), 0.0) for _ in range(3)]
    assert taken == [True, True, False]
    replica.advance(0.1)
    assert replica.submit(Record(builder.request(0.1, (), 100, 5, 0)), 0.1)


def test_cpu_tier_goes_on_where_the_gpu_ends() -> None:
    replica = Replica(0, ReplicaConfig(kv_tokens=16 * 20, cpu_tokens=16 * 100))
    builder = Builder(Keys())
    first = builder.request(0.0, (), 161, 1, 0)
    others = [builder.request(1.0 + i, (), 300, 1, 0) for i in range(2)]  # push it out of the GPU
    again = Record(builder.request(9.0, first.prompt_keys, 161, 1, 0))
    play(replica, [Record(request) for request in (first, *others)] + [again])
    assert (again.cached_tokens, again.loaded_tokens) == (160, 160)
    assert {entry.tier for entry in replica.log} == {GPU, CPU}


def test_a_prompt_larger_than_the_cache_is_an_error() -> None:
    replica = Replica(0, ReplicaConfig(kv_tokens=160))
    replica.submit(Record(Builder(Keys()).request(0.0, (), 200, 1, 0)), 0.0)
    with pytest.raises(RuntimeError, match="does not fit"):
        replica.advance(1.0)


def test_oracle_replicas_share_one_cache() -> None:
    known: set[BlockKey] = set()
    replicas = [Replica(i, ReplicaConfig(), SharedCache(known)) for i in range(2)]
    builder = Builder(Keys())
    first = Record(builder.request(0.0, (), 1_000, 10, 0))
    play(replicas[0], [first])
    second = Record(builder.request(5.0, first.request.prompt_keys, 1_000, 10, 0))
    play(replicas[1], [second])
    assert second.cached_tokens == 992
