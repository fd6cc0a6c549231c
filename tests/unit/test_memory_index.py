"""What only the in-memory index has: liveness, bits of domains, and the cap."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.index.memory import MemoryIndex
from serve_app.types import CPU, GPU, LMCACHE, DomainId, Epoch, PodId, Tier
from tests.helpers import SPEC, keys, pod, shared

A, B = PodId("a"), PodId("b")
E1 = Epoch(1)


def test_a_domain_without_a_lease_matches_nothing_and_keeps_its_blocks() -> None:
    index = MemoryIndex()
    index.join(pod("a"))
    index.add(DomainId("a"), E1, GPU, keys(1))
    index.set_live(DomainId("a"), False)
    assert index.match(keys(1)) == {}
    assert index.match(keys(1), [A])[A].total_tokens == 0
    index.set_live(DomainId("a"), True)
    assert index.match(keys(1))[A].total_tokens == 4


def test_registering_a_domain_again_under_its_epoch_keeps_its_blocks() -> None:
    index = MemoryIndex()
    index.join(pod("a"))
    index.add(DomainId("a"), E1, GPU, keys(1))
    index.join(pod("a"))
    assert index.match(keys(1))[A].total_tokens == 4


def test_what_a_departed_domain_held_is_gone_and_its_bit_is_used_again() -> None:
    index = MemoryIndex()
    for name in ("a", "b"):
        index.join(pod(name))
    index.add(DomainId("a"), E1, GPU, keys(*range(50_000)))
    index.add(DomainId("b"), E1, GPU, keys(*range(10)))
    index.leave(DomainId("a"), E1)
    assert index.block_counts() == {GPU: 10}
    for epoch in range(1, 200):
        index.join(pod("a", epoch))
        index.add(DomainId("a"), Epoch(epoch), GPU, keys(epoch))
        assert index.match(keys(epoch - 1))[A].total_tokens == 0
        assert index.match(keys(epoch))[A].total_tokens == 4
        assert index.match(keys(*range(20)))[B].total_tokens == 40
    assert max(member.bit for member in index._members.values()) == 1


def test_any_number_of_domains() -> None:
    """A mask has as many words as it takes; some tiers hold blocks of the later domains only."""
    index = MemoryIndex(tier_order=(GPU, CPU))
    names = [f"p{i}" for i in range(150)]
    for i, name in enumerate(names):
        index.join(pod(name))
        index.add(DomainId(name), E1, GPU, keys(*range(i)))
        if i in (3, 140):
            index.add(DomainId(name), E1, CPU, keys(*range(200)))
    for found in (index.match(keys(*range(200))), index.match(keys(*range(200)), count_hits=True)):
        for i, name in enumerate(names):
            match = found[PodId(name)]
            assert match.tokens.get(GPU, 0) == i * 4
            assert match.tokens.get(CPU, 0) == ((200 - i) * 4 if i in (3, 140) else 0)
            assert match.hit_blocks == (200 if i in (3, 140) else i)
    for name in names[:100]:
        index.leave(DomainId(name), E1)
    assert {pod: match.tokens.get(GPU, 0) for pod, match in index.match(keys(*range(200))).items()} == {
        PodId(f"p{i}"): i * 4 for i in range(100, 150)
    }


def test_the_cap_evicts_the_oldest_and_counts() -> None:
    index = MemoryIndex(max_blocks=1000)
    index.join(pod("a"))
    for start in range(0, 3000, 100):
        index.add(DomainId("a"), E1, GPU, keys(*range(start, start + 100)))
    (held,) = index.block_counts().values()
    assert held <= 1000
    assert index.evicted_blocks == 3000 - held
    assert index.match(keys(2999))[A].total_tokens == 4
    assert index.match(keys(0))[A].total_tokens == 0


names = st.sampled_from(["a", "b", "c"])
some_keys = st.lists(st.integers(0, 12), max_size=8)
operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "remove"]), names, st.sampled_from([GPU, CPU]), some_keys),
        st.tuples(st.sampled_from(["clear", "leave", "join", "down", "up"]), names),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(operations, some_keys)
def test_equals_a_plain_model(history: list[tuple[Any, ...]], prompt: list[int]) -> None:
    """Against sets of blocks, with the matching rule written out: tier after tier, each going on from the last."""
    index = MemoryIndex(tier_order=(GPU, CPU))
    model: dict[str, dict[Tier, set[int]]] = {}
    epochs = dict.fromkeys("abc", 0)
    down: set[str] = set()
    for operation, name, *rest in history:
        domain, epoch = DomainId(name), Epoch(epochs[name])
        match operation:
            case "join":
                epochs[name] += 1
                model[name] = {GPU: set(), CPU: set()}
                down.discard(name)
                index.join(pod(name, epochs[name]))
            case "leave":
                model.pop(name, None)
                index.leave(domain, epoch)
            case "clear":
                if name in model:
                    model[name] = {GPU: set(), CPU: set()}
                index.clear(domain, epoch)
            case "down":
                down.add(name)
                index.set_live(domain, False)
            case "up":
                down.discard(name)
                index.set_live(domain, True)
            case "add" | "remove":
                tier, numbers = rest
                if name in model:
                    blocks = model[name][tier]
                    (blocks.update if operation == "add" else blocks.difference_update)(numbers)
                change = index.add if operation == "add" else index.remove
                change(domain, epoch, tier, keys(*numbers))
        down &= model.keys()

    found = index.match(keys(*prompt), count_hits=True)
    assert found.keys() == {name for name in model if name not in down}
    for name, match in found.items():
        start = 0
        for tier in (GPU, CPU):
            end = start
            while end < len(prompt) and prompt[end] in model[name][tier]:
                end += 1
            assert match.tokens.get(tier, 0) == (end - start) * 4
            start = end
        held = model[name][GPU] | model[name][CPU]
        assert match.hit_blocks == sum(number in held for number in prompt)


NODE = DomainId("node")
prompts = st.lists(st.integers(0, 12), max_size=8, unique=True)


@settings(max_examples=300, deadline=None)
@given(
    held=st.fixed_dictionaries({(name, tier): some_keys for name in "ab" for tier in (GPU, CPU)}),
    node=some_keys,
    other=some_keys,
    prompt=prompts,
    node_live=st.booleans(),
)
def test_a_pod_loads_whole_chunks_from_the_beginning_of_the_prompt(
    held: dict[tuple[str, Tier], list[int]], node: list[int], other: list[int], prompt: list[int], node_live: bool
) -> None:
    """a is attached to `node`, b to nothing: vLLM's rule is max(own prefix, LMCache's prefix in whole chunks)."""
    index = MemoryIndex(tier_order=(GPU, CPU, LMCACHE))
    index.join(pod("a", attached=("node", "elsewhere")))
    index.join(pod("b"))
    index.join(shared("node"))
    index.join(shared("other", chunk_size=4))
    for (name, tier), numbers in held.items():
        index.add(DomainId(name), E1, tier, keys(*numbers))
    index.add(NODE, E1, LMCACHE, keys(*node))
    index.add(DomainId("other"), E1, LMCACHE, keys(*other))
    index.set_live(NODE, node_live)

    found = index.match(keys(*prompt), count_hits=True)
    plain = index.match(keys(*prompt))
    assert found.keys() == plain.keys() == {A, B}
    for name in (A, B):
        gpu = prefix(prompt, held[name, GPU])
        own = gpu + prefix(prompt[gpu:], held[name, CPU])
        chunks = prefix(prompt, node) // 2 * 2 if name == A and node_live else 0
        expected = {GPU: gpu, CPU: own - gpu, LMCACHE: max(0, chunks - own)}
        assert found[name].tokens == {tier: count * 4 for tier, count in expected.items() if count}
        assert plain[name].tokens == found[name].tokens
        anywhere = {*held[name, GPU], *held[name, CPU], *(node if name == A and node_live else ())}
        assert found[name].hit_blocks == sum(number in anywhere for number in prompt)


def prefix(prompt: list[int], numbers: list[int]) -> int:
    return next((i for i, number in enumerate(prompt) if number not in numbers), len(prompt))


def test_a_pod_that_attaches_later_and_a_node_that_comes_back() -> None:
    index = MemoryIndex(tier_order=(GPU, LMCACHE))
    index.join(shared("node"))
    index.add(NODE, E1, LMCACHE, keys(1, 2, 3, 4))
    assert index.match(keys(1, 2, 3)) == {}  # nobody can load it
    index.join(pod("a", attached=("node",)))
    assert index.match(keys(1, 2, 3, 4, 5))[A].tokens == {LMCACHE: 16}
    assert index.match(keys(1, 2, 3))[A].tokens == {LMCACHE: 8}  # the second chunk is longer than the prompt
    index.join(shared("node", epoch=2))
    assert index.match(keys(1, 2, 3))[A].tokens == {}
    index.add(NODE, Epoch(2), LMCACHE, keys(1, 2))
    assert index.match(keys(1, 2, 3))[A].tokens == {LMCACHE: 8}
    index.leave(NODE, Epoch(2))
    assert index.match(keys(1, 2, 3))[A].tokens == {}


def test_a_shared_domain_of_other_blocks_does_not_change_what_a_pods_blocks_count() -> None:
    """Of an earlier deployment, say: LMCache's server is still there, the engines have another block size now."""
    index = MemoryIndex(tier_order=(GPU, LMCACHE))
    index.join(pod("a", attached=("node",)))
    index.add(DomainId("a"), E1, GPU, keys(1, 2))
    index.join(replace(shared("node"), spec=replace(SPEC, block_size=16)))
    assert index.match(keys(1, 2))[A].tokens == {GPU: 8}


def test_pods_of_two_block_sizes_are_measured_by_the_first_ones() -> None:
    """While a deployment is replaced by one with larger blocks. Keys are of one size and say nothing of others."""
    index = MemoryIndex(tier_order=(GPU,))
    index.join(pod("a"))
    index.add(DomainId("a"), E1, GPU, keys(1, 2))
    index.join(replace(pod("b"), spec=replace(SPEC, block_size=32)))
    assert index.match(keys(1, 2))[A].tokens == {GPU: 8}
    assert index.spec == SPEC
    index.leave(DomainId("a"), E1)
    assert index.spec == replace(SPEC, block_size=32)


def test_nobody_to_ask_for() -> None:
    index = MemoryIndex(tier_order=(GPU, CPU))
    index.join(pod("a"))
    for tier in (GPU, CPU):
        index.add(DomainId("a"), E1, tier, keys(1))
    assert index.match(keys(1), []) == {}
    assert index.match(keys(1), [B])[B].total_tokens == 0
    index.set_live(DomainId("a"), False)
    assert index.match(keys(1), count_hits=True) == {}


def test_which_pod_holds_which_block() -> None:
    """Each pod is asked for one block, in any tier; with more domains than a word of a mask has bits too."""
    for count in (3, 150):
        index = MemoryIndex(tier_order=(GPU, CPU))
        pods = [PodId(f"p{i}") for i in range(count)]
        for i, name in enumerate(pods):
            index.join(pod(name))
            index.add(DomainId(name), E1, CPU if i % 3 == 1 else GPU, keys(i))
        assert index.held(pods, keys(*range(count))) == [True] * count
        assert index.held(pods, keys(*range(1, count), 0)) == [False] * count
        index.set_live(DomainId("p1"), False)
        assert index.held(pods[:3], keys(0, 1, 2)) == [True, False, True]
    assert index.held([PodId("unknown")], keys(0)) == [False]
    assert index.held([], b"") == []
