"""What `make bench-real` sends, and the share of it that an oracle would have cached."""

from __future__ import annotations

from itertools import chain

import pytest

from benchmarks.real.workload import BLOCK_SIZE, Name, Scenario, Size, oracle, scenarios
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import EngineSpec, ModelId

MODEL = "model"
SIZE = Size(
    documents=3, document_tokens=100, turns=4, zipf_documents=6, zipf_chains=2, zipf_asks=5, lmcache_documents=5
)


@pytest.fixture(scope="module")
def made(model_path: str) -> dict[Name, Scenario]:
    return {scenario.name: scenario for scenario in scenarios(SIZE, model_path)}


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("name", Name)
def test_oracle_is_the_longest_prefix_of_any_earlier_prompt(
    name: Name, made: dict[Name, Scenario], model_path: str
) -> None:
    encoder = PromptEncoder(EngineSpec(ModelId(MODEL), BLOCK_SIZE, model_path), PrefixStore(1 << 28))
    earlier: list[list[int]] = []
    prompt_tokens = cached_tokens = 0
    for ask in chain.from_iterable(made[name].asks()):
        (encoded,) = encoder.encode({"messages": ask.messages})
        tokens = list(encoded.token_ids())
        if ask.engine is None:
            longest = max((common(tokens, old) for old in earlier), default=0)
            prompt_tokens += len(tokens)
            cached_tokens += min(longest, len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE
        earlier.append(tokens)
    assert oracle(made[name], model_path, MODEL) == (prompt_tokens, cached_tokens)
    assert 0 < cached_tokens < prompt_tokens


def test_no_scenario_has_a_document_of_another(made: dict[Name, Scenario]) -> None:
    documents = [{ask.messages[0]["content"] for asks in scenario.asks() for ask in asks} for scenario in made.values()]
    assert len(set().union(*documents)) == sum(map(len, documents))


def test_bypass_sends_every_first_turn_past_the_router_to_engines_in_turn(made: dict[Name, Scenario]) -> None:
    first, rest = made[Name.BYPASS].phases
    assert [one.asks[0].engine for one in first] == [0, 1, 0]
    assert all(ask.engine is None for one in rest for ask in one.asks)
    assert {ask.document for one in rest for ask in one.asks} == {0, 1, 2}


def test_oracle_has_lost_what_is_lost_half_way(made: dict[Name, Scenario], model_path: str) -> None:
    reset = made[Name.ENGINE_RESET]
    whole, (_, one), (_, both) = (oracle(reset, model_path, MODEL, lost) for lost in ((), {0}, {0, 1}))
    prompt_tokens = whole[0]
    assert oracle(reset, model_path, MODEL, {0, 1, 2})[0] == prompt_tokens
    assert whole[1] > one > both
