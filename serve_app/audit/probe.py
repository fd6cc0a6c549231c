"""One request of an audit: what the Score API predicts, then what the engine did, as one record.

In: an OpenAI request. Out: `Compared` or, where the two cannot be compared, `Skipped` with the reason.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from serve_app.access import own_key_header
from serve_app.accounting import error_blocks, is_one_sequence, reads_cache, usable_tokens
from serve_app.audit.traffic import Body, Request
from serve_app.config import REPLICA_HEADER
from serve_app.errors import ConfigError
from serve_app.types import Tier

TIMEOUT_S = 600.0  # a long cold prompt on a CPU
NOTHING = "none"


@dataclass(frozen=True, slots=True)
class Compared:
    """One request, predicted and answered."""

    number: int
    kind: str
    conversation: str
    replica: str
    block_size: int
    predicted: dict[str, int]  # tokens by tier, fastest first
    predicted_tokens: int
    actual_tokens: int
    error_blocks: int  # more than zero: too much was predicted
    prompt_tokens: int  # as the engine counts them
    scored_prompt_tokens: int  # as the Score API counts them; the same, or it has tokenized another prompt
    best_tokens: int  # what the replica that holds most would have had
    earlier_tokens: int  # longest prompt that this replica has answered in this conversation; 0: none
    since_answer_s: float  # from the end of the answer before to the question to the Score API
    answered_s: float  # how long the answer took

    @property
    def tiers(self) -> str:
        """The tiers that the prediction rests on."""
        return " + ".join(tier for tier, count in self.predicted.items() if count) or NOTHING


@dataclass(frozen=True, slots=True)
class Skipped:
    """A request that was not compared, and why."""

    number: int
    kind: str
    reason: str


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    """Of a chat or a completion, what is of interest here."""

    usage: _Usage
    choices: list[dict[str, Any]]

    def text(self) -> str:
        choice = self.choices[0]
        return str((choice.get("message") or {}).get("content") or choice.get("text") or "")


class _PodScore(msgspec.Struct):
    matched_tokens: dict[str, int]


class _Score(msgspec.Struct):
    prompt_tokens: int
    block_size: int
    pods: dict[str, _PodScore]


class Gateway:
    """A running gateway, and its Score API.

    Args:
        url: of the gateway, without `/v1`.
        score_url: of the Score API's endpoint.
    """

    def __init__(self, url: str, score_url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S)
        self._score_url = score_url
        self._earlier: dict[tuple[str, str], int] = {}  # longest prompt by conversation and replica
        self._answered_at_s = time.perf_counter()

    def close(self) -> None:
        self._http.close()

    def model(self) -> str:
        """The model that it serves.

        Raises:
            ConfigError: it does not answer.
        """
        try:
            models = self._http.get("/v1/models").raise_for_status().json()["data"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise ConfigError(f"{self._http.base_url} does not answer as a gateway: {error}") from error
        if not models:
            raise ConfigError(f"{self._http.base_url} serves no model")
        return str(models[0]["id"])

    def probe(self, number: int, request: Request) -> tuple[Compared | Skipped, str | None]:
        """Predict, ask, compare. Also the text of the answer, None if there is none."""
        body = request.body
        since_answer_s = time.perf_counter() - self._answered_at_s
        score, wrong = self._score(body)
        started_s = time.perf_counter()
        try:
            raw = self._http.post(f"/v1/{'chat/completions' if 'messages' in body else 'completions'}", json=body)
        except httpx.HTTPError as error:
            return Skipped(number, request.kind, f"gateway: {type(error).__name__}"), None
        finally:
            self._answered_at_s = time.perf_counter()
        if raw.is_error:
            return Skipped(number, request.kind, f"gateway: status {raw.status_code}"), None
        answer = msgspec.json.decode(raw.content, type=_Answer)
        replica = raw.headers.get(REPLICA_HEADER)
        earlier = self._note(request, replica, answer.usage.prompt_tokens)
        details = answer.usage.prompt_tokens_details
        actual = None if details is None else details.cached_tokens
        if wrong := wrong or _why_incomparable(body, score, replica, actual):
            return Skipped(number, request.kind, wrong), answer.text()
        assert score is not None
        assert actual is not None
        predicted = _predicted(body, score, replica)
        total = sum(predicted.values())
        compared = Compared(
            number,
            request.kind,
            request.conversation,
            replica,
            score.block_size,
            predicted,
            total,
            actual,
            error_blocks(total, actual, score.block_size),
            answer.usage.prompt_tokens,
            score.prompt_tokens,
            max(sum(_predicted(body, score, pod).values()) for pod in score.pods),
            earlier,
            round(since_answer_s, 4),
            round(self._answered_at_s - started_s, 4),
        )
        return compared, answer.text()

    def _score(self, body: Body) -> tuple[_Score | None, str | None]:
        """The Score API's answer, or why there is none.

        Raises:
            ConfigError: there is no Score API.
        """
        try:
            raw = self._http.put(
                self._score_url, json=body, headers=own_key_header()
            )  # not POST: see deployments/scorer.py
        except httpx.HTTPError as error:
            raise ConfigError(f"{self._score_url} does not answer ({error})") from error
        if raw.is_success:
            return msgspec.json.decode(raw.content, type=_Score), None
        try:
            code = raw.json()["error"]["code"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"there is no Score API at {self._score_url} (status {raw.status_code}); it is part of the kvcache "
                "application, see configs/quickstart.yaml"
            ) from error
        return None, f"Score API: {code}"

    def _note(self, request: Request, replica: str | None, prompt_tokens: int) -> int:
        """The longest prompt that the replica has answered in this conversation before now."""
        if replica is None or not request.conversation:
            return 0
        key = (request.conversation, replica)
        earlier = self._earlier.get(key, 0)
        self._earlier[key] = max(earlier, prompt_tokens)
        return earlier


def _predicted(body: Body, score: _Score, replica: str) -> dict[str, int]:
    if not reads_cache(body):
        return {}
    held = {Tier(tier): count for tier, count in score.pods[replica].matched_tokens.items()}
    return {str(tier): n for tier, n in usable_tokens(held, score.prompt_tokens, score.block_size).items()}


def _why_incomparable(body: Body, score: _Score | None, replica: str | None, actual: int | None) -> str | None:
    if not is_one_sequence(body):
        return "several prompts or answers: usage is of one of them"
    if replica is None:
        return f"the answer has no {REPLICA_HEADER}"
    if actual is None:
        return "no cached_tokens in usage (vLLM: --enable-prompt-tokens-details)"
    if score is None or replica not in score.pods:
        return "the replica is not in the index"
    return None
