"""The Score API's answers to what cannot be scored. Ray's handles are stand-ins here; nothing is deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.cloudpickle import dumps
from ray.exceptions import RayActorError

from serve_app.access import hash_key
from serve_app.config import GraphArgs
from serve_app.deployments.scorer import Scorer
from serve_app.errors import PromptError
from serve_app.ports import is_loopback
from serve_app.types import EncodedKeys, EngineSpec, ModelId

SPEC = EngineSpec(ModelId("m"), 16, "tokenizer")
CHAT = b'{"messages": [{"role": "user", "content": "hi"}]}'


class Handle:
    """A DeploymentHandle whose methods all answer alike. As Serve does, it pickles what it is given."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    def __getattr__(self, method: str) -> Handle:
        return self

    async def remote(self, *arguments: Any) -> Any:
        dumps(arguments)
        return self._answer()


def failing(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def scorer_of(encode: Callable[[], Any], spec: Callable[[], Any] = lambda: SPEC, **settings: Any) -> Any:
    plain = Scorer.__mro__[1]  # as it is written, without the server that Serve puts around it
    return plain(GraphArgs(model="m", **settings), Handle(encode), Handle(spec))


async def answer_of(scorer: Any, body: bytes, key: str = "", path: str = "/v1/score") -> httpx.Response:
    transport = httpx.ASGITransport(await scorer.__serve_build_asgi_app__())
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://graph") as client:
        return await client.request("POST" if path == "/v1/score" else "GET", path, content=body, headers=headers)


async def ask(body: bytes, encode: Callable[[], Any], spec: Callable[[], Any] = lambda: SPEC) -> tuple[int, str]:
    """Status and code of the answer to `body`."""
    return told(await answer_of(scorer_of(encode, spec), body))


def told(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert error["message"]
    return answer.status_code, error["code"]


def unused() -> list[EncodedKeys]:
    raise AssertionError("the body has been taken for a prompt")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff"])
async def test_a_body_that_is_no_request(body: bytes) -> None:
    assert await ask(body, unused) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("body", "field"),
    [(b'{"strategy": "x"}', "strategy"), (b'{"pods": 1}', "pods"), (b'{"pods": ["a", 2]}', "pods[1]")],
)
async def test_a_field_that_is_wrong_is_named(body: bytes, field: str) -> None:
    answer = await answer_of(scorer_of(unused), body)
    assert told(answer) == (422, "invalid_field")
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize("levels", [64, 900, 10_000])
async def test_a_body_that_is_nested_too_deeply(levels: int) -> None:
    body = b'{"prompt": "a", "x": ' + b"[" * levels + b"]" * levels + b"}"
    assert await ask(body, unused) == (422, "body_too_deep")


async def test_a_body_that_is_too_long_or_asks_too_much() -> None:
    limits = {"body_bytes": 1000, "prompts": 2}
    for body, expected in (
        (b'{"prompt": "' + b"x" * 1000 + b'"}', (413, "body_too_long")),
        (b'{"prompt": ["a", "b", "c"]}', (422, "many_prompts")),
        (b'{"prompt": "a", "pods": ["' + b"p" * 200 + b'"]}', (422, "too_long")),
    ):
        assert told(await answer_of(scorer_of(unused, limits=limits), body)) == expected


async def test_who_asks_too_often_is_told_when_to_come_back() -> None:
    scorer = scorer_of(lambda: PromptError("bad_messages", "because"), limits={"scores_per_s": 1})
    assert (await answer_of(scorer, CHAT)).status_code == 400
    answer = await answer_of(scorer, CHAT)
    assert told(answer) == (429, "too_many_requests")
    assert answer.headers["retry-after"] == "1"


async def test_a_score_wants_the_key_of_its_salt(tmp_path: Path) -> None:
    """Without, anybody could find out which prompts of others are cached."""
    (tmp_path / "keys").write_text(f"keys: [{{name: a, sha256: {hash_key('secret')}, salts: [mine]}}]")
    scorer = scorer_of(lambda: PromptError("bad_messages", "because"), auth={"keys_file": str(tmp_path / "keys")})
    mine, others = (b'{"prompt": "a", "cache_salt": "%s"}' % salt for salt in (b"mine", b"others"))
    for key, body, status in (
        ("", mine, 401),
        ("wrong", mine, 401),
        ("secret", others, 403),
        ("secret", b'{"prompt": "a"}', 403),
        ("secret", mine, 400),
    ):
        assert (await answer_of(scorer, body, key)).status_code == status, (key, body)
    for path in ("/v1/pods", "/v1/receipts", "/v1/overview", "/v1/decisions"):
        for key, status in (("", 401), ("secret", 403)):
            assert (await answer_of(scorer, b"", key, path)).status_code == status


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("kv.example", False)],
)
def test_where_a_start_up_warning_is_due(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("reason", "status"), [("bad_messages", 400), ("tokenizer_loading", 503), ("no_tokenizer", 503)]
)
async def test_no_prompt_that_can_be_scored(reason: str, status: int) -> None:
    assert await ask(CHAT, lambda: PromptError(reason, "because")) == (status, reason)


async def test_a_stage_that_is_down() -> None:
    down = failing(RayActorError())
    assert await ask(CHAT, down) == (503, "stage_failed")
    assert await ask(CHAT, unused, spec=down) == (503, "stage_failed")


async def test_no_engine_yet() -> None:
    assert await ask(CHAT, unused, spec=lambda: None) == (503, "index_unavailable")
