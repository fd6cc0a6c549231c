"""`kvcache bench` against small real HTTP servers: one that caches prefixes, and one that does not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serve_app.bench import Load, compare
from serve_app.errors import ConfigError
from tests.answering import Answering
from tests.unit.conftest import Run

LOAD = Load(conversations=3, turns=3, tokens=100, seed=7)


class OpenAI:
    """Streams three words. Its prompt tokens are characters; of those that it has seen before, none takes time."""

    def __init__(self, *, caches: bool, tells: bool = True, fails: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        seen: list[str] = []
        api = self

        class Handler(Answering, BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(b'{"data": [{"id": "m"}]}')

            def do_POST(self) -> None:
                body = self.asked()
                api.bodies.append(body)
                api.keys.add(self.headers["authorization"])
                if len(api.bodies) <= fails:
                    self.send_error(500, "no")
                    return
                prompt = json.dumps(body["messages"])[:-1]
                held = max((len(one) for one in seen if prompt.startswith(one)), default=0) if caches else 0
                time.sleep((len(prompt) - held) * 1e-4)
                seen.append(prompt)
                usage: dict[str, Any] = {"prompt_tokens": len(prompt)}
                if tells:
                    usage["prompt_tokens_details"] = {"cached_tokens": held}
                chunks = [{"choices": [{"delta": {"content": word}}]} for word in ("yes ", "and ", "no")]
                lines = [f"data: {json.dumps(one)}\n\n" for one in (*chunks, {"choices": [], "usage": usage})]
                self.answer("".join([*lines, "data: [DONE]\n\n"]).encode(), kind="text/event-stream")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def plain() -> Iterator[OpenAI]:
    api = OpenAI(caches=False)
    yield api
    api.stop()


@pytest.fixture
def caching() -> Iterator[OpenAI]:
    api = OpenAI(caches=True)
    yield api
    api.stop()


def test_two_apis_get_the_same_and_are_told_apart(plain: OpenAI, caching: OpenAI) -> None:
    first, second = compare([plain.url, f"{caching.url}/v1/"], "", "secret", LOAD)
    assert len(first.ttft_s) == len(second.ttft_s) == LOAD.requests
    assert sorted(map(json.dumps, plain.bodies)) == sorted(map(json.dumps, caching.bodies))
    assert plain.keys == {"Bearer secret"}
    assert first.summary()["cached_share"] == 0.0
    assert second.summary()["cached_share"] > 0.5  # two of three turns
    assert {body["model"] for body in plain.bodies} == {"m"}


def test_no_conversation_begins_like_another(plain: OpenAI) -> None:
    compare([plain.url], "m", "", LOAD)
    compare([plain.url], "m", "", Load(3, 1, 100, seed=8))
    beginnings = {body["messages"][0]["content"] for body in plain.bodies}
    assert len({text[:20] for text in beginnings}) == 6
    assert all(300 < len(text) <= 400 for text in beginnings)  # 100 tokens


def test_the_table_says_what_is_not_told(run: Run) -> None:
    api = OpenAI(caches=True, tells=False)
    status, said = run("bench", api.url, "--conversations", "1", "--turns", "1", "--tokens", "16")
    api.stop()
    assert status == 0
    assert "not told" in said
    assert "--enable-prompt-tokens-details" in said


def test_requests_that_fail_are_counted_and_named(run: Run) -> None:
    api = OpenAI(caches=True, fails=1)
    status, said = run("bench", api.url, "--conversations", "1", "--turns", "3", "--tokens", "16")
    api.stop()
    assert status == 1
    assert f"1 requests to {api.url} failed, the first one: 500" in said


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no-url", ""])
def test_nobody_is_there(url: str) -> None:
    with pytest.raises(ConfigError, match="`kvcache up` starts one"):
        compare([url], "", "", LOAD)
