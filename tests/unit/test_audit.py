"""Traffic and report of `kvcache audit`; the command itself runs in tests/integration/test_quickstart.py."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.audit.probe import Compared, Skipped
from serve_app.audit.report import result
from serve_app.audit.traffic import Plan, Request, Source, generate, read_bodies, replay
from serve_app.commands.configs import QUICKSTART, load_config
from serve_app.errors import ConfigError
from serve_app.local_stack import with_kv_blocks


def drain(source: Source, answers: list[str | None]) -> list[Request]:
    """All requests, answered in turns with `answers`."""
    requests = [next(source)]
    try:
        while True:
            requests.append(source.send(answers[len(requests) % len(answers)]))
    except StopIteration:
        return requests


def test_conversations_take_turns_and_hold_the_answers_they_got() -> None:
    requests = drain(generate("m", Plan(count=300)), ["It is so.", "It is not.", None])
    assert len(requests) == 300
    for request in requests:
        assert request.body["model"] == "m"
        roles = [message["role"] for message in request.body.get("messages", [])]
        assert roles[2::2] == ["assistant"] * len(roles[2::2])
        assert roles[:1] + roles[1::2] == ["system"] * len(roles[:1]) + ["user"] * len(roles[1::2])
    said = {m["content"] for r in requests for m in r.body.get("messages", []) if m["role"] == "assistant"}
    assert said == {"It is so.", "It is not."}


def test_traffic_has_all_that_makes_caches_hard_to_predict() -> None:
    requests = drain(generate("m", Plan(count=300)), ["It is so."])
    kinds = Counter(request.kind for request in requests)
    assert set(kinds) == {"first", "next", "repeat", "branch", "salted", "completion"}
    bodies = [json.dumps(request.body.get("messages", request.body.get("prompt"))) for request in requests]
    for i, request in enumerate(requests):
        if request.kind == "repeat":
            assert bodies[i] in bodies[:i]
    systems = Counter(r.body["messages"][0]["content"] for r in requests if r.kind == "first")
    assert max(systems.values()) > 1  # shared
    assert len(systems) > 3  # and many


def test_a_seed_makes_the_same_traffic_and_another_one_shares_nothing_with_it() -> None:
    one, again, other = (drain(generate("m", Plan(count=50, seed=seed)), ["Yes."]) for seed in (1, 1, 2))
    assert one == again
    first, second = ({r.body["messages"][0]["content"] for r in some if "messages" in r.body} for some in (one, other))
    assert not first & second


def test_a_file_of_requests_is_replayed_in_order(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    chat: dict[str, Any] = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}
    batch = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 2]}}
    path.write_text(f"{json.dumps(chat | {'stream': True, 'stream_options': {}})}\n\n{json.dumps(batch)}\n")
    requests = drain(replay(read_bodies(path), "served"), ["ignored"])
    assert [request.body for request in requests] == [chat, {"model": "served", "prompt": [1, 2]}]


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"model": "a"}', '{"body": {}}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(f'{{"prompt": "hi"}}\n{line}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_bodies(path)


def compared(number: int, predicted: int, actual: int, **more: Any) -> Compared:
    one = Compared(
        number=number,
        kind="next",
        conversation="c",
        replica="a",
        block_size=32,
        predicted={"gpu": predicted},
        predicted_tokens=predicted,
        actual_tokens=actual,
        error_blocks=(predicted - actual) // 32,
        prompt_tokens=400,
        scored_prompt_tokens=400,
        best_tokens=predicted,
        earlier_tokens=0,
        since_answer_s=0.001,
        answered_s=1.0,
    )
    return replace(one, **more)


def test_the_report_counts_by_group_and_explains_misses() -> None:
    right = [compared(i, 320, 320) for i in range(6)]
    near = replace(compared(6, 320, 288, replica="b"), predicted={"gpu": 288, "cpu": 32})
    over = compared(7, 320, 0, replica="b", earlier_tokens=390)
    under = compared(8, 0, 320, since_answer_s=1.0, earlier_tokens=300)
    misread = compared(9, 0, 320, scored_prompt_tokens=399)
    summary = result([*right, near, over, under, misread], [Skipped(10, "next", "gateway: status 500")])
    assert (summary["requests"], summary["exact"], summary["within_one_block"]) == (10, 0.6, 0.7)
    assert (summary["over_predicted"], summary["under_predicted"]) == (2, 2)
    assert summary["error_blocks"] == {"p0": -10, "p1": -10, "p5": -10, "p50": 0, "p95": 10, "p99": 10, "p100": 10}
    assert summary["groups"]["replica"]["b"]["within_one_block"] == 0.5
    assert summary["groups"]["tiers"]["gpu + cpu"]["requests"] == 1
    assert summary["groups"]["tiers"]["none"]["under_predicted"] == 2
    assert {group: some["requests"] for group, some in summary["groups"]["since_last_answer"].items()} == {
        "under 5 ms": 9,
        "100 ms or more": 1,
    }
    assert [miss["number"] for miss in summary["misses"]] == [7, 8, 9]
    assert "1000 ms after" in summary["misses"][1]["reason"]
    assert "399" in summary["misses"][2]["reason"]
    assert summary["skipped"] == {"gateway: status 500": 1}
    assert summary["traffic"]["evicted"] == 1
    assert summary["traffic"]["into_answers"] == 1


def test_nothing_compared_is_not_a_success() -> None:
    assert "within_one_block" not in result([], [Skipped(0, "next", "gateway: status 404")])


def test_pressure_is_put_into_every_engine_of_the_config_and_nothing_else() -> None:
    config = load_config(QUICKSTART)
    roomy, tight = (with_kv_blocks(config, blocks)["applications"][1]["args"]["llm"] for blocks in (288, 128))
    engine = config["applications"][1]["args"]["llm"]["engine_kwargs"]
    assert roomy["engine_kwargs"] == engine | {"num_gpu_blocks_override": 288}
    assert tight["engine_kwargs"] == engine | {"num_gpu_blocks_override": 128, "max_model_len": 127 * 32}
    assert "num_gpu_blocks_override" not in engine
    with pytest.raises(ConfigError):
        with_kv_blocks({"applications": [{"import_path": "ray.serve.llm:build_openai_app"}]}, 288)
