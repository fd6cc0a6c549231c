"""What the service is asked: bytes -> a prompt's body, and what is asked about it.

A question is the body of an OpenAI request (chat, completions, responses, messages, ...) with a few fields of ours
beside its own; these are taken out before anybody looks at the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from serve_app.limits import Limits, check_ids, check_prompts, parse
from serve_app.scoring import Strategy
from serve_app.service.refused import Refused, refusing
from serve_app.types import PodId

BATCH_MAX = 256


class ScoreFields(msgspec.Struct, frozen=True, kw_only=True):
    pods: list[str] | None = None  # None and []: all that are live
    strategy: Strategy | None = None

    @property
    def pod_ids(self) -> list[PodId] | None:
        return [PodId(pod) for pod in self.pods] if self.pods else None


class ChooseFields(msgspec.Struct, frozen=True, kw_only=True):
    pods: list[str] | None = None  # as above; names of replicas
    request_id: Annotated[str, msgspec.Meta(max_length=1024)] = ""  # empty: one is made up
    session: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    lease_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] | None = None
    reserve: bool = True  # False: who asks will not send it there, or has it booked otherwise


class DoneFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    request_id: Annotated[str, msgspec.Meta(max_length=1024)]
    event: Annotated[str, msgspec.Meta(pattern="^(first_token|ended)$")] = "ended"
    pod: Annotated[str, msgspec.Meta(max_length=1024)] = ""  # that took it, if it was another one than was chosen
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**40)] | None = None  # as the engine's `usage` has them
    cached_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**40)] | None = None


F = TypeVar("F", ScoreFields, ChooseFields)


def question(raw: bytes | dict[str, Any], kind: type[F], limits: Limits) -> tuple[dict[str, Any], F]:
    """The request whose prompt it is about, and our own fields.

    Args:
        raw: JSON, or what it was parsed to; that is used up.

    Raises:
        Refused: it is no question.
    """
    with refusing():
        body = parse(raw, limits) if isinstance(raw, bytes) else raw
        fields = msgspec.convert({name: body.pop(name) for name in kind.__struct_fields__ if name in body}, kind)
    return body, fields


def check(body: Mapping[str, Any], fields: ScoreFields | ChooseFields, limits: Limits) -> str:
    """That it can be asked. Returns the model that it names; empty: none.

    Raises:
        Refused: it is too much, or the model is no name.
    """
    with refusing():
        check_ids(fields.pods, limits)
        check_prompts(body, limits)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise Refused(422, "invalid_field", "model must be a string", field="model")
    return model or ""


def batch(raw: bytes, limits: Limits) -> list[Any]:
    """The questions of a batch, unread.

    Raises:
        Refused: it is no batch.
    """
    with refusing():
        requests = parse(raw, limits).get("requests")
    if not isinstance(requests, list) or not 0 < len(requests) <= BATCH_MAX:
        message = f"requests must be a list of 1 to {BATCH_MAX} questions, each as POST /v1/score takes it"
        raise Refused(422, "invalid_field", message, field="requests")
    return requests
