"""The endpoint picker's chooser on a real service, index and fleet; and how the service finds replicas.

Kubernetes is an HTTP server that plays the endpoint slices' API, with pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve_app.client import AsyncKVCacheClient
from serve_app.ports import free_port
from serve_app.service.discovery import (
    Discovery,
    DiscoverySettings,
    KubernetesSettings,
    ready_endpoints,
    resolve,
)
from serve_app.service.pod_chooser import PodChooser
from tests.contract.score_server import PROMPT, Service, until
from tests.contract.serve_router import MODEL, TOKENS, Fleet

BODY = json.dumps(PROMPT).encode()
A, B, C = (f"10.0.0.{number}:8000" for number in (1, 2, 3))
STRANGER = "10.9.9.9:8000"  # nobody publishes for it


@pytest.fixture
async def service(redis_url: str, fleet: Fleet) -> AsyncIterator[Service]:
    """Pods a (holds 6 blocks of 10), b (2) and c (none), and one whose publisher does not say where it is."""
    for pod, holds, address in (("a", 6, A), ("b", 2, B), ("c", 0, C), ("nowhere", 9, "")):
        fleet.join_plain(pod, holds=holds, address=address)
    service = Service(redis_url)
    await service.ready(pods=4)
    yield service
    await service.close()


def chooser_of(service: Service, lease_s: float = 60.0) -> PodChooser:
    (model,) = service.server.service.models
    return PodChooser(service.server.service, model, lease_s, logging.getLogger("test"))  # type: ignore[arg-type]


@pytest.fixture
def chooser(service: Service) -> PodChooser:
    return chooser_of(service)


class TestPick:
    async def test_the_holder_is_first_and_the_others_follow(self, chooser: PodChooser) -> None:
        picked = await chooser.pick("r", "", BODY, None)
        assert picked.endpoints[0] == A
        assert set(picked.endpoints) == {A, B, C}  # and not the one that nobody can be sent to
        assert (picked.headers, picked.reason) == ({}, "prefix")

    async def test_only_whom_the_operator_allows(self, chooser: PodChooser) -> None:
        picked = await chooser.pick("r", "", BODY, [C, B])
        assert picked.endpoints == [B, C]
        assert picked.reason == "prefix"

    async def test_an_address_that_nobody_publishes_for(self, chooser: PodChooser) -> None:
        """It can be chosen when the operator names it, and holds nothing that is known."""
        assert (await chooser.pick("one", "", BODY, [STRANGER, B])).endpoints == [B, STRANGER]
        alone = await chooser.pick("two", "", BODY, [STRANGER])
        assert alone.endpoints == [STRANGER]
        assert STRANGER not in (await chooser.pick("three", "", BODY, None)).endpoints

    async def test_without_a_body_equal_pods_take_turns(self, chooser: PodChooser) -> None:
        picks = [await chooser.pick(f"r{number}", "", None, None) for number in range(3)]
        assert {pick.endpoints[0] for pick in picks} == {A, B, C}
        assert all(sorted(pick.endpoints) == [A, B, C] for pick in picks)
        assert {pick.reason for pick in picks} == {"no_body"}

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"{", "no_body"),
            (b"\xff", "no_body"),
            (b"[1]", "no_body"),
            (b"{}", "no_prompt"),
            (b'{"messages": "?"}', "bad_messages"),
        ],
    )
    async def test_a_body_that_cannot_be_read_is_balanced(self, chooser: PodChooser, body: bytes, reason: str) -> None:
        picked = await chooser.pick("r", "", body, None)
        assert set(picked.endpoints) == {A, B, C}
        assert picked.reason == reason

    async def test_the_rank_is_in_the_header_that_vllm_reads(self, redis_url: str, fleet: Fleet) -> None:
        for rank, holds in ((0, 1), (1, 5)):
            fleet.join("r", rank, holds=holds, address=A)
        service = Service(redis_url)
        await service.ready(pods=2)
        picked = await chooser_of(service).pick("r", "", BODY, None)
        assert (picked.endpoints, picked.headers) == ([A], {"x-data-parallel-rank": "1"})
        await service.close()

    async def test_without_a_replica_there_is_nobody_but_whom_the_operator_names(self, redis_url: str) -> None:
        service = Service(redis_url)
        await service.started()
        chooser = chooser_of(service)
        await until(lambda: service.server.service.models[0].decider.mirror.wait_ready(0))  # type: ignore[attr-defined]
        none = await chooser.pick("r", "", BODY, None)
        assert (none.endpoints, none.reason) == ((), "no_index")
        picks = [await chooser.pick(f"r{number}", "", BODY, [A, B]) for number in range(4)]
        assert all(sorted(pick.endpoints) == [A, B] for pick in picks)
        assert {pick.endpoints[0] for pick in picks} == {A, B}
        await service.close()


class TestLoad:
    async def in_flight(self, service: Service) -> dict[str, int]:
        async with AsyncKVCacheClient(service.url) as kv:
            return (await kv.explain(PROMPT)).in_flight

    async def test_a_pick_counts_until_it_has_ended(self, service: Service, chooser: PodChooser) -> None:
        await chooser.pick("one", "", BODY, [C])
        await chooser.pick("two", "", BODY, [C])
        chooser.first_token("one")
        assert (await self.in_flight(service))["c"] == 2
        chooser.ended("one", 40, 0)
        chooser.ended("one", 40, 0)
        chooser.ended("never-picked", None, None)
        assert (await self.in_flight(service))["c"] == 1
        chooser.ended("two", None, None)
        assert (await self.in_flight(service))["c"] == 0

    async def test_a_stream_that_is_never_seen_to_end_has_a_lease(self, service: Service) -> None:
        reservations = service.server.service.reservations
        await chooser_of(service, lease_s=0.2).pick("lost", "", BODY, [C])
        assert (len(reservations), reservations.expired) == (1, 0)
        await until(lambda: reservations.expired == 1)
        assert (await self.in_flight(service))["c"] == 0

    async def test_without_a_body_nothing_is_booked(self, service: Service, chooser: PodChooser) -> None:
        await chooser.pick("r", "", None, None)
        assert set((await self.in_flight(service)).values()) == {0}
        chooser.ended("r", None, None)


# -------------------------------------------------------------------------------------------------------- discovery


class Kubernetes:
    """`/apis/discovery.k8s.io/v1/namespaces/NAMESPACE/endpointslices` of a Service `vllm`, a slice for each page."""

    def __init__(self, account: Path) -> None:
        self.port = free_port()
        self.account = account
        (account / "token").write_text("secret\n")
        (account / "namespace").write_text("models")
        self.slices: list[Any] = []
        self.answer: Callable[[], Response] | None = None  # instead of the slices
        self.asked: list[dict[str, str]] = []

    def settings(self, **more: Any) -> KubernetesSettings:
        given = {"service": "vllm", "api": f"http://127.0.0.1:{self.port}", "account": self.account, **more}
        return KubernetesSettings.model_validate(given)

    async def endpointslices(self, request: Request) -> Response:
        query = dict(request.query_params)
        self.asked.append({**query, "namespace": request.path_params["namespace"]})
        if request.headers.get("authorization") != "Bearer secret":
            return JSONResponse({"kind": "Status", "code": 401}, 401)
        if self.answer is not None:
            return self.answer()
        assert query["labelSelector"] == "kubernetes.io/service-name=vllm"
        page = int(query.get("continue", 0))
        more = {"continue": str(page + 1)} if page + 1 < len(self.slices) else {}
        return JSONResponse({"items": self.slices[page : page + 1], "metadata": more})

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        path = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        app = Starlette(routes=[Route(path, self.endpointslices)])
        server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        yield
        server.should_exit = True
        await task


@pytest.fixture
async def kubernetes(tmp_path: Path) -> AsyncIterator[Kubernetes]:
    account = tmp_path / "account"
    account.mkdir()
    kubernetes = Kubernetes(account)
    async with kubernetes.running():
        yield kubernetes


def one_slice(*addresses: str, port: int | None = 8000, **conditions: Any) -> dict[str, Any]:
    return {
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": [{"addresses": [address], "conditions": conditions} for address in addresses],
    }


class TestReadyEndpoints:
    async def test_all_pages_and_who_is_ready(self, kubernetes: Kubernetes) -> None:
        kubernetes.slices = [
            one_slice("10.0.0.1", ready=True),
            one_slice("10.0.0.2", ready=False),
            one_slice("10.0.0.3", ready=None),  # means ready
            one_slice("10.0.0.4"),
            one_slice("fd00::5", ready=True),
            one_slice("10.0.0.6", port=None),  # all ports, so none that is known
            {"endpoints": None, "ports": None},
            {"endpoints": [{"addresses": ["10.0.0.1"]}], "ports": [{"port": 8000}]},  # in two slices
        ]
        found = await ready_endpoints(kubernetes.settings())
        assert found == ["10.0.0.1:8000", "10.0.0.3:8000", "10.0.0.4:8000", "[fd00::5]:8000"]
        assert len(kubernetes.asked) == len(kubernetes.slices)
        assert {asked["namespace"] for asked in kubernetes.asked} == {"models"}

    async def test_another_port_and_namespace(self, kubernetes: Kubernetes) -> None:
        kubernetes.slices = [one_slice("10.0.0.1", port=None)]
        assert await ready_endpoints(kubernetes.settings(port=9, namespace="others")) == ["10.0.0.1:9"]
        assert kubernetes.asked[0]["namespace"] == "others"

    async def test_nobody(self, kubernetes: Kubernetes) -> None:
        assert await ready_endpoints(kubernetes.settings()) == []


class TestDiscovery:
    @contextlib.asynccontextmanager
    async def looking(self, settings: DiscoverySettings) -> AsyncIterator[Discovery]:
        discovery = Discovery(settings)
        running = asyncio.create_task(discovery.run())
        yield discovery
        assert not running.done()
        running.cancel()

    async def test_a_list_is_there_at_once(self) -> None:
        assert Discovery(DiscoverySettings(static=(A, B))).addresses == {A, B}

    async def test_a_name(self) -> None:
        assert "127.0.0.1:8000" in await resolve("localhost:8000")
        with pytest.raises(OSError):  # noqa: PT011  # its text is the system's
            await resolve("nobody.invalid:8000")
        async with self.looking(DiscoverySettings(dns="localhost:8000")) as discovery:
            await until(lambda: "127.0.0.1:8000" in discovery.addresses)

    async def test_who_comes_and_goes_is_seen(self, kubernetes: Kubernetes) -> None:
        kubernetes.slices = [one_slice("10.0.0.1")]
        async with self.looking(DiscoverySettings(kubernetes=kubernetes.settings(), every_s=0.05)) as discovery:
            await until(lambda: discovery.addresses == {A})
            kubernetes.slices = [one_slice("10.0.0.2"), one_slice("10.0.0.3")]
            await until(lambda: discovery.addresses == {B, C})
            kubernetes.slices = []
            await until(lambda: discovery.addresses == set())

    @pytest.mark.parametrize(
        "answer",
        [
            lambda: JSONResponse({"kind": "Status", "reason": "Forbidden", "code": 403}, 403),
            lambda: JSONResponse({"kind": "Status", "code": 410}, 410),  # the continue token is too old
            lambda: Response("no JSON"),
            lambda: JSONResponse({"kind": "Status"}),
            lambda: JSONResponse({"items": [{"ports": [{"port": 8000}], "endpoints": [{}]}]}),
            lambda: JSONResponse([]),
        ],
        ids=["403", "410", "no JSON", "no items", "no addresses", "a list"],
    )
    async def test_the_former_ones_stay_when_it_fails(
        self, kubernetes: Kubernetes, answer: Callable[[], Response], caplog: pytest.LogCaptureFixture
    ) -> None:
        kubernetes.slices = [one_slice("10.0.0.1")]
        async with self.looking(DiscoverySettings(kubernetes=kubernetes.settings(), every_s=0.05)) as discovery:
            await until(lambda: discovery.addresses == {A})
            kubernetes.answer = answer
            already = len(kubernetes.asked)
            await until(lambda: "the former ones stay" in caplog.text)
            assert len(kubernetes.asked) > already
            assert discovery.addresses == {A}
            kubernetes.answer, kubernetes.slices = None, [one_slice("10.0.0.2")]
            await until(lambda: discovery.addresses == {B})

    async def test_a_token_that_is_renewed_and_an_account_that_is_not_there(
        self, kubernetes: Kubernetes, caplog: pytest.LogCaptureFixture
    ) -> None:
        token = kubernetes.account / "token"
        token.unlink()
        kubernetes.slices = [one_slice("10.0.0.1")]
        async with self.looking(DiscoverySettings(kubernetes=kubernetes.settings(), every_s=0.05)) as discovery:
            await until(lambda: str(token) in caplog.text)
            token.write_text("secret")
            await until(lambda: discovery.addresses == {A})

    def test_one_way_must_be_given(self) -> None:
        for given in ({}, {"static": [A], "dns": "name:1"}, {"dns": "no-port"}, {"static": [A], "every_s": 0}):
            with pytest.raises(ValidationError):
                DiscoverySettings.model_validate(given)


class TestServiceWithDiscovery:
    async def test_who_is_found_is_a_candidate_and_nobody_else(self, redis_url: str, fleet: Fleet) -> None:
        """One that publishes and is not found, one that does both, one that is found and does not publish."""
        for pod, holds, address in (("a", 6, A), ("b", 9, B)):
            fleet.join_plain(pod, holds=holds, address=address)
        service = Service(redis_url, discovery={"static": [A, STRANGER]})
        await service.ready(pods=2)
        picked = await chooser_of(service).pick("r", "", BODY, None)
        assert picked.endpoints == [A, STRANGER]
        async with AsyncKVCacheClient(service.url) as kv:
            choice = await kv.choose({"model": MODEL, "prompt": TOKENS})
        assert (choice.chosen.address, [other.address for other in choice.others]) == (A, [STRANGER])
        await service.close()

    async def test_a_pod_that_kubernetes_takes_away_gets_nothing_more(
        self, redis_url: str, fleet: Fleet, kubernetes: Kubernetes
    ) -> None:
        for pod, holds, address in (("a", 6, A), ("b", 2, B)):
            fleet.join_plain(pod, holds=holds, address=address)
        kubernetes.slices = [one_slice("10.0.0.1", "10.0.0.2")]
        settings = {"service": "vllm", "api": kubernetes.settings().api, "account": str(kubernetes.account)}
        service = Service(redis_url, discovery={"kubernetes": settings, "every_s": 0.05})
        await service.ready(pods=2)
        chooser = chooser_of(service)
        model: Any = service.server.service.models[0]
        await until(lambda: len(model.candidates()) == 2)
        assert (await chooser.pick("one", "", BODY, None)).endpoints == [A, B]
        kubernetes.slices = [one_slice("10.0.0.1", ready=False), one_slice("10.0.0.2")]
        await until(lambda: len(model.candidates()) == 1)
        assert (await chooser.pick("two", "", BODY, None)).endpoints == [B]
        await service.close()
