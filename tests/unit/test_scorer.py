"""The Score API's answers to what cannot be scored. Ray's handles are stand-ins here; nothing is deployed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from ray.cloudpickle import dumps
from ray.exceptions import RayActorError
from starlette.requests import Request
from starlette.responses import JSONResponse

from serve_app.config import GraphArgs
from serve_app.deployments.scorer import Scorer
from serve_app.errors import PromptError
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


async def ask(body: bytes, encode: Callable[[], Any], spec: Callable[[], Any] = lambda: SPEC) -> tuple[int, str]:
    """Status and code of the answer to `body`."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    plain = Scorer.__mro__[1]  # as it is written, without the server that Serve puts around it
    scorer = plain(GraphArgs(model="m"), Handle(encode), Handle(spec))
    answer = await scorer.score(Request({"type": "http", "method": "POST", "headers": []}, receive))
    assert isinstance(answer, JSONResponse)
    error = msgspec.json.decode(bytes(answer.body))["error"]
    assert error["message"]
    return answer.status_code, error["code"]


def unused() -> list[EncodedKeys]:
    raise AssertionError("the body has been taken for a prompt")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"strategy": "x"}', b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"]
)
async def test_a_body_that_is_no_request(body: bytes) -> None:
    assert await ask(body, unused) == (400, "invalid_request")


async def test_a_body_too_nested_for_the_next_stage() -> None:
    body = b'{"prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}"
    assert await ask(body, unused) == (400, "invalid_request")


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
