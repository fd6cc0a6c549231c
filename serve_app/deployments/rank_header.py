"""How the data parallel rank that a router has chosen reaches the engine: in the header that vLLM reads.

    ordinary ingress    the ingress hands the client's headers on with the request: the router adds `replica -> rank` to
                        them (whichever replica takes it in the end), and the replica puts its own rank in their place
    direct streaming    our ingress router answers HAProxy with the header (ingress_router.py)
    any other way       the rank cannot be named, and the engine takes one itself; Ray's LLMRouter is one

In: ranks by replica. Out: `X-data-parallel-rank`, which vLLM 0.29 reads on chat, completions and generate
(entrypoints/generate/base/serving.py, `_get_data_parallel_rank`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec
from ray.serve.request_router import PendingRequest

from serve_app.types import PodId, pod_of_rank

ENGINE_HEADER = "x-data-parallel-rank"
_CHOSEN_HEADER = "x-kvcache-ranks"

_decode = msgspec.json.Decoder(dict[str, int]).decode


def can_name(request: PendingRequest | None) -> bool:
    """Whether a rank can be named to the engine that gets the request."""
    return request is not None and _headers(request) is not None


def name(request: PendingRequest, ranks: Mapping[PodId, int]) -> None:
    """Hand over what was chosen: the rank to take, by replica."""
    headers = _headers(request)
    if headers is not None:
        headers[_CHOSEN_HEADER] = msgspec.json.encode(ranks).decode()


def take(headers: dict[str, str], replica: str) -> None:
    """In the replica: the rank that was chosen for it takes its place in the headers that vLLM reads."""
    chosen = headers.pop(_CHOSEN_HEADER, None)
    if chosen is None:
        return
    with contextlib.suppress(msgspec.DecodeError):  # then it is a client's
        rank = _decode(chosen).get(replica)
        if rank is not None:
            headers[ENGINE_HEADER] = str(rank)


def served_by(replica: str, ranks: range | None, named: str | None) -> str:
    """Who serves a request whose engine was told this rank: the rank's pod, or nothing more exact than the replica."""
    if ranks is None or named is None or not named.isdecimal() or int(named) not in ranks:
        return replica
    return pod_of_rank(replica, int(named))


def _headers(request: PendingRequest) -> dict[str, str] | None:
    """Those of Ray Serve LLM's RawRequestInfo, which the OpenAI ingress hands on beside the body."""
    for argument in request.args[1:]:
        headers: Any = getattr(argument, "headers", None)
        if isinstance(headers, dict):
            return headers
    return None
