"""The service over gRPC: our own `kvcache.v1`, and llm-d's `indexer.v1`. Messages in, ScoreService, messages out.

A refusal has the status that its HTTP status stands for, and the machine-readable reason in the trailing metadata
`kvcache-reason`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeAlias, TypeVar

import grpc
import msgspec

from serve_app.access import Caller
from serve_app.limits import Limits, parse
from serve_app.protos import indexer_pb2, indexer_pb2_grpc, kvcache_pb2, kvcache_pb2_grpc
from serve_app.service.answers import Candidate, ChooseAnswer, ScoreAnswer
from serve_app.service.questions import BATCH_MAX, ChooseFields, DoneFields, ScoreFields
from serve_app.service.refused import Refused, refusing
from serve_app.service.score_service import ScoreService
from serve_app.supervision import ErrorLog

STATES_EVERY_S = 0.5
REASON: Final = "kvcache-reason"

_CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}

Answer = TypeVar("Answer")
Context: TypeAlias = Any  # grpc.aio.ServicerContext; grpc has no types


def add_score_api(server: grpc.aio.Server, service: ScoreService, logger: logging.Logger) -> list[str]:
    """Put both into a server. Returns their full names, for health and reflection."""
    shell = _Shell(service, logger)
    kvcache_pb2_grpc.add_KVCacheServicer_to_server(KVCacheServicer(service, shell), server)
    indexer_pb2_grpc.add_IndexerServiceServicer_to_server(IndexerServicer(service, shell), server)
    return [
        file.DESCRIPTOR.services_by_name[name].full_name
        for file, name in ((kvcache_pb2, "KVCache"), (indexer_pb2, "IndexerService"))
    ]


class _Shell:
    """What is around every call: the key, the limits, and a status for whatever goes wrong."""

    def __init__(self, service: ScoreService, logger: logging.Logger) -> None:
        self._service = service
        self._errors = ErrorLog("kvcache: a gRPC question could not be answered", logger)

    async def answer(self, context: Context, work: Callable[[Caller], Awaitable[Answer]]) -> Answer:
        try:
            with self._service.enter(_metadata(context)) as caller:
                return await work(caller)
        except Refused as refused:
            error = refused
        except Exception as failure:
            self._errors.failed(failure)
            message = "this question could not be answered; the service's log says why"
            await context.abort(grpc.StatusCode.INTERNAL, message)
            raise AssertionError from failure  # abort does not return
        reason = ((REASON, error.code),)
        await context.abort(_CODES.get(error.status, grpc.StatusCode.INTERNAL), error.message, reason)
        raise AssertionError


class KVCacheServicer(kvcache_pb2_grpc.KVCacheServicer):
    def __init__(self, service: ScoreService, shell: _Shell) -> None:
        self._service = service
        self._shell = shell

    async def Score(self, request: kvcache_pb2.ScoreRequest, context: Context) -> kvcache_pb2.ScoreResponse:
        async def work(caller: Caller) -> kvcache_pb2.ScoreResponse:
            return _scored(await self._score(request, caller))

        return await self._shell.answer(context, work)

    async def ScoreBatch(
        self, request: kvcache_pb2.ScoreBatchRequest, context: Context
    ) -> kvcache_pb2.ScoreBatchResponse:
        async def work(caller: Caller) -> kvcache_pb2.ScoreBatchResponse:
            if len(request.requests) > BATCH_MAX:
                raise Refused(422, "invalid_field", f"a batch has at most {BATCH_MAX} requests", field="requests")
            return kvcache_pb2.ScoreBatchResponse(items=[await self._item(one, caller) for one in request.requests])

        return await self._shell.answer(context, work)

    async def Choose(self, request: kvcache_pb2.ChooseRequest, context: Context) -> kvcache_pb2.ChooseResponse:
        async def work(caller: Caller) -> kvcache_pb2.ChooseResponse:
            body = _body(request.model, request.prompt, self._service.limits)
            lease_s = request.lease_s if request.HasField("lease_s") else None
            with refusing():
                fields = msgspec.convert(
                    {
                        "pods": list(request.pods),
                        "request_id": request.request_id,
                        "session": request.session,
                        "lease_s": lease_s,
                        "reserve": not request.without_reservation,
                    },
                    ChooseFields,
                )
            return _chosen(await self._service.choose_of(body, fields, caller))

        return await self._shell.answer(context, work)

    async def Report(self, request: kvcache_pb2.ReportRequest, context: Context) -> kvcache_pb2.ReportResponse:
        async def work(_: Caller) -> kvcache_pb2.ReportResponse:
            ended = request.event == kvcache_pb2.ReportRequest.ENDED
            report = DoneFields(
                request_id=request.request_id,
                event="ended" if ended else "first_token",
                pod=request.pod,
                prompt_tokens=request.prompt_tokens if request.HasField("prompt_tokens") else None,
                cached_tokens=request.cached_tokens if request.HasField("cached_tokens") else None,
            )
            return kvcache_pb2.ReportResponse(known=self._service.report(report))

        return await self._shell.answer(context, work)

    async def WatchPods(
        self, request: kvcache_pb2.WatchPodsRequest, context: Context
    ) -> AsyncIterator[kvcache_pb2.PodStates]:
        async def work(_: Caller) -> kvcache_pb2.PodStates:
            self._service.check_admin(_metadata(context))
            return await self._states(request.model)

        before = None
        while True:
            states = await self._shell.answer(context, work)
            if states != before:
                before = states
                yield states
            await asyncio.sleep(STATES_EVERY_S)

    async def _score(self, request: kvcache_pb2.ScoreRequest, caller: Caller) -> ScoreAnswer:
        with refusing():
            fields = msgspec.convert({"pods": list(request.pods), "strategy": request.strategy or None}, ScoreFields)
        return await self._service.score_of(_body(request.model, request.prompt, self._service.limits), fields, caller)

    async def _item(self, request: kvcache_pb2.ScoreRequest, caller: Caller) -> kvcache_pb2.ScoreBatchItem:
        try:
            return kvcache_pb2.ScoreBatchItem(answer=_scored(await self._score(request, caller)))
        except Refused as refused:
            code: int = _CODES.get(refused.status, grpc.StatusCode.INTERNAL).value[0]
            error = kvcache_pb2.Error(code=code, message=refused.message, reason=refused.code)
            return kvcache_pb2.ScoreBatchItem(error=error)

    async def _states(self, name: str) -> kvcache_pb2.PodStates:
        model = self._service.model(name)
        with refusing():
            described = await model.describe()
        return kvcache_pb2.PodStates(
            model=str(model.model),
            pods=[
                kvcache_pb2.PodState(
                    pod=pod["pod"],
                    replica=pod["replica"],
                    address=pod["address"],
                    live=pod["live"],
                    trust=str(pod["trust"]),
                    cause=pod["cause"],
                    blocks=pod["blocks"] or 0,
                    in_flight=pod["in_flight"],
                    capacity=pod["capacity"] or 0,
                )
                for pod in described["pods"]
            ],
        )


class IndexerServicer(indexer_pb2_grpc.IndexerServiceServicer):
    """llm-d's. Its `prompt` is text that is rendered already."""

    def __init__(self, service: ScoreService, shell: _Shell) -> None:
        self._service = service
        self._shell = shell

    async def GetPodScores(
        self, request: indexer_pb2.GetPodScoresRequest, context: Context
    ) -> indexer_pb2.GetPodScoresResponse:
        async def work(caller: Caller) -> indexer_pb2.GetPodScoresResponse:
            body = {"prompt": request.prompt, **({"model": request.model_name} if request.model_name else {})}
            answer = await self._service.score_of(body, ScoreFields(pods=list(request.pod_identifiers)), caller)
            ranks = self._service.ranks(request.model_name)
            return indexer_pb2.GetPodScoresResponse(
                scores=[
                    indexer_pb2.PodScore(pod=pod, score=score, data_parallel_rank=ranks.get(pod))
                    for pod, score in answer.scores.items()
                ]
            )

        return await self._shell.answer(context, work)


def _metadata(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _body(model: str, prompt: kvcache_pb2.Prompt, limits: Limits) -> dict[str, Any]:
    """The request whose prompt is asked about.

    Raises:
        Refused: there is no prompt.
    """
    match prompt.WhichOneof("prompt"):
        case "request_json":
            with refusing():
                body = parse(prompt.request_json, limits)
        case "text":
            body = {"prompt": prompt.text}
        case "token_ids":
            body = {"prompt": list(prompt.token_ids.ids)}
        case _:
            raise Refused(422, "invalid_field", "prompt: give text, token_ids or request_json", field="prompt")
    if model:
        body["model"] = model
    if prompt.cache_salt:
        body["cache_salt"] = prompt.cache_salt
    return body


def _scored(answer: ScoreAnswer) -> kvcache_pb2.ScoreResponse:
    return kvcache_pb2.ScoreResponse(
        model=answer.model,
        strategy=str(answer.strategy),
        prompt_tokens=answer.prompt_tokens,
        block_size=answer.block_size,
        complete=answer.complete,
        pods={
            pod: kvcache_pb2.PodScore(
                score=one.score,
                matched_tokens=one.matched_tokens,
                trust=one.trust,
                age_s=one.age_s,
                expected_ttft_s=one.expected_ttft_s,
            )
            for pod, one in answer.pods.items()
        },
    )


def _chosen(answer: ChooseAnswer) -> kvcache_pb2.ChooseResponse:
    return kvcache_pb2.ChooseResponse(
        request_id=answer.request_id,
        chosen=_candidate(answer.chosen),
        others=[_candidate(one) for one in answer.others],
        outcome=answer.outcome,
        reason=answer.reason,
        lease_s=answer.lease_s,
        prompt_tokens=answer.prompt_tokens,
        matched_tokens=answer.matched_tokens,
        expected_cached_tokens=answer.expected_cached_tokens,
        expected_ttft_s=answer.expected_ttft_s,
    )


def _candidate(one: Candidate) -> kvcache_pb2.Candidate:
    return kvcache_pb2.Candidate(pod=one.pod, replica=one.replica, address=one.address, rank=one.rank)
