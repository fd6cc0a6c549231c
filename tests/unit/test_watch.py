"""`kvcache explain`, `receipts --follow`, `top`, on what the Score API really answers of decisions that were made."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve_app.commands.watch import look, new_receipts
from tests.answering import Answering
from tests.unit.conftest import Run

COST = {"queue": 0.02, "prefill": 0.1}


def receipt(name: str, at_s: float, *, told: bool = True) -> dict[str, Any]:
    actual = {"prompt_tokens": 100, "cached_tokens": 80, "queued_s": 0.001, "prefill_s": 0.06}
    one = {
        "request_id": name,
        "at_s": at_s,
        "router": "r",
        "outcome": "hit",
        "reason": "prefix",
        "chosen": "a",
        "decision_s": 0.001,
        "prompt_tokens": 100,
        "predicted_cached_tokens": 80,
        "replicas": {
            "b": {"matched_tokens": {}, "cost_s": {"queue": 0.0, "prefill": 0.9}},
            "a": {"matched_tokens": {"gpu": 80}, "cost_s": COST},
        },
    }
    return {**one, "actual": actual} if told else one


POD = {"pod": "a", "live": True, "trust": "exact", "blocks": 5, "capacity": 9, "in_flight": 1}
SCORE = {
    "model": "m",
    "strategy": "expected_ttft",
    "prompt_tokens": 100,
    "block_size": 16,
    "scores": {"a": -0.12, "b": -0.9},
    "pods": {"a": {"score": -0.12, "matched_tokens": {"gpu": 80}, "trust": "exact", "cost_s": COST}},
}


class Graph:
    """The graph's endpoints over HTTP; it explains no choice, for it makes none."""

    def __init__(self) -> None:
        self.receipts: list[dict[str, Any]] = []
        self.is_down = False
        self.asked: list[Any] = []
        graph = self

        class Handler(Answering, BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                limit = int(query.partition("limit=")[2] or 50)
                answers: dict[str, Any] = {
                    "/kvcache/v1/receipts": graph.receipts[::-1][:limit],
                    "/kvcache/v1/pods": {"model": "m", "stale_for_s": 0.1, "pods": [POD]},
                }
                self.say(503 if graph.is_down else 200, answers[path])

            def do_POST(self) -> None:
                self.asked()
                self.say(404, {"error": {"code": "no_choices", "message": "there is only /v1/score"}})

            def do_PUT(self) -> None:
                graph.asked.append(self.asked())
                self.say(200, SCORE)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/kvcache"
        threading.Thread(target=self.server.serve_forever).start()


@pytest.fixture
def graph() -> Iterator[Graph]:
    graph = Graph()
    yield graph
    graph.server.shutdown()
    graph.server.server_close()


class TestExplain:
    @pytest.mark.parametrize("given", ["r1", "chatcmpl-r1", "cmpl-r1-0"])
    def test_why_a_request_went_there(self, run: Run, graph: Graph, given: str) -> None:
        graph.receipts = [receipt("r0", 1.0), receipt("r1", 2.0), receipt("r10", 3.0)]
        status, said = run("explain", given, "--url", graph.url)
        assert status == 0
        assert "a got it: hit, prefix 80 of 100 prompt tokens predicted from the cache" in said
        assert "the engine took 80, queued it 0.001 s and computed the rest in 0.060 s" in said
        assert said.index("gpu 80") < said.index("0.900")  # the cheapest is first
        assert json.loads(run("explain", given, "--url", graph.url, "--json")[1])["receipt"]["request_id"] == "r1"

    def test_a_request_that_nobody_knows(self, run: Run, graph: Graph) -> None:
        status, said = run("explain", "r1", "--url", graph.url)
        assert status == 1
        assert "there is no receipt of 'r1' among the last 1000" in said

    def test_where_a_request_would_go(self, run: Run, graph: Graph, tmp_path: Path) -> None:
        file = tmp_path / "body.json"
        file.write_text('{"model": "m", "prompt": "x"}')
        status, said = run("explain", "-f", str(file), "--url", graph.url)
        assert status == 0
        assert "100 prompt tokens, blocks of 16 a would cost least" in said
        assert graph.asked == [{"model": "m", "prompt": "x", "strategy": "expected_ttft"}]

    @pytest.mark.parametrize("text", ["", "[1]", "no JSON"])
    def test_a_file_that_is_no_request(self, run: Run, graph: Graph, tmp_path: Path, text: str) -> None:
        file = tmp_path / "body.json"
        file.write_text(text)
        status, said = run("explain", "-f", str(file), "--url", graph.url)
        assert status == 1
        assert "is not an OpenAI request as JSON" in said

    @pytest.mark.parametrize("arguments", [(), ("r1", "-f", "x.json")])
    def test_one_of_both_is_needed(self, run: Run, arguments: tuple[str, ...]) -> None:
        assert "give the id of a request, or -f FILE" in run("explain", *arguments)[1]


def test_new_receipts_come_once_each_and_an_outage_ends_nothing(graph: Graph) -> None:
    graph.receipts = [receipt(f"r{i}", float(i)) for i in range(5)]
    following = new_receipts(f"{graph.url}/v1/receipts", 2, period_s=0.01)
    assert [one["request_id"] for one in itertools.islice(following, 2)] == ["r3", "r4"]
    graph.receipts += [receipt("late", 1.5), receipt("r4", 9.0)]  # an older decision; an id that comes again
    graph.is_down = True
    threading.Timer(0.1, lambda: setattr(graph, "is_down", False)).start()
    assert [(one["request_id"], one["at_s"]) for one in itertools.islice(following, 2)] == [("late", 1.5), ("r4", 9.0)]


def test_top(run: Run, graph: Graph) -> None:
    graph.receipts = [receipt("r0", 1.0), receipt("r1", 2.0, told=False), {**receipt("r2", 3.0), "chosen": "b"}]
    (pod,) = look(graph.url)["pods"]
    assert (pod["recent_requests"], pod["recent_cached_share"]) == (2, 0.8)
    status, said = run("top", "--url", graph.url)
    assert status == 0
    assert "80%" in said
    assert json.loads(run("top", "--url", graph.url, "--json")[1])["recent_requests"] == 3


@pytest.mark.parametrize("arguments", [("top",), ("explain", "r1"), ("receipts", "--follow"), ("bench",)])
def test_without_a_server_it_says_how_to_start_one(run: Run, arguments: tuple[str, ...]) -> None:
    url = ("http://127.0.0.1:1",) if arguments == ("bench",) else ("--url", "http://127.0.0.1:1")
    status, said = run(*arguments, *url)
    assert status == 1
    assert "`kvcache up` starts" in said
