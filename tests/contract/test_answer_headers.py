"""A replica's middleware and its watch over the engine's requests: what they tell the router, and the client."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from serve_app.deployments.answer_headers import AnswerHeaders
from serve_app.deployments.engine_cores import RequestWatch, client_id
from serve_app.haproxy import UNROUTED_HEADER, UNROUTED_REASONS
from serve_app.types import Progress, request_tag

X, Y = request_tag("x"), request_tag("y")


@dataclass
class State:
    """vLLM's RequestState, as far as it is looked at."""

    external_req_id: str
    is_prefilling: bool = True


def test_a_request_is_accepted_then_prefilled_then_ended() -> None:
    watch = RequestWatch()
    state = State("chatcmpl-x")
    assert watch.look({}) == Progress()
    assert watch.look({"chatcmpl-x-1234": state}) == Progress(accepted=X)
    assert watch.look({"chatcmpl-x-1234": state}) == Progress()
    state.is_prefilling = False
    assert watch.look({"chatcmpl-x-1234": state}) == Progress(prefilled=X)
    assert watch.look({"chatcmpl-x-1234": state}) == Progress()
    assert watch.look({}, [X]) == Progress(ended=X)
    assert watch.look({}, [X]) == Progress()  # the HTTP request ends after the engine's


def test_an_abort_and_a_refusal_end_a_request_too() -> None:
    watch = RequestWatch()
    watch.look({"a": State("chatcmpl-x")})
    assert watch.look({}) == Progress(ended=X)
    assert watch.look({}, [Y]) == Progress(ended=Y)  # the engine has never seen it


def test_a_request_that_is_quicker_than_the_look() -> None:
    watch = RequestWatch()
    assert watch.look({"a": State("chatcmpl-x", is_prefilling=False)}) == Progress(accepted=X, prefilled=X)


def test_several_prompts_or_answers_are_one_request() -> None:
    watch = RequestWatch()
    states = {f"{i}": State(f"cmpl-x-{i}") for i in range(3)}
    assert watch.look(states) == Progress(accepted=X)
    states["0"].is_prefilling = False
    del states["1"]
    assert watch.look(states) == Progress()
    states["2"].is_prefilling = False
    assert watch.look(states) == Progress(prefilled=X)
    assert watch.look({}) == Progress(ended=X)


@pytest.mark.parametrize(
    ("engine_id", "expected"),
    [
        ("chatcmpl-1-2-3", "1-2-3"),
        ("cmpl-1-2-3-0", "1-2-3"),
        ("generate-tokens-1-2", "1-2"),
        ("embd-1-2", "1-2"),
        ("x", ""),
        ("", ""),
    ],
)
def test_the_client_s_id_is_found_in_the_engine_s(engine_id: str, expected: str) -> None:
    assert client_id(engine_id) == expected


def client(over: list[str], *, explain: bool = False) -> TestClient:
    async def answer(request: Request) -> Response:
        if request.url.path == "/bad":
            raise ValueError
        return JSONResponse({})

    app = Starlette(routes=[Route("/{path}", answer)])
    app.add_middleware(AnswerHeaders, name="a", ranks=None, explain=explain, over=over.append, model="m")
    return TestClient(app, raise_server_exceptions=False)


def test_every_request_that_has_ended_is_told_of() -> None:
    over: list[str] = []
    server = client(over)
    for path in ("good", "bad", "none/there"):
        server.get(f"/{path}", headers={"x-request-id": path})
    server.get("/good")
    assert over == ["good", "bad", "none/there"]


@pytest.mark.parametrize("explain", [False, True])
def test_an_answer_says_what_it_is_asked_to_say(explain: bool) -> None:
    headers = {"x-kvcache-matched": "64", "x-kvcache-reason": "prefix"}
    answer = client([], explain=explain).get("/good", headers=headers)
    said = {name: value for name, value in answer.headers.items() if name.startswith("x-kvcache")}
    assert said == {"x-kvcache-replica": "a", **(headers if explain else {})}


def test_only_our_own_reasons_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[dict[str, str]] = []
    monkeypatch.setattr("ray.util.metrics.Counter.inc", lambda _, value, tags: counted.append(tags))
    server = client([])
    for reason in (*UNROUTED_REASONS, "made up", ""):
        server.get("/good", headers={UNROUTED_HEADER: reason})
    assert [tags["reason"] for tags in counted] == list(UNROUTED_REASONS)
