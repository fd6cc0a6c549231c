"""The endpoint picker behind a real Envoy, with the configurations that we ship."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import grpc.aio
import httpx
import pytest

from serve_app.ports import free_ports
from serve_app.protos import ext_proc_pb2 as wire
from serve_app.service.exchange import DESTINATION
from serve_app.service.ext_proc import METHOD, SERVICE
from serve_app.service.picking import Picked
from tests.gateway import HOST, MAX_BODY_BYTES, Engine, Envoy, Listener, Script, picker, until
from tests.helpers import eventually

CHAT = "/v1/chat/completions"
ALL_BODIES = (Listener.AS_SHIPPED, Listener.BUFFERED, Listener.FULL_DUPLEX)
KILLED_AFTER, REQUESTS = 40, 100


@dataclass(frozen=True)
class Gateway:
    listing: Envoy  # envoy.yaml
    original: Envoy  # original-dst.yaml
    engine_ports: Sequence[int]
    picker_port: int


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("envoy")
    *engines, picker_port = free_ports(3)
    addresses = [f"{HOST}:{port}" for port in engines]
    listing, original = (Envoy(folder, f"{name}.yaml", addresses, picker_port) for name in ("envoy", "original-dst"))
    both = (listing, original)
    try:
        eventually(lambda: all(one.is_ready() for one in both), 20)
        yield Gateway(listing, original, engines, picker_port)
    finally:
        for one in both:
            one.stop()


@pytest.fixture
async def engines(gateway: Gateway) -> AsyncIterator[list[Engine]]:
    engines = [Engine(port) for port in gateway.engine_ports]
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine.running())
        yield engines


@pytest.fixture
def script(engines: list[Engine]) -> Script:
    """It names the second engine, then the first."""
    return Script(Picked([engines[1].address, engines[0].address], {"x-data-parallel-rank": "1"}, "long match"))


@pytest.fixture
async def counters(gateway: Gateway, script: Script) -> AsyncIterator[Counter[str]]:
    async with picker(gateway.picker_port, script) as counters:
        yield counters


def chat(length: int = 2048, stream: bool = False) -> bytes:
    """Of so many bytes."""
    frame = json.dumps({"messages": [{"role": "user", "content": ""}], "stream": stream})
    return frame.replace('"content": ""', f'"content": "{"x" * (length - len(frame))}"').encode()


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 65536):
        yield body[start : start + 65536]


def ends(script: Script) -> list[tuple[object, ...]]:
    return [told for told in script.told if told[0] == "ended"]


class TestDestination:
    @pytest.mark.parametrize("listener", ALL_BODIES)
    async def test_the_picked_endpoint_gets_the_request_as_it_was(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str], listener: Listener
    ) -> None:
        async with gateway.listing.client(listener) as client:
            for best, other in (engines, engines[::-1]):
                script.picked = script.picked._replace(endpoints=[best.address, other.address])
                for _ in range(3):
                    answer = await client.post(CHAT, content=chat(), headers={"x-session-id": "me"})
                    assert (answer.status_code, answer.headers["x-engine"]) == (200, best.address)
                    assert answer.headers["x-kvcache-reason"] == "long match"
                    asked, seen = script.asked[-1], best.seen[-1]
                    assert asked.body == seen.body == chat()
                    assert (asked.session, asked.subset) == ("me", None)
                    assert asked.request_id == seen.headers["x-request-id"]
                    assert seen.headers["x-data-parallel-rank"] == "1"
                    assert seen.headers[DESTINATION] == f"{best.address},{other.address}"
        assert counters == {"requests": 6}
        assert len(script.asked) == 6

    async def test_original_destination_takes_the_first_of_the_list(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str]
    ) -> None:
        async with Engine().running() as unlisted, gateway.original.client() as client:
            for best in (*engines, unlisted):
                script.picked = Picked([best.address, engines[0].address])
                answer = await client.post(CHAT, content=chat())
                assert (answer.status_code, answer.headers["x-engine"]) == (200, best.address)
        assert counters["requests"] == 3

    @pytest.mark.parametrize("listener", ALL_BODIES)
    @pytest.mark.parametrize("gone", ["nobody listens", "unknown to Envoy"])
    async def test_the_next_of_the_list_is_tried(
        self,
        gateway: Gateway,
        engines: list[Engine],
        script: Script,
        counters: Counter[str],
        listener: Listener,
        gone: str,
    ) -> None:
        if gone == "nobody listens":
            await engines[1].stop()
        else:
            script.picked = Picked([f"{HOST}:9", engines[0].address])
        async with gateway.listing.client(listener) as client:
            answers = [await client.post(CHAT, content=chat()) for _ in range(4)]
        assert [(one.status_code, one.headers.get("x-engine")) for one in answers] == [(200, engines[0].address)] * 4
        assert engines[0].seen[-1].body == chat()
        assert counters["served_by_another"] == 4

    async def test_a_subset_is_obeyed(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str]
    ) -> None:
        script.picked = Picked([engines[0].address, engines[1].address])
        async with gateway.listing.client(Listener.SUBSET) as client:
            answer = await client.post(CHAT, content=chat())
            assert script.asked[-1].subset == [engines[1].address]
            assert engines[1].seen[-1].headers[DESTINATION] == answer.headers["x-engine"] == engines[1].address

            script.picked = Picked([engines[0].address])
            assert (await client.post(CHAT, content=chat())).status_code == 503

    async def test_an_empty_subset_is_nobody(self, gateway: Gateway, script: Script, counters: Counter[str]) -> None:
        async with gateway.listing.client(Listener.NO_SUBSET) as client:
            assert (await client.post(CHAT, content=chat())).status_code == 503
        assert not script.asked

    @pytest.mark.parametrize("listener", ALL_BODIES)
    async def test_no_endpoint_is_known(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str], listener: Listener
    ) -> None:
        script.picked = Picked(())
        async with gateway.listing.client(listener) as client:
            for answer in (await client.post(CHAT, content=chat()), await client.get("/v1/models")):
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "no_endpoint"
        assert counters["no_endpoint"] == 2
        assert not any(engine.seen for engine in engines)
        await until(lambda: len(ends(script)) == 2)

    @pytest.mark.parametrize("name", ["listing", "original"])
    async def test_a_client_cannot_name_an_endpoint(
        self, gateway: Gateway, engines: list[Engine], script: Script, name: str
    ) -> None:
        envoy: Envoy = getattr(gateway, name)
        async with Engine().running() as other, envoy.client() as client:
            forged = {DESTINATION: other.address}
            async with picker(gateway.picker_port, script):
                for request in (
                    client.build_request("POST", CHAT, content=chat(), headers=forged),
                    client.build_request("GET", "/v1/models", headers=forged),
                ):
                    answer = await client.send(request)
                    assert answer.headers["x-engine"] == engines[1].address
                    assert engines[1].seen[-1].headers[DESTINATION] == ",".join(script.picked.endpoints)
            for _ in range(4):  # nobody is asked now
                assert (await client.post(CHAT, content=chat(), headers=forged)).status_code == 200
            assert not other.seen

    async def test_priorities_are_passed_on(
        self, gateway: Gateway, engines: list[Engine], counters: Counter[str]
    ) -> None:
        named = {"x-gateway-inference-objective": "batch", "x-gateway-inference-fairness-id": "team-a"}
        async with gateway.listing.client() as client:
            await client.post(CHAT, content=chat(), headers=named)
        assert named.items() <= dict(engines[1].seen[-1].headers).items()


class TestBodies:
    @pytest.mark.parametrize("listener", ALL_BODIES)
    @pytest.mark.parametrize("pieces", [False, True])
    async def test_a_long_body_is_scored(
        self,
        gateway: Gateway,
        engines: list[Engine],
        script: Script,
        counters: Counter[str],
        listener: Listener,
        pieces: bool,
    ) -> None:
        body = chat(256 * 1024)
        async with gateway.listing.client(listener) as client:
            answer = await client.post(CHAT, content=in_pieces(body) if pieces else body)
        assert answer.headers["x-engine"] == engines[1].address
        assert script.asked[-1].body == engines[1].seen[-1].body == body

    @pytest.mark.parametrize("listener", [Listener.AS_SHIPPED, Listener.FULL_DUPLEX])
    @pytest.mark.parametrize("pieces", [False, True])
    async def test_a_body_over_the_cap_is_passed_on_unscored(
        self,
        gateway: Gateway,
        engines: list[Engine],
        script: Script,
        counters: Counter[str],
        listener: Listener,
        pieces: bool,
    ) -> None:
        body = chat(3 * MAX_BODY_BYTES)
        async with gateway.listing.client(listener) as client:
            answer = await client.post(CHAT, content=in_pieces(body) if pieces else body)
        assert answer.headers["x-engine"] == engines[1].address
        assert engines[1].seen[-1].body == body
        assert [asked.body for asked in script.asked] == [None]
        assert counters["body_too_long"] == 1

    @pytest.mark.parametrize("listener", ALL_BODIES)
    async def test_what_makes_no_tokens_is_not_looked_at(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str], listener: Listener
    ) -> None:
        async with gateway.listing.client(listener) as client:
            answers = [await client.get("/v1/models"), await client.post("/tokenize", content=chat(100_000))]
        assert [one.headers["x-engine"] for one in answers] == [engines[1].address] * 2
        assert answers[1].json()["bytes"] == 100_000
        assert [asked.body for asked in script.asked] == [None, None]
        await until(lambda: len(ends(script)) == 2)
        assert [told[2:] for told in script.told] == [(None, None)] * 2

    async def test_an_envoy_that_sends_no_body(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str]
    ) -> None:
        async with gateway.listing.client(Listener.BODY_NOT_SENT) as client:
            answer = await client.post(CHAT, content=chat(stream=True))
        assert answer.headers["x-engine"] == engines[1].address
        assert script.asked[-1].body is None
        assert counters["body_not_sent"] == 1
        await until(lambda: ends(script) != [])
        assert ends(script)[0][2:] == (70, 64)  # the answer was asked for


class TestAnswers:
    @pytest.mark.parametrize("listener", ALL_BODIES)
    async def test_a_stream_is_watched_and_not_held_back(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str], listener: Listener
    ) -> None:
        engines[1].wait_s = 0.2
        async with (
            gateway.listing.client(listener) as client,
            client.stream("POST", CHAT, content=chat(stream=True)) as answer,
        ):
            lines = answer.aiter_lines()
            assert "delta" in await anext(lines)
            started_s = time.monotonic()
            assert [told[0] for told in script.told] == ["first_token"]
            rest = [line async for line in lines]
        assert time.monotonic() - started_s > 0.6
        assert rest[-2:] == ["data: [DONE]", ""]
        await until(lambda: len(script.told) == 2)
        request_id = script.asked[0].request_id
        assert script.told == [("first_token", request_id), ("ended", request_id, 70, 64)]
        assert not counters["cut_off"]

    @pytest.mark.parametrize("listener", ALL_BODIES)
    async def test_an_answer_in_one_piece(
        self, gateway: Gateway, script: Script, counters: Counter[str], listener: Listener
    ) -> None:
        async with gateway.listing.client(listener) as client:
            assert (await client.post(CHAT, content=chat())).json()["usage"]["prompt_tokens"] == 70
        await until(lambda: len(script.told) == 2)
        assert [(told[0], *told[2:]) for told in script.told] == [("first_token",), ("ended", 70, 64)]

    @pytest.mark.parametrize("listener", ALL_BODIES)
    async def test_a_client_that_hangs_up(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str], listener: Listener
    ) -> None:
        engines[1].wait_s = 30
        async with (
            gateway.listing.client(listener) as client,
            client.stream("POST", CHAT, content=chat(stream=True)) as answer,
        ):
            await anext(answer.aiter_lines())
        await until(lambda: ends(script) != [])
        script.wait_s = 30  # and one that does not wait for the choice
        async with gateway.listing.client(Listener.FULL_DUPLEX) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, content=chat(), timeout=0.3)
        await until(lambda: len(ends(script)) == 2)
        assert [told[2:] for told in ends(script)] == [(None, None)] * 2
        assert [told[1] for told in ends(script)] == [asked.request_id for asked in script.asked]
        assert counters["cut_off"] == 2

    @pytest.mark.parametrize("listener", ALL_BODIES)
    async def test_an_engine_that_fails(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str], listener: Listener
    ) -> None:
        engines[1].status = 500
        async with gateway.listing.client(listener) as client:
            assert (await client.post(CHAT, content=chat())).status_code == 500
        await until(lambda: script.told != [])
        assert script.told == [("ended", script.asked[0].request_id, None, None)]


class TestTrouble:
    @pytest.mark.parametrize("name", ["listing", "original"])
    async def test_a_picker_that_is_killed(self, gateway: Gateway, engines: list[Engine], name: str) -> None:
        envoy: Envoy = getattr(gateway, name)
        async with picker_process(gateway, engines[1]) as process, envoy.client() as client:
            scored: list[bool] = []

            async def send(numbers: Iterator[int]) -> None:
                for number in numbers:
                    if number == KILLED_AFTER:
                        process.kill()
                    answer = await client.post(CHAT, content=chat(stream=number % 2 == 0))
                    assert answer.status_code == 200
                    assert "usage" in answer.text
                    scored.append("x-kvcache-reason" in answer.headers)

            numbers = iter(range(REQUESTS))
            await asyncio.gather(*(send(numbers) for _ in range(4)))
        assert len(scored) == REQUESTS
        assert KILLED_AFTER - 4 <= sum(scored) <= KILLED_AFTER
        assert len(engines[0].seen) >= (REQUESTS - KILLED_AFTER) // 2 - 4  # in turns, once nobody is asked

    @pytest.mark.parametrize("name", ["listing", "original"])
    async def test_a_picker_that_is_stopped(self, gateway: Gateway, engines: list[Engine], name: str) -> None:
        envoy: Envoy = getattr(gateway, name)
        impatient = envoy.client(Listener.IMPATIENT)
        async with picker_process(gateway, engines[1]) as process, impatient as client, envoy.client() as patient:
            assert "x-kvcache-reason" in (await patient.post(CHAT, content=chat())).headers
            process.send_signal(signal.SIGSTOP)
            for _ in range(3):
                started_s = time.monotonic()
                answer = await client.post(CHAT, content=chat())
                assert answer.status_code == 200
                assert "x-kvcache-reason" not in answer.headers
                assert time.monotonic() - started_s < 5
            process.send_signal(signal.SIGCONT)
            assert "x-kvcache-reason" in (await patient.post(CHAT, content=chat())).headers

    @pytest.mark.parametrize("listener", ALL_BODIES)
    async def test_a_chooser_that_fails(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str], listener: Listener
    ) -> None:
        script.error = ValueError("on purpose")
        async with gateway.listing.client(listener) as client:
            answers = [await client.post(CHAT, content=chat()) for _ in range(4)]
        assert [one.status_code for one in answers] == [200] * 4
        assert {one.headers["x-engine"] for one in answers} == {engine.address for engine in engines}
        assert {one.body for engine in engines for one in engine.seen} == {chat()}
        assert counters["error_ValueError"] == 4
        await until(lambda: len(ends(script)) == 4)

    async def test_garbage_harms_nobody(
        self, gateway: Gateway, engines: list[Engine], script: Script, counters: Counter[str]
    ) -> None:
        end = wire.ProcessingRequest()
        end.response_body.end_of_stream = True
        async with gateway.listing.client() as client:
            for message in (b"\xff\xff\xff", b"\x12\xff\xff\xff\x7f", b"", end.SerializeToString()):
                await ask(gateway, message)
                assert (await client.post(CHAT, content=chat())).headers["x-engine"] == engines[1].address
        assert counters["error_DecodeError"] == 2
        await until(lambda: len(ends(script)) == 4)  # of the requests, and of nothing else

    async def test_trailers_end_a_body(self, gateway: Gateway, script: Script, counters: Counter[str]) -> None:
        headers, body, trailers = (wire.ProcessingRequest() for _ in range(3))
        headers.protocol_config.request_body_mode = wire.FULL_DUPLEX_STREAMED
        for key, value in ((":method", "POST"), (":path", CHAT)):
            headers.request_headers.headers.headers.add(key=key, value=value)
        body.request_body.body = b"{}"
        trailers.request_trailers.SetInParent()
        answers = await ask(gateway, *(one.SerializeToString() for one in (headers, body, trailers)))
        assert [one.WhichOneof("response") for one in answers] == [
            "request_headers",
            "request_body",
            "request_trailers",
        ]
        chunk = answers[1].request_body.response.body_mutation.streamed_response
        assert (chunk.body, chunk.end_of_stream) == (b"{}", False)
        assert script.asked[0].body == b"{}"
        named = {
            one.header.key: one.header.raw_value
            for one in answers[0].request_headers.response.header_mutation.set_headers
        }
        assert named["x-request-id"].decode() == script.asked[0].request_id != ""  # the engine has it too


async def ask(gateway: Gateway, *messages: bytes) -> list[wire.ProcessingResponse]:
    """What the picker answers on a stream of these; nothing more than that if it breaks the stream off."""
    async with grpc.aio.insecure_channel(f"{HOST}:{gateway.picker_port}") as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(messages), timeout=5)
        return [wire.ProcessingResponse.FromString(answer) async for answer in call]


@contextlib.asynccontextmanager
async def picker_process(gateway: Gateway, first: Engine) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "tests.picker_process", str(gateway.picker_port), first.address]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
