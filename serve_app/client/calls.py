"""The service's calls, apart from how they are sent: what is asked, how it is sent again, and what the answer means.

Calls are sent again by gRPC's rules (gRPC A6, "client retries"): what was not answered, and UNAVAILABLE (503), up to
four attempts, with exponential backoff and jitter; of 429 as Retry-After says. A score may be asked twice, a choice has
its request id, so that asked twice it is booked once.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from serve_app.client.errors import ServiceError
from serve_app.scoring import Strategy
from serve_app.service.answers import BatchAnswer, ChooseAnswer, Done, Explanation, ScoreAnswer

Body = Mapping[str, Any]
"""Of an OpenAI request: chat, completions, responses, messages."""

ATTEMPTS: Final = 4
_FIRST_S, _LONGEST_S, _JITTER = 0.1, 1.0, 0.2
_AGAIN: Final = frozenset({429, 503})
_RETRY_AFTER_MAX_S: Final = 5.0

T = TypeVar("T")


class Call(NamedTuple, Generic[T]):
    """One HTTP request, and the type of its answer."""

    method: str
    path: str
    content: bytes | None
    kind: type[T]


def score(request: Body, pods: Sequence[str] | None, strategy: Strategy | str | None) -> Call[ScoreAnswer]:
    return _post("/v1/score", _asked(request, pods, strategy), ScoreAnswer)


def explain(request: Body, pods: Sequence[str] | None, strategy: Strategy | str | None) -> Call[Explanation]:
    return _post("/v1/explain", _asked(request, pods, strategy), Explanation)


def score_batch(requests: Sequence[Body]) -> Call[BatchAnswer]:
    return _post("/v1/score/batch", {"requests": list(requests)}, BatchAnswer)


def choose(
    request: Body, pods: Sequence[str] | None, request_id: str, session: str, lease_s: float | None
) -> Call[ChooseAnswer]:
    fields: dict[str, Any] = {"request_id": request_id or uuid.uuid4().hex, "session": session}
    if pods:
        fields["pods"] = list(pods)
    if lease_s is not None:
        fields["lease_s"] = lease_s
    return _post("/v1/choose", {**request, **fields}, ChooseAnswer)


def report(request_id: str, event: str, pod: str, prompt_tokens: int | None, cached_tokens: int | None) -> Call[Done]:
    asked: dict[str, Any] = {"request_id": request_id, "event": event, "pod": pod}
    if prompt_tokens is not None and cached_tokens is not None:
        asked |= {"prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens}
    return _post("/v1/done", asked, Done)


def pods(model: str) -> Call[dict[str, Any]]:
    return Call("GET", f"/v1/pods?model={model}" if model else "/v1/pods", None, dict[str, Any])


def result(call: Call[T], status: int, content: bytes) -> T:
    """Raises:
    ServiceError: it was refused, or is no answer of this service.
    """
    if status == 200:
        try:
            return msgspec.json.decode(content, type=call.kind)
        except msgspec.DecodeError as error:
            raise ServiceError(
                status, "not_understood", f"{call.path}: not an answer of this service: {error}"
            ) from error
    try:
        told = msgspec.json.decode(content)["error"]
        raise ServiceError(status, told["code"], told["message"], told.get("param"))
    except (msgspec.DecodeError, KeyError, TypeError):
        raise ServiceError(status, "not_understood", f"{call.path} answers {status}, and not as this service") from None


def unanswered(call: Call[T], error: Exception) -> ServiceError:
    return ServiceError(0, "unavailable", f"{call.path} was not answered ({error}); is the service there?")


def wait_s(attempt: int, status: int, retry_after: str | None) -> float | None:
    """Before the next attempt; None: it is not sent again.

    Args:
        attempt: that has failed, from 1.
        status: 0: nobody answered.
        retry_after: the header.
    """
    if attempt >= ATTEMPTS or (status and status not in _AGAIN):
        return None
    if retry_after is not None and retry_after.isdecimal():
        return min(float(retry_after), _RETRY_AFTER_MAX_S)
    wait: float = min(_FIRST_S * 2.0 ** (attempt - 1), _LONGEST_S)
    return wait * random.uniform(1 - _JITTER, 1 + _JITTER)


def _asked(request: Body, pods: Sequence[str] | None, strategy: Strategy | str | None) -> dict[str, Any]:
    asked = dict(request)
    if pods:
        asked["pods"] = list(pods)
    if strategy:
        asked["strategy"] = str(strategy)
    return asked


def _post(path: str, body: Body, kind: type[T]) -> Call[T]:
    return Call("POST", path, msgspec.json.encode(body), kind)
