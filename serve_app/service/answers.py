"""What the service says, as JSON. The OpenAPI document is made of these."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from serve_app.scoring import Strategy


def _said(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class PodScore(msgspec.Struct, frozen=True, omit_defaults=True):
    """One pod."""

    score: float
    matched_tokens: Annotated[dict[str, int], _said("Contiguous cached prefix by tier, fastest first.")]
    trust: Annotated[
        str,
        _said(
            "exact: it holds this; degraded: events were lost; stale: not heard of in time; unknown: no publisher has "
            "told of it."
        ),
    ]
    age_s: Annotated[float | None, _said("Seconds since it reported last; absent: never.")] = None
    expected_ttft_s: Annotated[float | None, _said("With `expected_ttft`: time to the first token.")] = None
    cost_s: Annotated[dict[str, float] | None, _said("With `expected_ttft`: the terms of its cost, in seconds.")] = None


class ScoreAnswer(msgspec.Struct, frozen=True):
    model: str
    strategy: Strategy
    prompt_tokens: int
    block_size: int
    complete: Annotated[
        bool, _said("False: only the known beginning is scored, up to an image or to text that is new.")
    ]
    scores: Annotated[
        dict[str, float],
        _said("The best is the largest. With `expected_ttft` it is minus the expected cost in seconds."),
    ]
    pods: dict[str, PodScore]


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    code: str
    param: str | None = None


class BatchItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One of both."""

    answer: ScoreAnswer | None = None
    error: ErrorBody | None = None


class BatchAnswer(msgspec.Struct, frozen=True):
    answers: Annotated[list[BatchItem], _said("In the order of the questions.")]


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A replica, in the order in which they should be tried."""

    pod: Annotated[str, _said("The replica, or the best of its data parallel ranks.")]
    replica: str
    address: Annotated[str, _said("host:port, as its publisher says.")] = ""
    rank: Annotated[int | None, _said("Value of the header X-data-parallel-rank; absent: it has no ranks.")] = None


class ChooseAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    request_id: Annotated[str, _said("What `/v1/done` is told.")]
    chosen: Candidate
    others: Annotated[list[Candidate], _said("If the chosen one refuses, best first.")]
    outcome: Annotated[str, _said("hit, miss, fallback or baseline.")]
    reason: Annotated[str, _said("What the choice rests on.")]
    lease_s: Annotated[float, _said("So long it counts at the pod, if nothing is heard of it.")]
    prompt_tokens: Annotated[int | None, _said("Absent: the prompt could not be read.")] = None
    matched_tokens: dict[str, int] = {}
    expected_cached_tokens: Annotated[
        int | None, _said("In the pod's cache when the request's turn comes; absent: not known.")
    ] = None
    expected_ttft_s: float | None = None


class Explanation(msgspec.Struct, frozen=True):
    """What a choice would rest on. Nothing is booked."""

    score: ScoreAnswer
    known_tokens: Annotated[int, _said("Of the prompt, that the prefix store had.")]
    incomplete: Annotated[str, _said("Why only the beginning of the prompt is known; empty: all is.")]
    stage_s: dict[str, float]
    in_flight: Annotated[dict[str, int], _said("Requests at each pod.")]
    ranked: list[str]
    outcome: str
    reason: str


class Done(msgspec.Struct, frozen=True):
    known: Annotated[bool, _said("False: no such choice, or its lease has ended.")]


class Health(msgspec.Struct, frozen=True):
    status: str
    models: dict[str, dict[str, Any]] = {}
