"""The two clients: the same calls, waited for in a thread or on an event loop. Both keep their connections."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from serve_app.access import KEY_VARIABLE
from serve_app.client import calls
from serve_app.client.calls import Body, Call
from serve_app.scoring import Strategy
from serve_app.service.answers import BatchAnswer, ChooseAnswer, Explanation, ScoreAnswer

TIMEOUT_S = 5.0

T = TypeVar("T")


def _settings(url: str, key: str | None, timeout_s: float, verify: ssl.SSLContext | bool) -> dict[str, Any]:
    key = os.environ.get(KEY_VARIABLE, "") if key is None else key
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    return {"base_url": url.rstrip("/"), "headers": headers, "timeout": timeout_s, "verify": verify}


class KVCacheClient:
    """Every method raises ServiceError where there is no answer.

    Args:
        url: of the service, or of the graph's application (http://gateway:8000/kvcache).
        key: of the service; None: that of the environment variable KVCACHE_API_KEY.
        timeout_s: of one attempt.
        verify: with https: trusts these authorities; True: the usual ones.
    """

    def __init__(
        self, url: str, key: str | None = None, timeout_s: float = TIMEOUT_S, verify: ssl.SSLContext | bool = True
    ) -> None:
        self._http = httpx.Client(**_settings(url, key, timeout_s, verify))

    def score(
        self, request: Body, pods: Sequence[str] | None = None, strategy: Strategy | str | None = None
    ) -> ScoreAnswer:
        """How well each of `pods` (None: all that are live) suits the request's prompt."""
        return self._call(calls.score(request, pods, strategy))

    def score_batch(self, requests: Sequence[Body]) -> BatchAnswer:
        """Each is answered by itself; each may have `pods` and `strategy`."""
        return self._call(calls.score_batch(requests))

    def choose(
        self,
        request: Body,
        pods: Sequence[str] | None = None,
        request_id: str = "",
        session: str = "",
        lease_s: float | None = None,
    ) -> ChooseAnswer:
        """Who is to get the request. It counts there until `done`, or until its lease is over."""
        return self._call(calls.choose(request, pods, request_id, session, lease_s))

    def first_token(self, request_id: str, pod: str = "") -> bool:
        """The choice's first token is there. Returns whether the service knows of it."""
        return self._call(calls.report(request_id, "first_token", pod, None, None)).known

    def done(
        self, request_id: str, pod: str = "", prompt_tokens: int | None = None, cached_tokens: int | None = None
    ) -> bool:
        """The choice's request has ended.

        Args:
            pod: that took it, if it was another one than was chosen.
            prompt_tokens: as the engine's `usage` has them, with `cached_tokens`.
        """
        return self._call(calls.report(request_id, "ended", pod, prompt_tokens, cached_tokens)).known

    def explain(
        self, request: Body, pods: Sequence[str] | None = None, strategy: Strategy | str | None = None
    ) -> Explanation:
        """What a choice would rest on."""
        return self._call(calls.explain(request, pods, strategy))

    def pods(self, model: str = "") -> dict[str, Any]:
        """What the index knows of every pod."""
        return self._call(calls.pods(model))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, call: Call[T]) -> T:
        for attempt in range(1, calls.ATTEMPTS + 1):
            try:
                answer = self._http.request(call.method, call.path, content=call.content)
            except httpx.TransportError as error:
                if (wait_s := calls.wait_s(attempt, 0, None)) is None:
                    raise calls.unanswered(call, error) from error
            else:
                wait_s = calls.wait_s(attempt, answer.status_code, answer.headers.get("retry-after"))
                if wait_s is None:
                    return calls.result(call, answer.status_code, answer.content)
            time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


class AsyncKVCacheClient:
    """As KVCacheClient, on an event loop."""

    def __init__(
        self, url: str, key: str | None = None, timeout_s: float = TIMEOUT_S, verify: ssl.SSLContext | bool = True
    ) -> None:
        self._http = httpx.AsyncClient(**_settings(url, key, timeout_s, verify))

    async def score(
        self, request: Body, pods: Sequence[str] | None = None, strategy: Strategy | str | None = None
    ) -> ScoreAnswer:
        return await self._call(calls.score(request, pods, strategy))

    async def score_batch(self, requests: Sequence[Body]) -> BatchAnswer:
        return await self._call(calls.score_batch(requests))

    async def choose(
        self,
        request: Body,
        pods: Sequence[str] | None = None,
        request_id: str = "",
        session: str = "",
        lease_s: float | None = None,
    ) -> ChooseAnswer:
        return await self._call(calls.choose(request, pods, request_id, session, lease_s))

    async def first_token(self, request_id: str, pod: str = "") -> bool:
        return (await self._call(calls.report(request_id, "first_token", pod, None, None))).known

    async def done(
        self, request_id: str, pod: str = "", prompt_tokens: int | None = None, cached_tokens: int | None = None
    ) -> bool:
        return (await self._call(calls.report(request_id, "ended", pod, prompt_tokens, cached_tokens))).known

    async def explain(
        self, request: Body, pods: Sequence[str] | None = None, strategy: Strategy | str | None = None
    ) -> Explanation:
        return await self._call(calls.explain(request, pods, strategy))

    async def pods(self, model: str = "") -> dict[str, Any]:
        return await self._call(calls.pods(model))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, call: Call[T]) -> T:
        for attempt in range(1, calls.ATTEMPTS + 1):
            try:
                answer = await self._http.request(call.method, call.path, content=call.content)
            except httpx.TransportError as error:
                if (wait_s := calls.wait_s(attempt, 0, None)) is None:
                    raise calls.unanswered(call, error) from error
            else:
                wait_s = calls.wait_s(attempt, answer.status_code, answer.headers.get("retry-after"))
                if wait_s is None:
                    return calls.result(call, answer.status_code, answer.content)
            await asyncio.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")
