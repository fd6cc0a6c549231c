"""The service without a transport: questions in, answers out. HTTP and gRPC are thin shells around it.

score     how well each pod suits a prompt                          nothing is booked
choose    who is to get it, by load too; it counts there            until done, or the lease ends
done      its first token is there, or it has ended
explain   what a choice would rest on                               nothing is booked
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from serve_app.access import Access, Caller, check_admin, check_salt
from serve_app.decider import Asked, Decision
from serve_app.limits import Limits, Turnstile
from serve_app.routing.choice import Cost
from serve_app.scoring import Strategy, score_all
from serve_app.service.answers import (
    BatchAnswer,
    BatchItem,
    Candidate,
    ChooseAnswer,
    Done,
    ErrorBody,
    Explanation,
    PodScore,
    ScoreAnswer,
)
from serve_app.service.backend import Backend, LocalBackend
from serve_app.service.questions import ChooseFields, DoneFields, ScoreFields, batch, check, question
from serve_app.service.refused import Refused, refusing
from serve_app.service.reservations import Reservation, Reservations
from serve_app.types import Found, PodId, Served


class ScoreService:
    """Used on one event loop.

    Args:
        models: one is enough; a question that names no model is of the first.
        strategy: of a score whose question does not say.
        lease_s: of a choice whose question does not say.
    """

    def __init__(
        self,
        models: Sequence[Backend],
        *,
        access: Access,
        limits: Limits,
        strategy: Strategy = Strategy.LONGEST_PREFIX,
        lease_s: float = 120.0,
    ) -> None:
        self.models = models
        self.reservations = Reservations()
        self.configure(access=access, limits=limits, strategy=strategy, lease_s=lease_s)

    def configure(self, *, access: Access, limits: Limits, strategy: Strategy, lease_s: float) -> None:
        """What can change while it serves."""
        self.access = access
        self.limits = limits
        self._strategy = strategy
        self._lease_s = lease_s
        self._turnstile = Turnstile(limits)

    # -- who may ----------------------------------------------------------------------------------------------------

    @contextmanager
    def enter(self, headers: Mapping[str, str]) -> Iterator[Caller]:
        """One question at a time of those that may be asked.

        Args:
            headers: of the request, or its gRPC metadata, with lower-case names.

        Raises:
            Refused: no key, an unknown one, or too many questions.
        """
        now_s, turnstile = time.monotonic(), self._turnstile
        with refusing():
            caller = self.access.caller(headers, now_s)
            turnstile.enter(caller.name, now_s)
        try:
            yield caller
        finally:
            turnstile.leave()

    def check_admin(self, headers: Mapping[str, str]) -> None:
        """Raises:
        Refused: who asks may not see everybody's.
        """
        with refusing():
            check_admin(self.access.caller(headers, time.monotonic()))

    # -- questions --------------------------------------------------------------------------------------------------

    async def score(self, raw: bytes | dict[str, Any], caller: Caller) -> ScoreAnswer:
        """Args: raw: a question as JSON, or what it was parsed to.

        Raises:
            Refused: there is no score for it; says why.
        """
        return await self.score_of(*question(raw, ScoreFields, self.limits), caller)

    async def score_of(self, body: Mapping[str, Any], fields: ScoreFields, caller: Caller) -> ScoreAnswer:
        """The same of a request's body, with our own fields apart."""
        model, strategy = self.model(check(body, fields, self.limits)), fields.strategy or self._strategy
        return await self._answer(model, await self._find(model, body, caller, fields.pod_ids, strategy), strategy)

    async def score_batch(self, raw: bytes, caller: Caller) -> BatchAnswer:
        """Each is answered by itself.

        Raises:
            Refused: it is no batch.
        """
        items = []
        for one in batch(raw, self.limits):
            try:
                if not isinstance(one, dict):
                    raise Refused(400, "invalid_request", "a question is a JSON object")
                items.append(BatchItem(answer=await self.score(one, caller)))
            except Refused as error:
                items.append(BatchItem(error=msgspec.convert(error.as_dict(), ErrorBody)))
        return BatchAnswer(items)

    async def explain(self, raw: bytes, caller: Caller) -> Explanation:
        """Raises:
        Refused: as `score`; also where choices are made elsewhere.
        """
        body, fields = question(raw, ScoreFields, self.limits)
        model = self._chooser(check(body, fields, self.limits))
        strategy = fields.strategy or Strategy.EXPECTED_TTFT
        found = await self._find(model, body, caller, fields.pod_ids, strategy)
        choice, in_flight = model.decider.consider(found)
        return Explanation(
            await self._answer(model, found, strategy),
            found.known_tokens,
            found.incomplete,
            {stage: round(seconds, 6) for stage, seconds in found.stage_s.items()},
            {str(pod): count for pod, count in in_flight.items()},
            [str(pod) for pod in choice.ranked],
            str(choice.outcome),
            choice.reason,
        )

    async def choose(self, raw: bytes, caller: Caller) -> ChooseAnswer:
        """Raises:
        Refused: no replica is there, or the question is wrong. A prompt that cannot be read is no reason.
        """
        return await self.choose_of(*question(raw, ChooseFields, self.limits), caller)

    async def choose_of(self, body: Mapping[str, Any], fields: ChooseFields, caller: Caller) -> ChooseAnswer:
        """The same of a request's body, with our own fields apart."""
        model = self._chooser(check(body, fields, self.limits))
        with refusing():
            check_salt(caller, body)
        lease_s = fields.lease_s or self._lease_s
        request_id = fields.request_id or uuid.uuid4().hex
        asked = Asked(
            request_id,
            request_id,
            session=fields.session,
            body=body,
            lease_s=lease_s,
            books=fields.reserve,
        )
        wanted = [PodId(pod) for pod in fields.pods] if fields.pods else None
        with refusing():
            decision, chosen = await self.decide(model, asked, wanted)
        return _choice(request_id, lease_s, decision, chosen, model.addresses, model)

    async def decide(self, model: LocalBackend, asked: Asked, wanted: Sequence[PodId] | None) -> tuple[Decision, PodId]:
        """Who is to get it, and which of its ranks; with its reservation.

        Raises:
            IndexUnavailable: as LocalBackend.choose.
        """
        decision = await model.choose(asked, wanted)
        pod = next(iter(decision.best.values()))
        if asked.books:
            now_s = time.monotonic()
            new = Reservation(str(model.model), pod, now_s, now_s + asked.lease_s)
            for request_id, ended in self.reservations.open(asked.request_id, new):
                if request_id != asked.request_id:
                    self._tell(request_id, ended, None, ended=True)
        return decision, pod

    async def done(self, raw: bytes) -> Done:
        """Raises:
        Refused: it is no report.
        """
        try:
            report = msgspec.json.decode(raw, type=DoneFields)
        except msgspec.ValidationError as error:
            with refusing():
                raise error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refused(400, "invalid_request", f"the body is no JSON object: {error}") from error
        return Done(self.report(report))

    def report(self, report: DoneFields) -> bool:
        """What has become of a choice. Returns whether it is known."""
        now_s = time.monotonic()
        if report.event == "first_token":
            known = self.reservations.get(report.request_id)
            self.reservations.first_token(report.request_id, now_s)
        else:
            known = self.reservations.end(report.request_id)
        if known is None:
            return False
        served = None
        if report.event == "ended" and report.prompt_tokens is not None and report.cached_tokens is not None:
            # It is not told how much of the time was waiting.
            to_first_token_s = max((known.first_token_at_s or now_s) - known.chosen_at_s, 0.0)
            served = Served(report.request_id, report.prompt_tokens, report.cached_tokens, 0.0, to_first_token_s)
        took = known._replace(pod=PodId(report.pod)) if report.pod else known
        if took.pod != known.pod:
            self._tell(report.request_id, known, None, ended=True)
        self._tell(report.request_id, took, served, ended=report.event == "ended")
        return True

    def expire(self) -> None:
        """End what nobody has spoken of in time. To be called every second or so."""
        for request_id, over in self.reservations.expire(time.monotonic()):
            self._tell(request_id, over, None, ended=True)

    def _tell(self, request_id: str, one: Reservation, served: Served | None, *, ended: bool) -> None:
        for model in self.models:
            if model.model == one.model and isinstance(model, LocalBackend):
                model.decider.told(request_id, one.pod, served, ended=ended)

    # -- inside -----------------------------------------------------------------------------------------------------

    def model(self, name: str) -> Backend:
        """Raises:
        Refused: there is none of this name.
        """
        if not name:
            return self.models[0]
        for model in self.models:
            if model.knows(name):
                return model
        known = ", ".join(repr(str(model.model)) for model in self.models)
        raise Refused(404, "model_not_found", f"there is no model {name[:128]!r} here; known: {known}", field="model")

    def ranks(self, name: str) -> Mapping[str, int]:
        """Data parallel rank of each pod that is one."""
        model = self.model(name)
        return model.ranks() if isinstance(model, LocalBackend) else {}

    def _chooser(self, name: str) -> LocalBackend:
        model = self.model(name)
        if not isinstance(model, LocalBackend):
            raise Refused(404, "no_choices", "this graph's gateway routes its requests itself; there is only /v1/score")
        return model

    async def _find(
        self,
        model: Backend,
        body: Mapping[str, Any],
        caller: Caller,
        pods: Sequence[PodId] | None,
        strategy: Strategy,
    ) -> Found:
        with refusing():
            check_salt(caller, body)
            return await model.find(body, pods, strategy)

    async def _answer(self, model: Backend, found: Found, strategy: Strategy) -> ScoreAnswer:
        costs: Mapping[PodId, Cost] = {}
        if strategy is Strategy.EXPECTED_TTFT:
            with refusing():
                costs = await model.costs(found)
            scores = {pod: -cost.total_s for pod, cost in costs.items()}
        else:
            scores = score_all(found, strategy)
        ages = await model.ages_s()
        return ScoreAnswer(
            str(model.model),
            strategy,
            found.prompt_tokens,
            found.block_size,
            found.complete,
            {str(pod): score for pod, score in scores.items()},
            {str(pod): _pod_score(pod, score, found, costs.get(pod), ages) for pod, score in scores.items()},
        )


def _pod_score(pod: PodId, score: float, found: Found, cost: Cost | None, ages: Mapping[str, float]) -> PodScore:
    age_s = ages.get(pod)
    return PodScore(
        score,
        {str(tier): tokens for tier, tokens in found.matched_tokens(pod).items()},
        str(found.trust(pod)),
        None if age_s is None else round(age_s, 3),
        None if cost is None else cost.ttft_s,
        None if cost is None else cost._asdict(),
    )


def _choice(
    request_id: str,
    lease_s: float,
    decision: Decision,
    chosen: PodId,
    addresses: Mapping[PodId, str],
    model: LocalBackend,
) -> ChooseAnswer:
    choice, found = decision.choice, decision.found
    candidates = [
        Candidate(
            str(pod),
            str(replica),
            addresses.get(replica, ""),
            model.decider.ranks.rank(pod),
        )
        for replica, pod in decision.best.items()
    ]
    cost = choice.costs.get(chosen)
    return ChooseAnswer(
        request_id,
        candidates[0],
        candidates[1:],
        str(choice.outcome),
        choice.reason,
        lease_s,
        found.prompt_tokens if found is not None else None,
        {str(tier): tokens for tier, tokens in found.matched_tokens(chosen).items()} if found is not None else {},
        choice.held_tokens.get(chosen),
        cost.ttft_s if cost is not None else None,
    )
