"""A gateway of one's own: asks the score service over gRPC who gets a request, forwards it, says what became of it.

    python gateway.py --port 8090 --service 127.0.0.1:8101 --model smollm2-135m-instruct 127.0.0.1:8000 127.0.0.1:8001

While the service does not answer, the pods of the command line get the requests in turns.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import uuid
from collections.abc import AsyncIterator

import grpc
import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app.protos.kvcache_pb2 import ChooseRequest, Prompt, ReportRequest
from serve_app.protos.kvcache_pb2_grpc import KVCacheStub
from serve_app.service.usage import AnswerEnd

ASK_S = 0.5  # so long a request waits for a choice, retries included
RETRIES = {"maxAttempts": 4, "initialBackoff": "0.02s", "maxBackoff": "0.2s", "backoffMultiplier": 2}
POLICY = {
    "name": [{"service": "kvcache.v1.KVCache"}],
    "retryPolicy": RETRIES | {"retryableStatusCodes": ["UNAVAILABLE"]},
}
CHANNEL = [("grpc.service_config", json.dumps({"methodConfig": [POLICY]})), ("grpc.max_reconnect_backoff_ms", 1000)]


class Gateway:
    def __init__(self, service: str, model: str, pods: list[str]) -> None:
        self._kv = KVCacheStub(grpc.aio.insecure_channel(service, options=CHANNEL))
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=1), headers={"accept-encoding": "identity"})
        self._model, self._pods, self._turn = model, pods, itertools.count()
        self._reports: set[asyncio.Task[None]] = set()

    async def answer(self, request: Request) -> Response:
        body, request_id = await request.body(), request.headers.get("x-request-id") or uuid.uuid4().hex
        headers = {name: request.headers[name] for name in ("content-type", "authorization") if name in request.headers}
        for address, pod in await self._candidates(request_id, body):
            url = f"http://{address}{request.url.path}"
            asked = self._http.build_request("POST", url, content=body, headers=headers | {"x-request-id": request_id})
            try:
                answer = await self._http.send(asked, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue  # the next best
            kept = {"content-type": answer.headers.get("content-type", ""), "x-pod": pod}
            return StreamingResponse(self._passed(answer, request_id, pod), answer.status_code, kept)
        self._report(ReportRequest(request_id=request_id))
        return JSONResponse({"error": {"message": "no pod can be reached"}}, 503, {"retry-after": "1"})

    async def _candidates(self, request_id: str, body: bytes) -> list[tuple[str, str]]:
        """Address and name of each pod, best first."""
        question = ChooseRequest(model=self._model, prompt=Prompt(request_json=body), request_id=request_id)
        try:
            choice = await self._kv.Choose(question, timeout=ASK_S)
            if known := [(one.address, one.pod) for one in (choice.chosen, *choice.others) if one.address]:
                return known
            print("in turns: no publisher has an --address", flush=True)
        except grpc.aio.AioRpcError as error:
            print(f"in turns: {error.code().name} {error.details()}", flush=True)
        start = next(self._turn) % len(self._pods)
        return [(pod, pod) for pod in (*self._pods[start:], *self._pods[:start])]

    async def _passed(self, answer: httpx.Response, request_id: str, pod: str) -> AsyncIterator[bytes]:
        """The answer's bytes as they come; tells of the first token, and of the end, also when the client has gone."""
        end, has_token = AnswerEnd(), False
        try:
            async for chunk in answer.aiter_raw():
                end.passed(chunk)
                if not has_token:
                    has_token = True
                    self._report(ReportRequest(request_id=request_id, pod=pod, event=ReportRequest.FIRST_TOKEN))
                yield chunk
        finally:
            self._report(ReportRequest(request_id=request_id, pod=pod, **end.usage()._asdict()))
            await answer.aclose()

    def _report(self, report: ReportRequest) -> None:
        async def send() -> None:
            with contextlib.suppress(grpc.aio.AioRpcError):  # its lease ends it then
                await self._kv.Report(report, timeout=ASK_S)

        self._reports.add(task := asyncio.create_task(send()))
        task.add_done_callback(self._reports.discard)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pods", nargs="+", help="host:port")
    parser.add_argument("--service", default="127.0.0.1:8101", help="gRPC address of `kvcache serve-scores`")
    parser.add_argument("--model", default="", help="as it is called there")
    parser.add_argument("--port", type=int, default=8090)
    options = parser.parse_args()
    gateway = Gateway(options.service, options.model, options.pods)  # on the loop that it is used on
    app = Starlette(routes=[Route("/{path:path}", gateway.answer, methods=["POST"])])
    await uvicorn.Server(uvicorn.Config(app, port=options.port, log_level="warning", lifespan="off")).serve()


if __name__ == "__main__":
    asyncio.run(main())
