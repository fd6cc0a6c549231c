"""The score service as its users meet it: over HTTP and gRPC, on a Valkey that publishers have written to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serve_app.access import hash_key
from serve_app.client import AsyncKVCacheClient, ServiceError
from serve_app.protos import indexer_pb2, indexer_pb2_grpc, kvcache_pb2, kvcache_pb2_grpc
from serve_app.scoring import Strategy
from serve_app.service.backend import STRANGERS_MAX
from serve_app.types import Found
from tests.certificates import issue_certificates
from tests.contract.score_server import PROMPT, Service, until
from tests.contract.serve_router import MODEL, SIZE, TOKENS, Fleet


class TestScore:
    async def test_matched_tokens_of_every_pod(self, kv: AsyncKVCacheClient) -> None:
        answer = await kv.score(PROMPT)
        assert answer.scores == {"a": 6 * SIZE, "b": 2 * SIZE, "c": 0}
        assert answer.pods["a"].matched_tokens == {"gpu": 6 * SIZE}
        assert {pod.trust for pod in answer.pods.values()} == {"exact"}
        assert (answer.model, answer.prompt_tokens, answer.block_size, answer.complete) == (MODEL, 40, SIZE, True)

    async def test_only_those_that_were_asked_for_and_unknown_ones_are_called_so(self, kv: AsyncKVCacheClient) -> None:
        answer = await kv.score(PROMPT, pods=["b", "nobody"])
        assert answer.scores == {"b": 2 * SIZE, "nobody": 0}
        assert {pod: one.trust for pod, one in answer.pods.items()} == {"b": "exact", "nobody": "unknown"}
        assert (await kv.score({**PROMPT, "pods": []})).scores.keys() == {"a", "b", "c"}

    async def test_strategies(self, kv: AsyncKVCacheClient) -> None:
        assert (await kv.score(PROMPT, strategy="coverage")).scores["a"] == pytest.approx(0.6)
        by_cost = await kv.score(PROMPT, strategy=Strategy.EXPECTED_TTFT)
        assert by_cost.scores["a"] > by_cost.scores["b"] > by_cost.scores["c"]
        expected = by_cost.pods["a"].expected_ttft_s
        assert expected is not None
        assert 0 < expected <= -by_cost.scores["a"]

    async def test_text_chat_responses_and_messages_are_the_same_prompt(self, kv: AsyncKVCacheClient) -> None:
        turns = [{"role": "user", "content": "hello there"}]
        forms: list[dict[str, Any]] = [
            {"model": MODEL, "messages": turns},
            {"model": MODEL, "input": turns},
            {"model": MODEL, "messages": turns, "max_tokens": 8, "stop_sequences": ["x"]},
        ]
        counts = {(await kv.score(form)).prompt_tokens for form in forms}
        assert len(counts) == 1
        assert counts != {0}

    async def test_a_batch_answers_each_by_itself(self, kv: AsyncKVCacheClient) -> None:
        answer = await kv.score_batch([PROMPT, {**PROMPT, "pods": ["c"]}, {"model": MODEL}, {"model": "other"}])
        good = [item.answer.scores for item in answer.answers if item.answer]
        assert good == [{"a": 24, "b": 8, "c": 0}, {"c": 0}]
        assert [item.error.code for item in answer.answers if item.error] == ["no_prompt", "model_not_found"]


class TestChoose:
    async def test_the_holder_gets_it_and_is_told_how_to_be_reached(self, kv: AsyncKVCacheClient) -> None:
        choice = await kv.choose(PROMPT, request_id="one")
        assert (choice.request_id, choice.chosen.pod, choice.chosen.address) == ("one", "a", "10.0.0.97:8000")
        assert {other.pod for other in choice.others} == {"b", "c"}
        assert (choice.outcome, choice.reason, choice.matched_tokens) == ("hit", "prefix", {"gpu": 24})
        assert choice.expected_cached_tokens == 24

    async def test_what_was_chosen_counts_until_it_is_done(self, kv: AsyncKVCacheClient) -> None:
        for i in range(3):
            assert (await kv.choose(PROMPT, pods=["c"], request_id=f"r{i}")).chosen.pod == "c"
        assert (await kv.explain(PROMPT)).in_flight["c"] == 3
        await kv.choose(PROMPT, pods=["c"], request_id="r2")  # asked again: the same one
        assert (await kv.explain(PROMPT)).in_flight["c"] == 3
        assert await kv.first_token("r0")
        assert await kv.done("r0")
        assert await kv.done("r1", prompt_tokens=40, cached_tokens=36)
        assert not await kv.done("r1"), "it has ended already"
        assert (await kv.explain(PROMPT)).in_flight["c"] == 1

    async def test_a_lease_ends_what_nobody_speaks_of(self, kv: AsyncKVCacheClient, service: Service) -> None:
        await kv.choose(PROMPT, pods=["c"], request_id="lost", lease_s=0.2)
        assert (await kv.explain(PROMPT)).in_flight["c"] == 1
        await until(lambda: service.server.service.reservations.expired == 1)
        assert (await kv.explain(PROMPT)).in_flight["c"] == 0
        assert not await kv.done("lost")

    async def test_pods_that_a_client_makes_up_are_bounded(self, kv: AsyncKVCacheClient, service: Service) -> None:
        for i in range(2 * STRANGERS_MAX):
            assert (await kv.choose(PROMPT, pods=[f"made-up-{i}"])).chosen.pod == f"made-up-{i}"
        chooser = service.server.service.models[0].decider.chooser  # type: ignore[attr-defined]
        assert len(chooser.in_flight._sent) <= STRANGERS_MAX + 3
        assert len(chooser.ledger._bits) <= STRANGERS_MAX + 3

    async def test_a_burst_of_one_new_prefix_stays_together(self, kv: AsyncKVCacheClient) -> None:
        """What was chosen a moment ago is expected to be there, though no KV event has told of it."""
        other = {"model": MODEL, "prompt": [token + 500 for token in TOKENS]}
        chosen = {(await kv.choose(other)).chosen.pod for _ in range(3)}
        assert len(chosen) == 1

    async def test_explain_books_nothing(self, kv: AsyncKVCacheClient) -> None:
        for _ in range(3):
            why = await kv.explain(PROMPT)
        assert why.ranked[0] == "a"
        assert (why.outcome, why.reason) == ("hit", "prefix")
        assert set(why.in_flight.values()) == {0}

    async def test_a_prompt_that_cannot_be_read_is_balanced(self, kv: AsyncKVCacheClient) -> None:
        choice = await kv.choose({"model": MODEL, "messages": "?"})
        assert (choice.outcome, choice.reason) == ("fallback", "bad_messages")

    async def test_receipts_compare_with_what_the_engine_reused(self, kv: AsyncKVCacheClient, service: Service) -> None:
        await kv.choose(PROMPT, request_id="told")
        await kv.done("told", prompt_tokens=40, cached_tokens=20)
        async with httpx.AsyncClient(base_url=service.url) as client:
            for _ in range(200):
                receipts = (await client.get("/v1/receipts")).json()
                if receipts:
                    break
                await asyncio.sleep(0.05)
        assert receipts[0]["request_id"] == "told"
        assert (receipts[0]["predicted_cached_tokens"], receipts[0]["actual"]["cached_tokens"]) == (24, 20)


class TestRefusals:
    async def refused(self, kv: AsyncKVCacheClient, body: dict[str, Any]) -> tuple[int, str, str | None]:
        with pytest.raises(ServiceError) as caught:
            await kv.score(body)
        return caught.value.status, caught.value.code, caught.value.field

    async def test_each_has_a_status_a_code_and_the_field(self, kv: AsyncKVCacheClient) -> None:
        assert await self.refused(kv, {**PROMPT, "model": "gpt"}) == (404, "model_not_found", "model")
        assert await self.refused(kv, {**PROMPT, "model": 7}) == (422, "invalid_field", "model")
        assert await self.refused(kv, {**PROMPT, "pods": "a"}) == (422, "invalid_field", "pods")
        assert await self.refused(kv, {**PROMPT, "strategy": "best"}) == (422, "invalid_field", "strategy")
        assert await self.refused(kv, {"model": MODEL}) == (400, "no_prompt", None)
        with pytest.raises(ServiceError, match="known: 'test-model'"):
            await kv.score({**PROMPT, "model": "gpt"})

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("/v1/score", b"{", 400),
            ("/v1/score", b"\xff\x00", 400),
            ("/v1/score", b'{"x": ' + b"[" * 100_000, 422),
            ("/v1/score", b"[" * 100_000, 400),
            ("/v1/choose", b'{"lease_s": -1}', 422),
            ("/v1/choose", b'{"request_id": "%s"}' % (b"x" * 2000), 422),
            ("/v1/done", b"{}", 422),
            ("/v1/done", b'{"request_id": "x", "event": "lost"}', 422),
            ("/v1/done", b"\xff", 400),
            ("/v1/score/batch", b'{"requests": []}', 422),
            ("/v1/score/batch", b'{"requests": {}}', 422),
            ("/v1/explain", b"null", 400),
        ],
    )
    async def test_bad_bodies(self, service: Service, path: str, body: bytes, status: int) -> None:
        async with httpx.AsyncClient(base_url=service.url) as client:
            answer = await client.post(path, content=body)
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert error["message"]
            assert "Traceback" not in answer.text
            assert (await client.post("/v1/score", json=PROMPT)).status_code == 200

    async def test_a_key_is_wanted_and_limits_hold(self, redis_url: str, fleet: Fleet, tmp_path: Path) -> None:
        fleet.join_plain("a", holds=1)
        keys = tmp_path / "keys"
        keys.write_text(yaml.safe_dump({"keys": [{"name": "x", "sha256": hash_key("secret"), "admin": True}]}))
        limits = {"body_bytes": 2000, "scores_per_s": 5}
        service = Service(redis_url, auth={"keys_file": str(keys)}, limits=limits)
        await service.started()
        async with AsyncKVCacheClient(service.url, key="") as nobody:
            assert await self.refused(nobody, PROMPT) == (401, "no_api_key", None)
        async with httpx.AsyncClient(base_url=service.url, headers={"authorization": "Bearer secret"}) as client:
            for _ in range(500):
                if (await client.get("/readyz")).status_code == 200:
                    break
                await asyncio.sleep(0.02)
            assert (await client.post("/v1/score", json=PROMPT)).status_code == 200
            assert (await client.post("/v1/score", json={**PROMPT, "cache_salt": "others"})).status_code == 403
            assert (await client.post("/v1/score", content=b" " * 2001)).status_code == 413
            statuses = [(await client.post("/v1/score", json=PROMPT)).status_code for _ in range(10)]
            assert 429 in statuses
            late = await client.post("/v1/score", json=PROMPT)
            assert late.status_code != 429 or int(late.headers["retry-after"]) >= 1
        await service.close()

    async def test_not_ready_is_said_with_the_reason(self, redis_url: str) -> None:
        service = Service(redis_url)
        await service.started()
        async with httpx.AsyncClient(base_url=service.url) as client:
            ready = await client.get("/readyz")
            assert ready.status_code == 503
            assert "no replica has registered" in ready.text
            assert (await client.post("/v1/score", json=PROMPT)).status_code == 503
        async with service.channel() as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await service.close()


class TestGrpc:
    def prompt(self) -> kvcache_pb2.Prompt:
        return kvcache_pb2.Prompt(token_ids=kvcache_pb2.TokenIds(ids=TOKENS))

    async def test_score_and_batch(self, service: Service) -> None:
        async with service.channel() as channel:
            stub = kvcache_pb2_grpc.KVCacheStub(channel)
            asked = kvcache_pb2.ScoreRequest(model=MODEL, prompt=self.prompt(), pods=["a", "nobody"])
            answer = await stub.Score(asked)
            assert {pod: one.score for pod, one in answer.pods.items()} == {"a": 24, "nobody": 0}
            assert (answer.pods["a"].trust, answer.pods["nobody"].trust) == ("exact", "unknown")
            assert dict(answer.pods["a"].matched_tokens) == {"gpu": 24}
            as_json = kvcache_pb2.Prompt(request_json=json.dumps({"prompt": TOKENS}).encode())
            batch = await stub.ScoreBatch(
                kvcache_pb2.ScoreBatchRequest(
                    requests=[asked, kvcache_pb2.ScoreRequest(prompt=as_json), kvcache_pb2.ScoreRequest(model="x")]
                )
            )
            assert batch.items[0].answer == answer
            assert batch.items[1].answer.pods["a"].score == 24
            assert batch.items[2].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]

    async def test_choose_report_and_watch(self, service: Service) -> None:
        async with service.channel() as channel:
            stub = kvcache_pb2_grpc.KVCacheStub(channel)
            choice = await stub.Choose(kvcache_pb2.ChooseRequest(prompt=self.prompt(), request_id="g"))
            assert (choice.chosen.pod, choice.chosen.address, choice.reason) == ("a", "10.0.0.97:8000", "prefix")
            first = kvcache_pb2.ReportRequest(request_id="g", event=kvcache_pb2.ReportRequest.FIRST_TOKEN)
            assert (await stub.Report(first)).known
            assert (await stub.Report(kvcache_pb2.ReportRequest(request_id="g"))).known
            assert not (await stub.Report(kvcache_pb2.ReportRequest(request_id="g"))).known
            states = await anext(aiter(stub.WatchPods(kvcache_pb2.WatchPodsRequest())))
            assert {pod.pod: pod.live for pod in states.pods} == {"a": True, "b": True, "c": True}

    async def test_refusals_have_grpcs_statuses(self, service: Service) -> None:
        async with service.channel() as channel:
            stub = kvcache_pb2_grpc.KVCacheStub(channel)
            for asked, status, reason in (
                (
                    kvcache_pb2.ScoreRequest(model="x", prompt=self.prompt()),
                    grpc.StatusCode.NOT_FOUND,
                    "model_not_found",
                ),
                (kvcache_pb2.ScoreRequest(), grpc.StatusCode.INVALID_ARGUMENT, "invalid_field"),
                (
                    kvcache_pb2.ScoreRequest(prompt=self.prompt(), strategy="best"),
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "invalid_field",
                ),
                (
                    kvcache_pb2.ScoreRequest(prompt=kvcache_pb2.Prompt(request_json=b"{")),
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "invalid_request",
                ),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Score(asked)
                assert caught.value.code() is status
                assert caught.value.trailing_metadata()["kvcache-reason"] == reason

    async def test_llm_ds_client_is_answered(self, service: Service) -> None:
        """`indexer.v1.IndexerService/GetPodScores`, by its own field numbers."""
        async with service.channel() as channel:
            stub = indexer_pb2_grpc.IndexerServiceStub(channel)
            asked = indexer_pb2.GetPodScoresRequest(prompt="a b c", model_name=MODEL, pod_identifiers=["a", "b"])
            answer = await stub.GetPodScores(asked)
            assert {one.pod for one in answer.scores} == {"a", "b"}
            assert not any(one.HasField("data_parallel_rank") for one in answer.scores)
            raw = await channel.unary_unary("/indexer.v1.IndexerService/GetPodScores")(
                b"\x0a\x05a b c\x12" + bytes([len(MODEL)]) + MODEL.encode() + b"\x1a\x01a"
            )
            assert raw.startswith(b"\x0a")

    async def test_health_and_reflection(self, service: Service) -> None:
        async with service.channel() as channel:
            for name in ("", "kvcache.v1.KVCache", "indexer.v1.IndexerService"):
                asked = health_pb2.HealthCheckRequest(service=name)
                async for answer in health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=20):  # told once a second
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        break
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            listed = {one.name for one in (await call.read()).list_services_response.service}
            assert {"kvcache.v1.KVCache", "indexer.v1.IndexerService"} <= listed


class TestServing:
    async def test_tls_on_both(self, redis_url: str, fleet: Fleet, tmp_path: Path) -> None:
        issue_certificates(tmp_path)
        fleet.join_plain("a", holds=6)
        tls = {"certificate": str(tmp_path / "server.crt"), "key": str(tmp_path / "server.key")}
        service = Service(redis_url, tls=tls)
        await until(lambda: service.server.grpc_port > 0)
        url = service.url.replace("http:", "https:")
        trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
        async with AsyncKVCacheClient(url, verify=trusting) as kv:
            for _ in range(500):
                with contextlib.suppress(ServiceError):
                    if (await kv.score(PROMPT)).scores == {"a": 6 * SIZE}:
                        break
                await asyncio.sleep(0.02)
            assert (await kv.choose(PROMPT)).chosen.pod == "a"
        async with AsyncKVCacheClient(url, timeout_s=2) as doubting:
            with pytest.raises(ServiceError, match="CERTIFICATE_VERIFY_FAILED"):
                await doubting.score(PROMPT)
        credentials = grpc.ssl_channel_credentials((tmp_path / "ca.crt").read_bytes())
        async with grpc.aio.secure_channel(f"127.0.0.1:{service.server.grpc_port}", credentials) as channel:
            prompt = kvcache_pb2.Prompt(token_ids=kvcache_pb2.TokenIds(ids=TOKENS))
            answer = await kvcache_pb2_grpc.KVCacheStub(channel).Score(kvcache_pb2.ScoreRequest(prompt=prompt))
            assert answer.pods["a"].score == 6 * SIZE
        await service.close()

    async def test_ranks_are_named(self, redis_url: str, fleet: Fleet) -> None:
        fleet.join("r", 0, holds=1)
        fleet.join("r", 1, holds=5)
        service = Service(redis_url)
        await service.ready(pods=2)
        async with AsyncKVCacheClient(service.url) as kv:
            choice = await kv.choose(PROMPT)
            assert (choice.chosen.replica, choice.chosen.rank) == ("r", 1)
        await service.close()

    async def test_two_services_count_each_others_choices(
        self, service: Service, kv: AsyncKVCacheClient, redis_url: str
    ) -> None:
        other = Service(redis_url)
        await other.ready(pods=3)
        log = service.server.service.models[0].decider._log  # type: ignore[attr-defined]
        await until(lambda: log.shared)
        async with AsyncKVCacheClient(other.url) as there:

            async def counted(count: int) -> None:
                for _ in range(400):
                    if (await there.explain(PROMPT)).in_flight["c"] == count:
                        return
                    await asyncio.sleep(0.02)
                raise AssertionError(f"{count} were not counted there")

            for i in range(3):
                await kv.choose({**PROMPT, "prompt": [i, *TOKENS]}, pods=["c"], request_id=f"r{i}")
            await counted(3)
            await kv.done("r0")
            await counted(2)
            await kv.choose({**PROMPT, "prompt": [9, *TOKENS]}, pods=["c"], request_id="short", lease_s=0.5)
            await counted(3)
            await counted(2)
        await other.close()

    async def test_reported_load_moves_the_choice(self, service: Service, kv: AsyncKVCacheClient, fleet: Fleet) -> None:
        mirror = service.server.service.models[0].decider.mirror  # type: ignore[attr-defined]
        record = next(domain for domain, _, _ in mirror.domains() if domain.pod == "a")
        fleet.writer.report_load(record.id, record.epoch, 5000)
        fleet.writer.flush()
        await until(lambda: mirror.load("a") is not None)
        assert (await kv.score(PROMPT)).pods["a"].age_s is not None
        assert (await kv.choose(PROMPT)).chosen.pod != "a"

    async def test_metrics_and_the_openapi_document(self, service: Service, kv: AsyncKVCacheClient) -> None:
        await kv.choose(PROMPT)
        async with httpx.AsyncClient(base_url=service.url) as client:
            for _ in range(100):
                text = (await client.get("/metrics")).text
                line = 'kvcache_router_decisions_total{model="test-model",outcome="hit",reason="prefix"} 1.0'
                if line in text and "kvcache_index_pods" in text:
                    break
                await asyncio.sleep(0.05)
            assert line in text
            document = (await client.get("/openapi.json")).json()
        assert {"/v1/score", "/v1/choose", "/v1/done", "/readyz"} <= document["paths"].keys()
        refs = [part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]]
        assert set(refs) <= document["components"]["schemas"].keys()

    async def test_a_question_that_is_there_is_answered_before_it_ends(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = service.server.service.models[0]
        find = backend.find

        async def slow_find(*arguments: Any) -> Found:
            await asyncio.sleep(0.5)
            return await find(*arguments)

        monkeypatch.setattr(backend, "find", slow_find)
        async with httpx.AsyncClient(base_url=service.url) as client:
            asked = asyncio.create_task(client.post("/v1/score", json=PROMPT))
            await asyncio.sleep(0.2)
            service.server.stop()
            assert (await asked).status_code == 200
