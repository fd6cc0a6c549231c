"""What is read from vLLM's endpoints: answers of vLLM 0.29, and what other servers answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList

from serve_app.events.discovery import Cache, Models, Settings, parse_cache, parse_models, parse_settings
from tests.vllm_api import captured, model_list, with_labels

RANKS_0_1 = "".join(captured("metrics-idle.txt").replace('engine="0"', f'engine="{rank}"') for rank in (0, 1))


def settings(**more: Any) -> Settings:
    return parse_settings(json.loads(captured("server_info.json"))["vllm_config"] | more)


def test_the_models_of_a_real_server() -> None:
    root = json.loads(captured("models.json"))["data"][0]["root"]
    assert parse_models(captured("models.json").encode()) == Models(("smol", "smollm2"), root, (), 4096)


def test_adapters_are_what_has_a_parent() -> None:
    cards = [
        ModelCard(id="base", root="org/base", max_model_len=8192),
        ModelCard(id="tuned", root="/adapters/tuned", parent="base"),
        ModelCard(id="a", root="/adapters/a", parent="base"),
    ]
    models = parse_models(ModelList(data=cards).model_dump_json().encode())
    assert models == Models(("base",), "org/base", ("a", "tuned"), 8192)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>", "no list of models"),
        (b'{"data": {}}', "no list of models"),
        (b'{"data": []}', "no base model"),
        (model_list("m", owned_by="sglang"), "'sglang'"),
        (model_list("m", owned_by="tensorrt_llm"), "'tensorrt_llm'"),
        (b'{"data": [{"id": "m"}]}', "owned by ''"),
    ],
)
def test_lists_of_other_servers(body: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_models(body)


def test_the_cache_of_a_real_server() -> None:
    assert parse_cache(captured("metrics-idle.txt")) == ((0,), Cache(32, 160, True, "sha256"))
    assert parse_cache(captured("metrics-noprefix.txt")) == ((0,), Cache(32, 160, False, "sha256"))


@pytest.mark.parametrize(
    ("labels", "capacity"),
    [
        ({"num_gpu_blocks": 320}, 160),  # the sum of two that have 5120 tokens each
        ({"num_gpu_blocks": 321}, 0),
        ({"num_gpu_blocks": 322}, 0),  # the first has 160, so the other has 162
        ({"num_gpu_blocks": "None"}, 0),
    ],
)
def test_a_capacity_is_a_ranks_only_if_all_have_the_same(labels: dict[str, object], capacity: int) -> None:
    assert parse_cache(with_labels(RANKS_0_1, **labels)) == ((0, 1), Cache(32, capacity, True, "sha256"))


def test_a_match_unit_that_was_chosen() -> None:
    text = with_labels(captured("metrics-idle.txt"), prefix_match_unit=16, block_size=1056)
    assert parse_cache(text)[1] == Cache(1056, 160, True, "sha256", 16)


@pytest.mark.parametrize("text", ["", "sglang:num_running_reqs 1.0\n", "vllm:cache_config_info{ 1.0\n", "\0\xff"])
def test_metrics_of_other_servers(text: str) -> None:
    assert parse_cache(text) == ((0,), None)


def test_the_settings_of_a_real_server() -> None:
    told = settings()
    assert told.events is True
    assert (told.endpoint[:8], told.replay_endpoint[:8], told.topic) == ("tcp://*:", "tcp://*:", "")
    assert told.tokenizer == json.loads(captured("models.json"))["data"][0]["root"]
    assert (told.tokenizer_mode, told.revision, told.eagle, told.pooling) == ("auto", "", False, False)
    assert told.offload_chunk_blocks == 0


def test_settings_that_only_some_have() -> None:
    assert settings(kv_events_config=None).events is False
    assert settings(speculative_config={"method": "eagle3"}).eagle
    assert not settings(speculative_config={"method": "ngram"}).eagle
    assert settings(scheduler_config={"runner_type": "pooling"}).pooling
    offload = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"block_size": 128}}
    assert settings(kv_transfer_config=offload).offload_chunk_blocks == 4
    assert settings(kv_transfer_config={"kv_connector": "OffloadingConnector"}).offload_chunk_blocks == 1


@pytest.mark.parametrize("config", [{}, {"model_config": 1, "kv_events_config": [], "scheduler_config": "x"}])
def test_settings_of_another_version_are_not_told(config: dict[str, Any]) -> None:
    told = parse_settings(config)
    assert (told.tokenizer, told.endpoint, told.pooling) == ("", "", False)
    assert parse_settings({}).events is None
